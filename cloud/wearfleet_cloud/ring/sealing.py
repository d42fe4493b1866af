"""Sealing and opening the hops of a ring: what a site does so that the service in between reads nothing.

A hop's body is encrypted once (ChaCha20-Poly1305) under a fresh key; that key is sealed for every site of the ring
(X25519 of a fresh pair, HKDF-SHA256), bound to run, plan, round, hop, sender and receiver; the sender signs all of it
with the key of its certificate. Keys of sites are made for one run and signed likewise.
Differs from specs/federated.md section 6: not HPKE's encoding (RFC 9180) but the same parts as secure aggregation has,
with the sender authenticated by a signature.
"""

import hashlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from wearfleet_protos.errors import IntegrityError, ProtocolError, WearfleetError
from wearfleet_protos.plan import Plan
from wearfleet_protos.secagg.identity import Signer, Verifier
from wearfleet_protos.secagg.keys import KEY_BYTES, open_sealed, public_key, seal
from wearfleet_protos.tensors import decode_tensors, encode_tensors

from wearfleet_cloud.federated.aggregate import Arrays
from wearfleet_cloud.federated.sealed_ring import HOP, HOPS, KEY, KEYS, MADE, SEEN, Hop, RingKey, read_keys
from wearfleet_cloud.federated.teachers import TEACHER, learned_by

__all__ = ["Route", "Sealer", "is_sealed"]

_ONCE: Final = bytes(12)
"""Each key encrypts one body only."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where a hop belongs: run and plan (digest) of the ring, and the round."""

    run_id: str
    plan: str
    round_number: int


@dataclass(frozen=True, slots=True)
class Sealer:
    """A site in a sealed ring.

    Args:
        member: its name in the ring.
        signer: of its certificate.
        verifier: of the other sites' certificates.
        secret: this site's X25519 secret (32 bytes) for a run, always the same.
    """

    member: str
    signer: Signer
    verifier: Verifier
    secret: Callable[[str], bytes]

    def opened(self, plan: Plan, before: Arrays, route: Route) -> dict[str, np.ndarray]:
        """The state that a turn starts from, with the teacher in it.

        Args:
            plan: the ring's.
            before: its state, with what the service sent.
            route: of this turn.

        Raises:
            IntegrityError: the hop is of another run, older than one that this site has seen, not signed by its
                sender, not for this site, or was changed.
        """
        if float(before[HOPS]) < 0.5:
            return dict(before)
        hop = Hop.from_array(np.asarray(before[HOP], np.uint8))
        self._check(hop, before, route)
        binding = _binding(hop)
        try:
            key = open_sealed(
                self.secret(route.run_id),
                hop.ephemeral,
                binding,
                (hop.sender, self.member),
                hop.wrapped[self.member],
            )
            body = ChaCha20Poly1305(key).decrypt(_ONCE, hop.body, binding)
        except KeyError as error:
            raise IntegrityError(f"the hop of {hop.sender} is not sealed for {self.member}") from error
        except (InvalidTag, ProtocolError, IntegrityError) as error:
            raise IntegrityError(f"the hop of {hop.sender} cannot be opened: it was changed") from error
        learned = learned_by(plan.tensors)
        try:
            tensors = decode_tensors(body, learned)
        except WearfleetError as error:
            raise IntegrityError(f"the teacher is refused: {error}") from error
        theirs = {TEACHER + name: array for name, array in tensors.items()}
        return {**before, **theirs, SEEN: np.asarray(hop.number, np.float32)}

    def sealed(self, plan: Plan, after: Arrays, route: Route) -> dict[str, np.ndarray]:
        """The state that a turn leaves, with what is uploaded: this site's key, and its model for all sites.

        Before the sites know each other's keys, in the first round, the model is for nobody.

        Raises:
            IntegrityError: the key of a site is not signed by it.
        """
        own = self._key(route.run_id)
        keys = read_keys(np.asarray(after[KEYS], np.uint8))
        for key in keys.values():
            self.verifier.verify(key.member, key.credential, key.signature, _key_message(route.run_id, key))
        number = int(after[HOPS]) + 1
        body = encode_tensors({s.name: after[s.name] for s in learned_by(plan.tensors)})
        hop = self._hop(route, number, {name: key.public for name, key in keys.items()}, body)
        size = next(spec.shape[0] for spec in plan.tensors if spec.name == MADE)
        seen = number if self.member in keys else 0
        return {
            **after,
            KEY: own.to_array(),
            MADE: hop.to_array(size),
            SEEN: np.asarray(max(seen, float(after[SEEN])), np.float32),
        }

    def _check(self, hop: Hop, before: Arrays, route: Route) -> None:
        if (hop.run_id, hop.plan) != (route.run_id, route.plan):
            raise IntegrityError(
                f"the hop of {hop.sender} belongs to run {hop.run_id}, not to {route.run_id}"
            )
        seen = int(before[SEEN])
        again = hop.sender == self.member and hop.number == seen
        if hop.number != int(before[HOPS]) or hop.round_number >= route.round_number:
            raise IntegrityError(
                f"hop {int(before[HOPS])} was announced, hop {hop.number} of {hop.sender} came"
            )
        if hop.number <= seen and not again:
            raise IntegrityError(
                f"hop {hop.number} of {hop.sender} came again: this site has seen hop {seen} before"
            )
        self.verifier.verify(hop.sender, hop.credential, hop.signature, _message(hop))

    def _hop(self, route: Route, number: int, publics: Mapping[str, bytes], body: bytes) -> Hop:
        secret, key = secrets.token_bytes(KEY_BYTES), secrets.token_bytes(KEY_BYTES)
        empty = Hop(
            run_id=route.run_id,
            plan=route.plan,
            round_number=route.round_number,
            number=number,
            sender=self.member,
            ephemeral=public_key(secret),
            wrapped={},
            credential=self.signer.credential,
            signature=b"",
            body=b"",
        )
        binding = _binding(empty)
        wrapped = {
            name: seal(secret, public, binding, (self.member, name), key) for name, public in publics.items()
        }
        hop = replace(empty, wrapped=wrapped, body=ChaCha20Poly1305(key).encrypt(_ONCE, body, binding))
        return replace(hop, signature=self.signer.sign(_message(hop)))

    def _key(self, run_id: str) -> RingKey:
        unsigned = RingKey(self.member, public_key(self.secret(run_id)), self.signer.credential, b"")
        return replace(unsigned, signature=self.signer.sign(_key_message(run_id, unsigned)))


def is_sealed(plan: Plan) -> bool:
    """Whether a ring passes on what its service cannot read."""
    return any(spec.name == MADE for spec in plan.tensors)


def _binding(hop: Hop) -> bytes:
    """Run, plan, round, hop and sender: what keys and body are bound to."""
    return hashlib.sha256(b"wearfleet-ring-v1\n" + replace(hop, wrapped={}).header()).digest()


def _message(hop: Hop) -> bytes:
    """What a sender signs."""
    return b"wearfleet-ring-hop\n" + hop.header() + hashlib.sha256(hop.body).digest()


def _key_message(run_id: str, key: RingKey) -> bytes:
    """What a site signs once a run."""
    return b"wearfleet-ring-key\n" + f"{run_id}\n{key.member}\n".encode() + key.public
