"""A member of a secure round: what it sends at each stage, and what it refuses.

It trusts the service with nothing but delivery. Whatever does not fit ends the round for this member: its secrets are
dropped, and without them nothing can be unmasked in its name but what its neighbours hold shares of.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from wearfleet_protos.errors import DeniedError, IntegrityError, ProtocolError
from wearfleet_protos.secagg.keys import (
    commitment,
    mask_stream,
    open_sealed,
    pair_mask_key,
    public_key,
    seal,
    self_mask_key,
)
from wearfleet_protos.secagg.messages import (
    Advertisement,
    Confirmation,
    Deliveries,
    NeighbourKeys,
    Revealed,
    SealedShares,
    Survivors,
    UnmaskRequest,
)
from wearfleet_protos.secagg.quantiser import weighted_words
from wearfleet_protos.secagg.shamir import SHARE_BYTES, split

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from wearfleet_protos.secagg.identity import Signer, Verifier
    from wearfleet_protos.secagg.parameters import SecureParameters

__all__ = ["Member", "SecureClient"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Member:
    """Who takes part, and on what terms.

    Args:
        name: as the service and the others know it.
        signer: its identity.
        verifier: of the others' identities.
        minimum_cohort: it joins no smaller cohort, and unmasks no sum of fewer members.
        entropy: gives so many secret random bytes.
    """

    name: str
    signer: Signer
    verifier: Verifier
    minimum_cohort: int
    entropy: Callable[[int], bytes] = secrets.token_bytes


class _Stage(IntEnum):
    NEW = 0
    ADVERTISED = 1
    SHARED = 2
    MASKED = 3
    CONFIRMED = 4
    REVEALED = 5
    ENDED = 6


@dataclass(slots=True)
class _Secrets:
    """Made for one round, in memory only; ``shares``: by owner, (of its seed, of its mask key)."""

    mask_key: bytes
    channel_key: bytes
    seed: bytes
    shares: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)


class SecureClient:
    """One member in one round; each method is called once, in order. Any error ends it.

    Args:
        member: who.
        parameters: as the service proposes them.
        run_id: the run that the member means to take part in.
        round_number: and its round.

    Raises:
        ProtocolError: another run or round, or this member is not in the cohort.
        DeniedError: the cohort is smaller than this member accepts.
    """

    def __init__(self, member: Member, parameters: SecureParameters, run_id: str, round_number: int) -> None:
        if (parameters.run_id, parameters.round) != (run_id, round_number):
            raise ProtocolError(
                f"the secure round is {parameters.run_id}/{parameters.round}, the task is {run_id}/{round_number}"
            )
        self._neighbours = parameters.neighbours_of(member.name)
        self._member, self._parameters = member, parameters
        self._require_cohort(len(parameters.members), "the cohort has")
        self._binding = parameters.binding()
        self._stage = _Stage.NEW
        entropy = member.entropy
        self._secrets: _Secrets | None = _Secrets(entropy(32), entropy(32), entropy(32))
        self._known: dict[str, Advertisement] = {}
        self._masked_with: frozenset[str] = frozenset()
        self._survivors = Survivors(())

    @property
    def ended(self) -> bool:
        """True when nothing can be asked of it any more: it has revealed, refused or was closed."""
        return self._secrets is None

    def close(self) -> None:
        """Drop all secrets."""
        self._secrets = None
        self._stage = _Stage.ENDED

    def advertise(self) -> Advertisement:
        """Stage 0: fresh public keys, signed."""

        def work(own: _Secrets) -> Advertisement:
            draft = Advertisement(
                self._member.name,
                public_key(own.mask_key),
                public_key(own.channel_key),
                self._member.signer.credential,
                b"",
            )
            signature = self._member.signer.sign(draft.signed_part(self._binding))
            own_keys = Advertisement(
                draft.member, draft.mask_key, draft.channel_key, draft.credential, signature
            )
            self._known = {self._member.name: own_keys}
            return own_keys

        return self._step(_Stage.NEW, work)

    def share_keys(self, keys: NeighbourKeys) -> SealedShares:
        """Stage 1: shares of both secrets, sealed for each neighbour.

        Raises:
            ProtocolError: own keys missing or changed, a key twice, a stranger, or fewer neighbours than the threshold.
            IntegrityError: a signature is wrong, or of another round or cohort.
        """

        def work(own: _Secrets) -> SealedShares:
            self._check_keys(keys.advertisements)
            self._known = {keys_of.member: keys_of for keys_of in keys.advertisements}
            others = {
                name: self._parameters.index(name)
                for name in sorted(self._known.keys() - {self._member.name})
            }
            threshold, entropy = self._parameters.threshold, self._member.entropy
            seeds = split(own.seed, others.values(), threshold, entropy)
            mask_keys = split(own.mask_key, others.values(), threshold, entropy)
            sealed = tuple(
                (name, self._seal(own, name, seeds[place] + mask_keys[place]))
                for name, place in others.items()
            )
            return SealedShares(self._member.name, commitment(own.seed), sealed)

        return self._step(_Stage.ADVERTISED, work)

    def mask(
        self, deliveries: Deliveries, values: NDArray[np.float64], num_examples: int
    ) -> NDArray[np.uint32]:
        """Stage 2: the update, weighted, quantised and masked.

        Args:
            deliveries: shares of those neighbours who masks are made with.
            values: (P,) differences.
            num_examples: windows that were trained on; only the sum of weights becomes known.

        Returns:
            (P + 1,) uint32; without the masks the last one is the weight.

        Raises:
            ProtocolError: shares of a stranger, twice from one, or from fewer neighbours than the threshold.
            ShapeError: the update has another size or is not finite.
        """

        def work(own: _Secrets) -> NDArray[np.uint32]:
            self._take_shares(own, deliveries)
            noise = np.random.Generator(
                np.random.PCG64(int.from_bytes(self._member.entropy(16), "big"))
            ).random(values.shape)
            weight = self._parameters.weight(num_examples)
            words = weighted_words(values, weight, self._parameters, noise)
            words += mask_stream(self_mask_key(own.seed, self._binding, self._member.name), words.size)
            for name in sorted(self._masked_with):
                pair = (self._member.name, name)
                key = pair_mask_key(own.mask_key, self._known[name].mask_key, self._binding, pair)
                stream = mask_stream(key, words.size)
                if self._parameters.index(self._member.name) < self._parameters.index(name):
                    words += stream
                else:
                    words -= stream
            return words

        return self._step(_Stage.SHARED, work)

    def confirm(self, survivors: Survivors) -> Confirmation:
        """Stage 3: sign whose inputs are in the sum.

        Raises:
            ProtocolError: unsorted, with strangers, without this member, or fewer than the threshold.
            DeniedError: fewer than this member accepts.
        """

        def work(_: _Secrets) -> Confirmation:
            members = survivors.members
            if members != tuple(sorted(set(members))) or self._member.name not in members:
                raise ProtocolError("survivors must be different names in order, this member among them")
            if not set(members) <= set(self._parameters.members):
                raise ProtocolError("survivors that are no members of this round")
            if (self._neighbours & set(members)) - self._masked_with:
                raise ProtocolError("survivors that never shared their keys with this member")
            if len(members) < self._parameters.threshold:
                raise ProtocolError(
                    f"{len(members)} survivors, at least {self._parameters.threshold} are needed"
                )
            self._require_cohort(len(members), "the sum would be of")
            self._survivors = survivors
            return Confirmation(
                self._member.name, self._member.signer.sign(survivors.signed_part(self._binding))
            )

        return self._step(_Stage.MASKED, work)

    def reveal(self, request: UnmaskRequest) -> Revealed:
        """Stage 4: shares of the seeds of surviving neighbours and of the mask keys of dropped ones; then it ends.

        Raises:
            ProtocolError: survivors and dropped overlap, are not those that were confirmed, or fewer than the threshold
                of the neighbours confirmed the same.
            IntegrityError: a confirmation's signature is wrong.
        """

        def work(own: _Secrets) -> Revealed:
            survivors, dropped = set(request.survivors), set(request.dropped)
            if survivors & dropped:
                raise ProtocolError(f"survivors and dropped overlap in {min(survivors & dropped)!r}")
            if request.survivors != self._survivors.members:
                raise ProtocolError("the survivors are not those that this member has confirmed")
            if not dropped <= set(self._parameters.members):
                raise ProtocolError("dropped that are no members of this round")
            self._check_confirmations(request.confirmations)
            held = own.shares
            return Revealed(
                self._member.name,
                tuple((name, held[name][0]) for name in sorted(survivors & held.keys())),
                tuple((name, held[name][1]) for name in sorted(dropped & held.keys())),
            )

        revealed = self._step(_Stage.CONFIRMED, work)
        self.close()
        return revealed

    def _step(self, expected: _Stage, work: Callable[[_Secrets], T]) -> T:
        """Do one stage, once; any error, also one of ours, ends the round for this member."""
        own, stage = self._secrets, self._stage
        if own is None or stage != expected:
            self.close()
            raise ProtocolError(
                f"a member answers each stage once, in order: it is at {stage.name}, asked was for what follows "
                f"{expected.name}; the round is over for it"
            )
        try:
            made = work(own)
        except BaseException:
            self.close()
            raise
        self._stage = _Stage(expected + 1)
        return made

    def _require_cohort(self, count: int, what: str) -> None:
        if count < self._member.minimum_cohort:
            raise DeniedError(
                f"{what} {count} members, this device asks for {self._member.minimum_cohort} "
                "(federation.secure_minimum_cohort)"
            )

    def _check_keys(self, advertisements: tuple[Advertisement, ...]) -> None:
        by_name = {keys.member: keys for keys in advertisements}
        if by_name.get(self._member.name) != self._known[self._member.name]:
            raise ProtocolError("this member's own keys are missing or changed")
        others = by_name.keys() - {self._member.name}
        if len(by_name) != len(advertisements) or not others <= self._neighbours:
            raise ProtocolError("keys of a member twice, or of one who is no neighbour")
        if len(others) < self._parameters.threshold:
            raise ProtocolError(
                f"{len(others)} neighbours are there, {self._parameters.threshold} are needed"
            )
        all_keys = [key for keys in advertisements for key in (keys.mask_key, keys.channel_key)]
        if len(set(all_keys)) != len(all_keys):
            raise ProtocolError("two members show the same key")
        for name in sorted(others):
            keys = by_name[name]
            self._member.verifier.verify(
                name, keys.credential, keys.signature, keys.signed_part(self._binding)
            )

    def _seal(self, own: _Secrets, receiver: str, plain: bytes) -> bytes:
        public = self._known[receiver].channel_key
        return seal(own.channel_key, public, self._binding, (self._member.name, receiver), plain)

    def _take_shares(self, own: _Secrets, deliveries: Deliveries) -> None:
        """Open what the neighbours sealed. What cannot be opened is only missing later, if it is needed at all."""
        senders = [name for name, _ in deliveries.sealed]
        known = self._known.keys() - {self._member.name}
        if len(set(senders)) != len(senders) or not set(senders) <= known:
            raise ProtocolError("shares twice from a member, or of one who is no neighbour")
        if len(senders) < self._parameters.threshold:
            raise ProtocolError(
                f"{len(senders)} neighbours shared their keys, {self._parameters.threshold} are needed"
            )
        self._masked_with = frozenset(senders)
        for name, sealed in deliveries.sealed:
            public = self._known[name].channel_key
            try:
                plain = open_sealed(own.channel_key, public, self._binding, (name, self._member.name), sealed)
            except IntegrityError:
                continue
            if len(plain) == 2 * SHARE_BYTES:
                own.shares[name] = plain[:SHARE_BYTES], plain[SHARE_BYTES:]

    def _check_confirmations(self, confirmations: tuple[Confirmation, ...]) -> None:
        """The threshold of neighbours, all of them survivors, signed what this member signed."""
        signed = self._survivors.signed_part(self._binding)
        counted = set[str]()
        for confirmation in confirmations:
            name = confirmation.member
            if name in self._masked_with and name in self._survivors.members:
                credential = self._known[name].credential
                self._member.verifier.verify(name, credential, confirmation.signature, signed)
                counted.add(name)
        if len(counted) < self._parameters.threshold:
            raise ProtocolError(
                f"{len(counted)} neighbours confirmed the same survivors, {self._parameters.threshold} are needed"
            )
