"""Secure aggregation in a simulation: the device's and the service's own machines, all members in one process."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from wearfleet_protos.batching import rng_key
from wearfleet_protos.plan import UploadSpec
from wearfleet_protos.secagg.identity import KnownKeys, KnownKeySigner, Signer, Verifier
from wearfleet_protos.secagg.parameters import SecureParameters
from wearfleet_protos.secagg.vectors import flat, size_of
from wearfleet_protos.tensors import TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Contribution, uploaded
from wearfleet_cloud.federated.privacy.secagg_fold import secure_contribution
from wearfleet_cloud.federated.privacy.secagg_local import MemberMachine, run_in_process
from wearfleet_cloud.federated.privacy.secagg_options import SecureOptions
from wearfleet_cloud.federated.robust.options import TooFewUpdatesError

__all__ = ["MachineOf", "SimulatedSums"]

_STREAM = 0x5ECA
"""Keeps its random numbers apart from others. They come from the seed: a simulation protects nobody."""


class MachineOf(Protocol):
    """Makes a member's machine; the command line gives the agent's own."""

    def __call__(
        self, name: str, signer: Signer, verifier: Verifier, parameters: SecureParameters, seed: int
    ) -> MemberMachine:
        """A machine for one round, whose random bytes follow from the seed."""


@dataclass(frozen=True, slots=True)
class SimulatedSums:
    """Sums the updates of a round under masks.

    Args:
        options: of the run.
        uniform: all members weigh the same.
        machine_of: makes members' machines.
        seed: of the simulation.
    """

    options: SecureOptions
    uniform: bool
    machine_of: MachineOf
    seed: int
    _signers: dict[str, KnownKeySigner] = field(default_factory=dict)

    def of(
        self,
        number: int,
        specs: Sequence[TensorSpec],
        upload: UploadSpec,
        current: Arrays,
        updates: Sequence[Contribution],
    ) -> Contribution:
        """What the service folds instead of the updates of a round.

        Raises:
            TooFewUpdatesError: fewer than ``secagg_minimum``: the round is skipped.
            ConfigError: so many members that sums could wrap.
        """
        if len(updates) < self.options.secagg_minimum:
            raise TooFewUpdatesError(
                f"secure aggregation: {len(updates)} members, {self.options.secagg_minimum} are needed"
            )
        sent = tuple(sorted(uploaded(specs, upload), key=lambda spec: spec.name))
        members = tuple(sorted(update.client for update in updates))
        key = rng_key(self.seed, number, _STREAM, 0)
        parameters = self.options.parameters(
            "simulation", number, members, size=size_of(sent), uniform=self.uniform, graph_seed=key
        )
        verifier = KnownKeys({name: self._signer(name).credential for name in members})
        machines = {
            name: self.machine_of(
                name, self._signer(name), verifier, parameters, rng_key(self.seed, number, _STREAM, place)
            )
            for place, name in enumerate(members, start=1)
        }
        inputs = {u.client: (flat(sent, u.load()), u.num_examples) for u in updates}
        total = run_in_process(parameters, verifier, machines, inputs)
        return secure_contribution(specs, upload, current, total)

    def _signer(self, name: str) -> KnownKeySigner:
        return self._signers.setdefault(name, KnownKeySigner(Ed25519PrivateKey.generate()))
