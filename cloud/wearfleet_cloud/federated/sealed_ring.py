"""Sealed hops of MetaFed's ring: what travels, and what the service can check of it without reading it.

A site uploads its key, and its model sealed for all sites of the ring; the service sees sizes, the order of hops, who
sent what for whom, and bytes. Who seals and opens is ``ring.sealing``.
Source: specs/federated.md section 6, "our deployment".
Differs: a hop is sealed for every site of the ring, not for the successor alone: who follows shows only when one is
away, and the last stage sends one model to all.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.errors import AggregationError, IntegrityError
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec, encode_tensors

from wearfleet_cloud.federated.aggregate import Arrays, Contribution, Mean, check_update
from wearfleet_cloud.federated.robust.evidence import Judgement
from wearfleet_cloud.federated.teachers import scalar

__all__ = [
    "HOP",
    "HOPS",
    "KEY",
    "KEYS",
    "MADE",
    "SEEN",
    "Hop",
    "RingKey",
    "collected",
    "read_keys",
    "sealed_specs",
]

HOP: Final = "sealed/hop"
"""The last hop as it came: sent to all."""
HOPS: Final = "sealed/hops"
"""Hops so far: sent to all."""
KEYS: Final = "sealed/keys"
"""The keys of all sites: sent to all."""
MADE: Final = "sealed/made"
"""What a site uploads: its hop."""
KEY: Final = "sealed/key"
"""What a site uploads: its key."""
SEEN: Final = "sealed/seen"
"""The last hop that a site opened or made; stays in the site, so that no older one is taken for new."""

_SLOT: Final = 2048
"""Bytes of a key."""
_HEAD: Final = 4096
"""Bytes of a hop beside its ciphertext and its recipients."""
_RECIPIENT: Final = 256
_MOST_NAME: Final = 96
_KEY_MAGIC: Final = b"wfk1"
_HOP_MAGIC: Final = b"wfh1"

Bytes = NDArray[np.uint8]


def sealed_specs(learned: Sequence[TensorSpec], seats: int) -> tuple[TensorSpec, ...]:
    """The tensors of a sealed ring beside MetaFed's own: hop and keys down, hop and key up, the count that stays."""
    zeros = {s.name: np.zeros(s.shape, s.dtype) for s in learned}
    size = len(encode_tensors(zeros)) + 16 + _HEAD + seats * _RECIPIENT
    down = TensorSpec(HOP, "uint8", (size,), TensorRole.AUX, TensorGroup.ANCHOR, "global")
    up = replace(down, name=MADE, group=TensorGroup.AUX, origin="zeros")
    count = scalar(HOPS, TensorGroup.ANCHOR, "global")
    nought = scalar("sealed/nought", TensorGroup.OPTIMISER, "zeros")
    return (
        down,
        replace(down, name=KEYS, shape=(seats * _SLOT,)),
        count,
        nought,
        replace(nought, name=SEEN, origin="local", copy_of=nought.name),
        up,
        replace(up, name=KEY, shape=(_SLOT,)),
    )


@dataclass(frozen=True, slots=True)
class RingKey:
    """A site's key for one run: X25519, signed with the key of the site's certificate."""

    member: str
    public: bytes
    credential: bytes
    signature: bytes

    def to_array(self) -> Bytes:
        """(2048,) uint8.

        Raises:
            IntegrityError: the certificate is too large.
        """
        texts = {"public": self.public, "credential": self.credential, "signature": self.signature}
        document = {"member": self.member, **{name: value.hex() for name, value in texts.items()}}
        return _framed(_KEY_MAGIC, document, b"", _SLOT)

    @classmethod
    def from_array(cls, array: Bytes) -> Self:
        """Inverse of :meth:`to_array`.

        Raises:
            IntegrityError: it is no key.
        """
        document, _ = _unframed(_KEY_MAGIC, array)
        try:
            parts = {name: bytes.fromhex(document[name]) for name in ("public", "credential", "signature")}
            member = str(document["member"])
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"not the key of a site: {error!r}") from error
        if not 0 < len(member) <= _MOST_NAME or len(parts["public"]) != 32:
            raise IntegrityError(f"not the key of a site: member {member[:40]!r}")
        return cls(member, **parts)


@dataclass(frozen=True, slots=True)
class Hop:
    """A sealed model.

    Args:
        run_id: of the ring's run.
        plan: digest of its plan.
        round_number: in which it was made.
        number: of the hop, from 1.
        sender: who made it.
        ephemeral: public key of this hop alone.
        wrapped: the key of the body, sealed for each member.
        credential: of the sender.
        signature: of the sender over :meth:`header` and the body.
        body: ciphertext.
    """

    run_id: str
    plan: str
    round_number: int
    number: int
    sender: str
    ephemeral: bytes
    wrapped: Mapping[str, bytes]
    credential: bytes
    signature: bytes
    body: bytes

    def header(self) -> bytes:
        """What the body is bound to: run, plan, round, hop, sender, recipients with their keys."""
        return json.dumps(self._header(), sort_keys=True, separators=(",", ":")).encode()

    def to_array(self, size: int) -> Bytes:
        """(size,) uint8.

        Raises:
            IntegrityError: it does not fit.
        """
        document = {
            **self._header(),
            "credential": self.credential.hex(),
            "signature": self.signature.hex(),
            "body": len(self.body),
        }
        return _framed(_HOP_MAGIC, document, self.body, size)

    @classmethod
    def from_array(cls, array: Bytes) -> Self:
        """Inverse of :meth:`to_array`; nothing is verified.

        Raises:
            IntegrityError: it is no hop.
        """
        document, rest = _unframed(_HOP_MAGIC, array)
        try:
            hop = cls(
                run_id=str(document["run_id"]),
                plan=str(document["plan"]),
                round_number=int(document["round"]),
                number=int(document["hop"]),
                sender=str(document["sender"]),
                ephemeral=bytes.fromhex(document["ephemeral"]),
                wrapped={str(name): bytes.fromhex(key) for name, key in document["wrapped"].items()},
                credential=bytes.fromhex(document["credential"]),
                signature=bytes.fromhex(document["signature"]),
                body=rest[: int(document["body"])],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"not a sealed hop: {error!r}") from error
        if len(hop.body) != document["body"]:
            raise IntegrityError(f"a sealed hop of {document['body']} bytes has only {len(hop.body)}")
        return hop

    def _header(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "plan": self.plan,
            "round": self.round_number,
            "hop": self.number,
            "sender": self.sender,
            "ephemeral": self.ephemeral.hex(),
            "wrapped": {name: key.hex() for name, key in sorted(self.wrapped.items())},
        }


