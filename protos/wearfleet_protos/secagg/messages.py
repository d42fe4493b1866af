"""The messages of a secure round, stage by stage; ``codec`` converts them from and to bytes.

=====  ====================  ======================================  =========================
stage  what it is            member -> service                       service -> member, after it
=====  ====================  ======================================  =========================
0      setup                 :class:`Advertisement`                  :class:`NeighbourKeys`
1      shares of the keys    :class:`SealedShares`                   :class:`Deliveries`
2      masked input          the update's words                      :class:`Survivors`
3      consistency           :class:`Confirmation`                   :class:`UnmaskRequest`
4      unmasking             :class:`Revealed`                       nothing
=====  ====================  ======================================  =========================
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from wearfleet_protos.errors import ProtocolError
from wearfleet_protos.secagg.keys import KEY_BYTES

__all__ = [
    "Advertisement",
    "Answer",
    "Confirmation",
    "Deliveries",
    "NeighbourKeys",
    "Notice",
    "Revealed",
    "SealedShares",
    "Survivors",
    "UnmaskRequest",
]

Named = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True)
class Advertisement:
    """A member's public keys of this round, signed with its identity.

    Args:
        member: name.
        mask_key: X25519, of the pairwise masks.
        channel_key: X25519, of the sealed shares.
        credential: what shows whose signature it is, for instance a certificate in DER.
        signature: of :meth:`signed_part`.
    """

    member: str
    mask_key: bytes
    channel_key: bytes
    credential: bytes
    signature: bytes

    def __post_init__(self) -> None:
        if len(self.mask_key) != KEY_BYTES or len(self.channel_key) != KEY_BYTES:
            raise ProtocolError(f"keys of {self.member[:80]!r} must have {KEY_BYTES} bytes each")

    def signed_part(self, binding: bytes) -> bytes:
        """What the identity signs: round, cohort and parameters (by their hash), name and keys."""
        return b"\n".join(
            (b"wearfleet-secagg-keys", self.member.encode(), binding + self.mask_key + self.channel_key)
        )


@dataclass(frozen=True, slots=True)
class NeighbourKeys:
    """The advertisements of a member and of its neighbours that are there."""

    advertisements: tuple[Advertisement, ...]


@dataclass(frozen=True, slots=True)
class SealedShares:
    """Shares of a member's two secrets, sealed for each neighbour; and the commitment to its seed."""

    member: str
    seed_commitment: bytes
    sealed: Named


@dataclass(frozen=True, slots=True)
class Deliveries:
    """The shares that neighbours sealed for a member, by sender; they mask with it, and it with them."""

    sealed: Named


@dataclass(frozen=True, slots=True)
class Survivors:
    """Whose masked input the service has, sorted."""

    members: tuple[str, ...]

    def signed_part(self, binding: bytes) -> bytes:
        """What a member signs when it agrees to reveal what unmasks the sum of these members."""
        listed = hashlib.sha256("\n".join(self.members).encode()).digest()
        return b"wearfleet-secagg-survivors\n" + binding + listed


@dataclass(frozen=True, slots=True)
class Confirmation:
    """A member's signature of the survivors that it was told."""

    member: str
    signature: bytes


@dataclass(frozen=True, slots=True)
class UnmaskRequest:
    """Asks for shares: of the seeds of survivors, of the mask keys of those who dropped after sharing.

    Args:
        survivors: sorted; exactly those that were confirmed.
        dropped: sorted.
        confirmations: of survivors.
    """

    survivors: tuple[str, ...]
    dropped: tuple[str, ...]
    confirmations: tuple[Confirmation, ...]


@dataclass(frozen=True, slots=True)
class Revealed:
    """A member's shares, by whose secret they belong to."""

    member: str
    seed_shares: Named
    key_shares: Named


Answer = Advertisement | SealedShares | Confirmation | Revealed
"""What a member sends, beside its masked input."""
Notice = NeighbourKeys | Deliveries | Survivors | UnmaskRequest
"""What the service sends after a stage."""
