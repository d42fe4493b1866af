"""The service's side of a secure round: ``advance(round, event) -> (round, effects)``, and the sum in the end.

    ADVERTISE --> SHARE --> MASK --> CONFIRM --> UNMASK --> COMPLETE
        |           |        |          |           |
        +-----------+--------+----------+-----------+--> FAILED    too few members; the old model is kept

A stage ends when every member that can still answer has, or with its deadline (``StageClosed``). Members that drop out
before they shared their keys are simply not in the sum's group: nobody has masked against them. The values live in
memory only; a service that is killed has lost the round.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.errors import AggregationError, ConflictError, DeniedError, ProtocolError
from wearfleet_protos.secagg.identity import Verifier
from wearfleet_protos.secagg.keys import commitment, mask_stream, pair_mask_key, public_key, self_mask_key
from wearfleet_protos.secagg.messages import (
    Advertisement,
    Confirmation,
    Deliveries,
    NeighbourKeys,
    Notice,
    Revealed,
    SealedShares,
    Survivors,
    UnmaskRequest,
)
from wearfleet_protos.secagg.parameters import SecureParameters
from wearfleet_protos.secagg.quantiser import mean_of
from wearfleet_protos.secagg.shamir import join

__all__ = [
    "FINAL",
    "TABLE",
    "Failed",
    "InputMasked",
    "MemberLost",
    "SecureRound",
    "SecureSum",
    "SendNotices",
    "Stage",
    "StageClosed",
    "StartUnmasking",
    "advance",
    "unmask",
]


class Stage(StrEnum):
    """What a secure round waits for."""

    ADVERTISE = "advertise"
    SHARE = "share"
    MASK = "mask"
    CONFIRM = "confirm"
    UNMASK = "unmask"
    COMPLETE = "complete"
    FAILED = "failed"


FINAL: Final = frozenset({Stage.COMPLETE, Stage.FAILED})


@dataclass(frozen=True, slots=True, eq=False)
class InputMasked:
    """A member's masked input: (P + 1,) uint32."""

    member: str
    words: NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class MemberLost:
    """A member declined, was revoked or refused a message; nothing more will come of it."""

    member: str


@dataclass(frozen=True, slots=True)
class StageClosed:
    """The deadline of a stage has passed; of another than the present one it changes nothing."""

    stage: Stage


Event = Advertisement | SealedShares | InputMasked | Confirmation | Revealed | MemberLost | StageClosed


@dataclass(frozen=True, slots=True)
class SendNotices:
    """Tell members what follows; a member that is not named is out."""

    notices: Mapping[str, Notice]


@dataclass(frozen=True, slots=True)
class StartUnmasking:
    """Call :func:`unmask`; it takes time."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The round gives no sum."""

    reason: str


Effect = SendNotices | StartUnmasking | Failed
Outcome = tuple["SecureRound", tuple[Effect, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class SecureRound:
    """Where a secure round stands.

    Args:
        parameters: of the round.
        verifier: of members' identities; a wrong signature costs its sender the round, not its neighbours.
        stage: what it waits for.
        lost: members that will not answer.
        keys: U1 once the stage is over, by member.
        shared: U2, by member.
        masked: U3.
        total: (P + 1,) uint32 sum of the masked inputs; empty before the first one.
        confirmed: by member.
        revealed: U4, by member.
        reason: why it failed.
    """

    parameters: SecureParameters
    verifier: Verifier
    stage: Stage = Stage.ADVERTISE
    lost: frozenset[str] = frozenset()
    keys: Mapping[str, Advertisement] = field(default_factory=dict)
    shared: Mapping[str, SealedShares] = field(default_factory=dict)
    masked: frozenset[str] = frozenset()
    total: NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))
    confirmed: Mapping[str, Confirmation] = field(default_factory=dict)
    revealed: Mapping[str, Revealed] = field(default_factory=dict)
    reason: str = ""

    @property
    def dropped(self) -> frozenset[str]:
        """U2 without U3: who shared keys but sent no input; only their mask keys may be rebuilt."""
        return frozenset(self.shared) - self.masked

    def awaited(self) -> frozenset[str]:
        """Who can still answer the present stage and has not."""
        waiting: Mapping[Stage, tuple[Iterable[str], Iterable[str]]] = {
            Stage.ADVERTISE: (self.parameters.members, self.keys),
            Stage.SHARE: (self.keys, self.shared),
            Stage.MASK: (self.shared, self.masked),
            Stage.CONFIRM: (self.masked, self.confirmed),
            Stage.UNMASK: (self.confirmed, self.revealed),
        }
        asked, came = waiting.get(self.stage, ((), ()))
        return frozenset(asked) - frozenset(came) - self.lost