def read_keys(array: Bytes) -> dict[str, RingKey]:
    """Keys by member; nothing is verified.

    Raises:
        IntegrityError: one is damaged.
    """
    slots = array.reshape(-1, _SLOT)
    keys = (RingKey.from_array(slot) for slot in slots if slot.any())
    return {key.member: key for key in keys}


def collected(
    specs: Sequence[TensorSpec], current: Arrays, contributions: Sequence[Contribution], *, warm: bool
) -> tuple[dict[str, NDArray[np.generic]], Mean]:
    """What the service makes of a round: keys while sites warm up, else the one hop, as they came.

    Args:
        specs: ``MetaFed``'s uploaded ones.
        current: global tensors.
        contributions: in the order of names.
        warm: whether the sites warm up.

    Returns:
        The global tensors that change, and who took part.

    Raises:
        AggregationError: nobody sent a usable key, a hop is out of sequence, of somebody else or not for all, or more
            sites came than there are seats.
    """
    keys = read_keys(_bytes_of(current, KEYS))
    hops = int(current[HOPS])
    refused, counted, changed = [], [], dict[str, NDArray[np.generic]]()
    for part in contributions:
        update = part.load()
        check_update(update, specs, client=part.client)
        try:
            if warm:
                key = RingKey.from_array(_bytes_of(update, KEY))
                _expect(key.member == part.client, f"{part.client} sent a key of {key.member[:40]!r}")
                keys.setdefault(key.member, key)
            else:
                _check_hop(Hop.from_array(_bytes_of(update, MADE)), part.client, hops + 1, keys)
                changed = {HOP: _bytes_of(update, MADE), HOPS: np.asarray(hops + 1, np.float32)}
        except IntegrityError as error:
            refused.append(Judgement(part.client, "refused", str(error), suspect=True))
        else:
            counted.append(part)
    if not counted:
        raise AggregationError(
            refused[0].reason if refused else "no updates; the ring goes on with the next site"
        )
    if warm:
        changed = {KEYS: _slots(keys, _bytes_of(current, KEYS).size)}
    clients = tuple(part.client for part in counted)
    return changed, Mean({}, clients, sum(part.num_examples for part in counted), tuple(refused))


def _check_hop(hop: Hop, client: str, number: int, keys: Mapping[str, RingKey]) -> None:
    _expect(hop.sender == client, f"{client} sent a hop of {hop.sender[:40]!r}")
    _expect(hop.number == number, f"hop {number} was expected, {client} sent {hop.number}")
    missing = sorted(keys.keys() - hop.wrapped.keys())
    _expect(not missing, f"the hop of {client} is not for {', '.join(missing)[:200]}")


def _slots(keys: Mapping[str, RingKey], size: int) -> Bytes:
    if len(keys) * _SLOT > size:
        raise AggregationError(
            f"{len(keys)} sites, but {size // _SLOT} seats; start the run again with --set seats={len(keys)}"
        )
    filled = [keys[name].to_array() for name in sorted(keys)]
    return np.concatenate([*filled, np.zeros(size - len(keys) * _SLOT, np.uint8)])


def _expect(true: bool, otherwise: str) -> None:
    if not true:
        raise IntegrityError(otherwise)


def _bytes_of(arrays: Arrays, name: str) -> Bytes:
    return np.asarray(arrays[name], np.uint8)


def _framed(magic: bytes, document: Mapping[str, object], rest: bytes, size: int) -> Bytes:
    head = json.dumps(document, sort_keys=True).encode()
    data = magic + len(head).to_bytes(4, "little") + head + rest
    if len(data) > size:
        raise IntegrityError(
            f"{len(data)} bytes do not fit into {size}; fewer sites, or a smaller certificate"
        )
    array = np.zeros(size, np.uint8)
    array[: len(data)] = np.frombuffer(data, np.uint8)
    return array


def _unframed(magic: bytes, array: Bytes) -> tuple[dict[str, Any], bytes]:
    data = array.tobytes()
    length = int.from_bytes(data[4:8], "little")
    if data[:4] != magic or 8 + length > len(data):
        raise IntegrityError(f"expected {magic.decode()} of a sealed ring, got {data[:4]!r}")
    try:
        document = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"the head of {magic.decode()} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise IntegrityError(f"the head of {magic.decode()} is no object")
    return document, data[8 + length :]
