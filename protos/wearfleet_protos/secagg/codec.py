"""Messages of secure aggregation from and to protobuf."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from wearfleet_protos.errors import ProtocolError
from wearfleet_protos.secagg.messages import (
    Advertisement,
    Answer,
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
from wearfleet_protos.v1 import secagg_pb2 as pb

if TYPE_CHECKING:
    from wearfleet_protos.secagg.messages import Named

__all__ = [
    "answer_from_pb",
    "fill_answer",
    "notice_from_pb",
    "notice_to_pb",
    "setup_from_pb",
    "setup_to_pb",
]

_MOST_SHARE_BYTES = 256


def setup_to_pb(parameters: SecureParameters) -> pb.SecureSetup:
    """The message of a round's parameters; run and round travel in the task."""
    return pb.SecureSetup(
        members=parameters.members,
        neighbours=parameters.neighbours,
        threshold=parameters.threshold,
        clip=parameters.clip,
        levels=parameters.levels,
        weight_levels=parameters.weight_levels,
        max_examples=parameters.max_examples,
        size=parameters.size,
        graph_seed=parameters.graph_seed,
    )


def setup_from_pb(message: pb.SecureSetup, run_id: str, round_number: int) -> SecureParameters:
    """Inverse of :func:`setup_to_pb`.

    Raises:
        ProtocolError: a value is out of range.
    """
    return SecureParameters(
        run_id=run_id,
        round=round_number,
        members=tuple(message.members),
        neighbours=message.neighbours,
        threshold=message.threshold,
        clip=message.clip,
        levels=message.levels,
        weight_levels=message.weight_levels,
        max_examples=message.max_examples,
        size=message.size,
        graph_seed=message.graph_seed,
    )


def fill_answer(message: pb.SecureRequest, answer: Answer) -> None:
    """Write a member's answer into its request; whose it is says the connection."""
    match answer:
        case Advertisement():
            message.advertisement.CopyFrom(_advertisement_to_pb(answer))
        case SealedShares():
            shares = pb.SecureShares(
                seed_commitment=answer.seed_commitment, sealed=_named_to_pb(answer.sealed)
            )
            message.shares.CopyFrom(shares)
        case Confirmation():
            message.confirmation.CopyFrom(pb.SecureConfirmation(signature=answer.signature))
        case Revealed():
            revealed = pb.SecureRevealed(
                seed_shares=_named_to_pb(answer.seed_shares), key_shares=_named_to_pb(answer.key_shares)
            )
            message.revealed.CopyFrom(revealed)


def answer_from_pb(message: pb.SecureRequest, member: str) -> Answer | None:
    """A member's answer; None when it has none and only asks what follows.

    Args:
        message: as it came.
        member: whose connection it came on.

    Raises:
        ProtocolError: it is malformed, or names somebody else.
    """
    match message.WhichOneof("answer"):
        case "advertisement":
            if message.advertisement.member != member:
                raise ProtocolError(
                    f"{member} shows keys in the name of {message.advertisement.member[:80]!r}"
                )
            return _advertisement_from_pb(message.advertisement)
        case "shares":
            return SealedShares(member, message.shares.seed_commitment, _named_from_pb(message.shares.sealed))
        case "confirmation":
            return Confirmation(member, message.confirmation.signature)
        case "revealed":
            revealed = message.revealed
            return Revealed(member, _named_from_pb(revealed.seed_shares), _named_from_pb(revealed.key_shares))
        case _:
            return None


def notice_to_pb(notice: Notice | None) -> pb.SecureResponse:
    """The response that holds what follows a stage; an empty one for None."""
    match notice:
        case NeighbourKeys():
            rows = [_advertisement_to_pb(row) for row in notice.advertisements]
            return pb.SecureResponse(keys=pb.SecureKeys(advertisements=rows))
        case Deliveries():
            return pb.SecureResponse(deliveries=pb.SecureDeliveries(sealed=_named_to_pb(notice.sealed)))
        case Survivors():
            return pb.SecureResponse(survivors=pb.SecureSurvivors(members=notice.members))
        case UnmaskRequest():
            signed = _named_to_pb((row.member, row.signature) for row in notice.confirmations)
            request = pb.SecureUnmaskRequest(
                survivors=notice.survivors, dropped=notice.dropped, confirmations=signed
            )
            return pb.SecureResponse(unmask=request)
        case None:
            return pb.SecureResponse()


def notice_from_pb(message: pb.SecureResponse) -> Notice | None:
    """Inverse of :func:`notice_to_pb`.

    Raises:
        ProtocolError: it is malformed.
    """
    match message.WhichOneof("notice"):
        case "keys":
            return NeighbourKeys(tuple(_advertisement_from_pb(row) for row in message.keys.advertisements))
        case "deliveries":
            return Deliveries(_named_from_pb(message.deliveries.sealed))
        case "survivors":
            return Survivors(tuple(message.survivors.members))
        case "unmask":
            rows = message.unmask
            confirmations = tuple(Confirmation(row.member, row.data) for row in rows.confirmations)
            return UnmaskRequest(tuple(rows.survivors), tuple(rows.dropped), confirmations)
        case _:
            return None


def _advertisement_to_pb(row: Advertisement) -> pb.SecureAdvertisement:
    return pb.SecureAdvertisement(
        member=row.member,
        mask_key=row.mask_key,
        channel_key=row.channel_key,
        credential=row.credential,
        signature=row.signature,
    )


def _advertisement_from_pb(row: pb.SecureAdvertisement) -> Advertisement:
    return Advertisement(row.member, row.mask_key, row.channel_key, row.credential, row.signature)


def _named_to_pb(rows: Iterable[tuple[str, bytes]]) -> list[pb.SecureBytes]:
    return [pb.SecureBytes(member=name, data=data) for name, data in rows]


def _named_from_pb(rows: Iterable[pb.SecureBytes]) -> Named:
    named = tuple((row.member, row.data) for row in rows)
    if any(len(data) > _MOST_SHARE_BYTES for _, data in named):
        raise ProtocolError(f"a share has more than {_MOST_SHARE_BYTES} bytes")
    return named