@dataclass(frozen=True, slots=True, eq=False)
class SecureSum:
    """All that the service learns: (P,) float64 weighted mean of the updates, sum of the weights, who is in it."""

    mean: NDArray[np.float64]
    weight: int
    members: tuple[str, ...]


def advance(current: SecureRound, event: Event) -> Outcome:
    """What an event makes of a secure round.

    Raises:
        ProtocolError: the event cannot happen in this stage, or a message is malformed.
        ConflictError: the member's stage is over, or it answered before with something else.
        DeniedError: the sender is not among those who are asked.
        IntegrityError: a signature is wrong.
    """
    entry = TABLE.get((current.stage, type(event)))
    if entry is None:
        raise ConflictError(
            f"the secure round is at {current.stage} and does not take {type(event).__name__}"
        )
    rule, targets = entry
    after, effects = rule(current, event)
    assert after.stage in targets, f"{current.stage} -> {after.stage} is not in the table"
    return after, effects


def unmask(done: SecureRound) -> SecureSum:
    """Rebuild the seeds of the survivors and the mask keys of the dropped, and take their masks off the sum.

    Raises:
        AggregationError: a rebuilt secret is not the right one, or the sum is impossible.
    """
    assert done.stage == Stage.COMPLETE
    parameters, binding, total = done.parameters, done.parameters.binding(), done.total.copy()
    for member in sorted(done.masked):
        seed = _rebuilt(done, member, lambda revealed: revealed.seed_shares)
        if commitment(seed) != done.shared[member].seed_commitment:
            raise AggregationError(f"the seed of {member} was rebuilt from a wrong share; the round is void")
        total -= mask_stream(self_mask_key(seed, binding, member), total.size)
    for member in sorted(done.dropped):
        others = sorted(parameters.neighbours_of(member) & done.masked)
        if not others:
            continue
        secret = _rebuilt(done, member, lambda revealed: revealed.key_shares)
        if public_key(secret) != done.keys[member].mask_key:
            raise AggregationError(f"the key of {member} was rebuilt from a wrong share; the round is void")
        for other in others:
            key = pair_mask_key(secret, done.keys[other].mask_key, binding, (member, other))
            stream = mask_stream(key, total.size)
            if parameters.index(other) < parameters.index(member):
                total -= stream
            else:
                total += stream
    mean, weight = mean_of(total, len(done.masked), parameters)
    return SecureSum(mean, weight, tuple(sorted(done.masked)))


def _rebuilt(
    done: SecureRound, owner: str, shares_of: Callable[[Revealed], Iterable[tuple[str, bytes]]]
) -> bytes:
    held = {
        done.parameters.index(holder): share
        for holder, revealed in done.revealed.items()
        for name, share in shares_of(revealed)
        if name == owner
    }
    try:
        return join(held, done.parameters.threshold)
    except ProtocolError as error:
        raise AggregationError(f"a secret of {owner} cannot be rebuilt: {error}") from error


def _advertise(current: SecureRound, event: Advertisement) -> Outcome:
    if _repeated(current, event.member, current.parameters.members, current.keys, event):
        return current, ()
    signed = event.signed_part(current.parameters.binding())
    current.verifier.verify(event.member, event.credential, event.signature, signed)
    taken = {key for keys in current.keys.values() for key in (keys.mask_key, keys.channel_key)}
    if taken & {event.mask_key, event.channel_key} or event.mask_key == event.channel_key:
        raise ProtocolError("a key that is in use already; every member makes its own")
    return _settled(replace(current, keys={**current.keys, event.member: event}))


def _share(current: SecureRound, event: SealedShares) -> Outcome:
    if _repeated(current, event.member, current.keys, current.shared, event):
        return current, ()
    expected = current.parameters.neighbours_of(event.member) & current.keys.keys()
    if sorted(name for name, _ in event.sealed) != sorted(expected) or len(event.seed_commitment) != 32:
        raise ProtocolError("sealed shares must be for each neighbour that is there, with a commitment")
    return _settled(replace(current, shared={**current.shared, event.member: event}))


def _mask(current: SecureRound, event: InputMasked) -> Outcome:
    if event.member not in current.shared or event.member in current.lost:
        raise DeniedError(f"{event.member} did not finish sharing its keys; its input cannot be unmasked")
    if event.member in current.masked:
        raise ConflictError(f"{event.member} has sent its masked input before")
    size = current.parameters.size + 1
    if event.words.shape != (size,) or event.words.dtype != np.uint32:
        raise ProtocolError(f"a masked input has {size} words, got {event.words.shape} {event.words.dtype}")
    total = event.words if not current.masked else current.total + event.words
    return _settled(replace(current, masked=current.masked | {event.member}, total=total))


def _confirm(current: SecureRound, event: Confirmation) -> Outcome:
    if _repeated(current, event.member, current.masked, current.confirmed, event):
        return current, ()
    signed = Survivors(tuple(sorted(current.masked))).signed_part(current.parameters.binding())
    current.verifier.verify(event.member, current.keys[event.member].credential, event.signature, signed)
    return _settled(replace(current, confirmed={**current.confirmed, event.member: event}))


def _reveal(current: SecureRound, event: Revealed) -> Outcome:
    if _repeated(current, event.member, current.confirmed, current.revealed, event):
        return current, ()
    return _settled(replace(current, revealed={**current.revealed, event.member: event}))


def _lose(current: SecureRound, event: MemberLost) -> Outcome:
    if event.member not in current.parameters.members:
        raise DeniedError(f"{event.member[:80]!r} is no member of this round")
    return _settled(replace(current, lost=current.lost | {event.member}))


def _deadline(current: SecureRound, event: StageClosed) -> Outcome:
    return _closed(current) if event.stage == current.stage else (current, ())


def _repeated(
    current: SecureRound, member: str, asked: Iterable[str], came: Mapping[str, object], message: object
) -> bool:
    """True for the same message again; refuses who is not asked, and another message than before."""
    if member not in frozenset(asked) - current.lost:
        raise DeniedError(f"{member[:80]!r} is not asked at stage {current.stage}")
    if member in came and came[member] != message:
        raise ConflictError(f"{member} has answered this stage before with something else")
    return member in came


def _settled(current: SecureRound) -> Outcome:
    """Close the stage when there is nobody to wait for."""
    return (current, ()) if current.awaited() else _closed(current)


def _closed(current: SecureRound) -> Outcome:
    return _CLOSING[current.stage](current)


def _close_advertise(current: SecureRound) -> Outcome:
    group = _with_enough_neighbours(current, current.keys.keys() - current.lost)
    keys = {name: current.keys[name] for name in sorted(group)}
    after = replace(current, stage=Stage.SHARE, keys=keys)
    notices = {
        name: NeighbourKeys(
            tuple(keys[other] for other in sorted((current.parameters.neighbours_of(name) & group) | {name}))
        )
        for name in keys
    }
    return _go_on(after, notices, "advertised their keys")


def _close_share(current: SecureRound) -> Outcome:
    group = _with_enough_neighbours(current, current.shared.keys() - current.lost)
    shared = {name: current.shared[name] for name in sorted(group)}
    sealed = {(owner, to): data for owner, bundle in shared.items() for to, data in bundle.sealed}
    notices = {
        name: Deliveries(
            tuple((o, sealed[o, name]) for o in sorted(current.parameters.neighbours_of(name) & group))
        )
        for name in shared
    }
    return _go_on(replace(current, stage=Stage.MASK, shared=shared), notices, "shared their keys")


def _close_mask(current: SecureRound) -> Outcome:
    survivors = Survivors(tuple(sorted(current.masked)))
    after = replace(current, stage=Stage.CONFIRM)
    return _go_on(after, dict.fromkeys(survivors.members, survivors), "sent their input")


def _close_confirm(current: SecureRound) -> Outcome:
    parameters, confirmed = current.parameters, current.confirmed
    survivors, dropped = tuple(sorted(current.masked)), tuple(sorted(current.dropped))
    able = {
        name: sorted(parameters.neighbours_of(name) & confirmed.keys())
        for name in sorted(confirmed.keys() - current.lost)
    }
    notices = {
        name: UnmaskRequest(survivors, dropped, tuple(confirmed[other] for other in others))
        for name, others in able.items()
        if len(others) >= parameters.threshold
    }
    asked = {name: confirmed[name] for name in notices}
    return _go_on(replace(current, stage=Stage.UNMASK, confirmed=asked), notices, "confirmed the survivors")


def _close_unmask(current: SecureRound) -> Outcome:
    short = _short_of_shares(current, frozenset(current.revealed))
    if short:
        return _fail(current, f"too few neighbours of {short} revealed their shares")
    return replace(current, stage=Stage.COMPLETE), (StartUnmasking(),)


def _go_on(after: SecureRound, notices: Mapping[str, Notice], what: str) -> Outcome:
    """Enter the next stage, unless those who are left cannot finish."""
    threshold = after.parameters.threshold
    if len(notices) < threshold + 1:  # a member, and the threshold of neighbours that hold its shares
        return _fail(after, f"{len(notices)} members {what}, at least {threshold + 1} are needed")
    short = _short_of_shares(after, frozenset(notices))
    if short and after.stage in (Stage.CONFIRM, Stage.UNMASK):
        return _fail(after, f"too few neighbours of {short} are left to rebuild its secret")
    return after, (SendNotices(notices),)


def _short_of_shares(current: SecureRound, holders: frozenset[str]) -> str:
    """A member one of whose secrets these holders cannot rebuild; empty when there is none."""
    parameters = current.parameters
    for member in sorted(current.shared):
        neighbours = parameters.neighbours_of(member)
        needed = member in current.masked or bool(neighbours & current.masked)
        if needed and len(neighbours & holders) < parameters.threshold:
            return member
    return ""


def _with_enough_neighbours(current: SecureRound, group: Iterable[str]) -> frozenset[str]:
    """The largest part of a group in which each has the threshold of neighbours; nobody has masked anything yet."""
    left = frozenset(group)
    while True:
        able = frozenset(
            name
            for name in left
            if len(current.parameters.neighbours_of(name) & left) >= current.parameters.threshold
        )
        if able == left:
            return left
        left = able


def _fail(current: SecureRound, reason: str) -> Outcome:
    return replace(current, stage=Stage.FAILED, reason=reason), (Failed(reason),)


Rule = Callable[[SecureRound, Any], Outcome]
_S = Stage
_CLOSING: Final[Mapping[Stage, Callable[[SecureRound], Outcome]]] = {
    _S.ADVERTISE: _close_advertise,
    _S.SHARE: _close_share,
    _S.MASK: _close_mask,
    _S.CONFIRM: _close_confirm,
    _S.UNMASK: _close_unmask,
}
_NEXT: Final[Mapping[Stage, tuple[type[Any], Rule, Stage]]] = {
    _S.ADVERTISE: (Advertisement, _advertise, _S.SHARE),
    _S.SHARE: (SealedShares, _share, _S.MASK),
    _S.MASK: (InputMasked, _mask, _S.CONFIRM),
    _S.CONFIRM: (Confirmation, _confirm, _S.UNMASK),
    _S.UNMASK: (Revealed, _reveal, _S.COMPLETE),
}


def _ignore(current: SecureRound, _: Event) -> Outcome:
    return current, ()


TABLE: Final[Mapping[tuple[Stage, type[Any]], tuple[Rule, frozenset[Stage]]]] = {
    **{(s, kind): (rule, frozenset({s, then, _S.FAILED})) for s, (kind, rule, then) in _NEXT.items()},
    **{(s, MemberLost): (_lose, frozenset({s, then, _S.FAILED})) for s, (_, _, then) in _NEXT.items()},
    **{(s, StageClosed): (_deadline, frozenset({s, then, _S.FAILED})) for s, (_, _, then) in _NEXT.items()},
    **{(s, kind): (_ignore, frozenset({s})) for s in sorted(FINAL) for kind in (MemberLost, StageClosed)},
}
"""(stage, event) -> what happens, and the stages that may follow. A message of another stage is refused."""
