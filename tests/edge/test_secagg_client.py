"""What a member refuses of a malicious service, one by one; each refusal ends the round for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from secure_rounds import GROUP, SEVEN, VICTIM, Conversation, Group, at, parameters
from wearfleet_cloud.federated.privacy.secagg_server import Stage
from wearfleet_edge.secagg_client import SecureClient
from wearfleet_protos.errors import DeniedError, IntegrityError, ProtocolError, WearfleetError
from wearfleet_protos.secagg.messages import (
    Confirmation,
    Deliveries,
    NeighbourKeys,
    Survivors,
    UnmaskRequest,
)


def refused(client: SecureClient, error: type[WearfleetError], match: str, call: Any) -> None:
    """The call is refused, and with it everything that is asked of this member later."""
    with pytest.raises(error, match=match):
        call()
    assert client.ended
    with pytest.raises(ProtocolError):
        client.confirm(Survivors(SEVEN))


def test_a_member_joins_no_cohort_below_its_minimum_and_no_other_round() -> None:
    with pytest.raises(DeniedError, match="secure_minimum_cohort"):
        GROUP.clients(parameters(7, 6), minimum_cohort=8)
    for chosen in (parameters(7, 6, round=2), parameters(7, 6, run_id="another")):
        with pytest.raises(ProtocolError, match="the task is run/1"):
            SecureClient(GROUP.member(VICTIM), chosen, "run", 1)
    with pytest.raises(ProtocolError, match="no member"):
        SecureClient(replace(GROUP.member(VICTIM), name="stranger"), parameters(7, 6), "run", 1)


def changed_keys(keys: NeighbourKeys, index: int, **changes: Any) -> NeighbourKeys:
    rows = list(keys.advertisements)
    rows[index] = replace(rows[index], **changes)
    return NeighbourKeys(tuple(rows))


def test_a_member_refuses_wrong_keys_one_by_one() -> None:
    table, _ = at(Stage.SHARE)
    other = table.notices[SEVEN[1]].advertisements
    stranger = Group.of(("stranger",)).signers["stranger"]
    cases = {
        "own keys": lambda keys: NeighbourKeys(keys.advertisements[1:]),
        "missing or changed": lambda keys: changed_keys(keys, 0, mask_key=bytes(range(32))),
        "a member twice": lambda keys: NeighbourKeys((*keys.advertisements, keys.advertisements[1])),
        "one who is no neighbour": lambda keys: NeighbourKeys(
            (*keys.advertisements, replace(other[1], member="stranger"))
        ),
        "3 neighbours are there": lambda keys: NeighbourKeys(keys.advertisements[:4]),
        "the same key": lambda keys: changed_keys(keys, 2, mask_key=keys.advertisements[1].mask_key),
    }
    for match, change in cases.items():
        table, client = at(Stage.SHARE)
        keys = change(table.notices[VICTIM])
        refused(client, ProtocolError, match, lambda client=client, keys=keys: client.share_keys(keys))
    for changes in (
        {"signature": bytes(64)},
        {"channel_key": bytes(range(32))},
        {"credential": stranger.credential},
    ):
        table, client = at(Stage.SHARE)
        keys = changed_keys(table.notices[VICTIM], 1, **changes)
        refused(client, IntegrityError, SEVEN[1], lambda client=client, keys=keys: client.share_keys(keys))


def test_a_member_refuses_keys_that_were_signed_for_another_round() -> None:
    """Replay: the service shows a neighbour's true keys of the round before."""
    old = Conversation(parameters(7, 6), GROUP)
    old.play(Stage.SHARE)
    new = Conversation(parameters(7, 6, round=2), GROUP)
    new.play(Stage.SHARE)
    replayed = old.notices[VICTIM].advertisements[3]
    rows = list(new.notices[VICTIM].advertisements)
    rows[3] = replayed
    client = new.clients[VICTIM]
    refused(client, IntegrityError, replayed.member, lambda: client.share_keys(NeighbourKeys(tuple(rows))))


def test_a_member_refuses_shares_of_strangers_or_of_too_few() -> None:
    for match, change in {
        "twice": lambda sealed: (*sealed, sealed[0]),
        "no neighbour": lambda sealed: (*sealed, ("stranger", b"")),
        "3 neighbours shared": lambda sealed: sealed[:3],
    }.items():
        table, client = at(Stage.MASK)
        deliveries = Deliveries(change(table.notices[VICTIM].sealed))
        refused(
            client, ProtocolError, match,
            lambda client=client, deliveries=deliveries: client.mask(deliveries, np.zeros(6), 1),
        )  # fmt: skip


def test_a_member_confirms_no_survivors_that_cannot_be() -> None:
    for match, members in {
        "different names in order": tuple(reversed(SEVEN)),
        "this member among them": SEVEN[1:],
        "no members": (*SEVEN, "stranger"),
        "at least 4": SEVEN[:3],
    }.items():
        _, client = at(Stage.CONFIRM)
        refused(
            client,
            ProtocolError,
            match,
            lambda client=client, members=members: client.confirm(Survivors(members)),
        )
    _, client = at(Stage.CONFIRM, without=(SEVEN[6],))
    refused(client, ProtocolError, "never shared", lambda: client.confirm(Survivors(SEVEN)))
    _, client = at(Stage.CONFIRM, minimum_cohort=6)
    refused(client, DeniedError, "5 members", lambda: client.confirm(Survivors(SEVEN[:5])))


def test_a_member_signs_no_second_set_of_survivors() -> None:
    _, client = at(Stage.CONFIRM)
    client.confirm(Survivors(SEVEN))
    refused(client, ProtocolError, "once", lambda: client.confirm(Survivors(SEVEN[:6])))


def test_a_member_reveals_nothing_for_sets_that_overlap_or_were_not_confirmed() -> None:
    cases: dict[str, dict[str, Any]] = {
        "overlap": {"dropped": (SEVEN[3],)},
        "not those that": {"survivors": SEVEN[:6], "dropped": (SEVEN[6],)},
        "no members": {"dropped": ("stranger",)},
        "3 neighbours confirmed": {"confirmations": 3},
    }
    for match, changes in cases.items():
        table, client = at(Stage.UNMASK)
        request = table.notices[VICTIM]
        few = {"confirmations": request.confirmations[:3]}
        wrong = replace(request, **(few if "confirmations" in changes else changes))
        refused(client, ProtocolError, match, lambda client=client, wrong=wrong: client.reveal(wrong))


def test_a_member_counts_no_confirmation_twice_of_itself_or_of_the_dropped() -> None:
    table, client = at(Stage.UNMASK)
    request = table.notices[VICTIM]
    three, one = request.confirmations[:3], request.confirmations[0]
    own = Confirmation(
        VICTIM, GROUP.signers[VICTIM].sign(Survivors(SEVEN).signed_part(table.chosen.binding()))
    )
    wrong = replace(request, confirmations=(*three, one, own))
    refused(client, ProtocolError, "3 neighbours confirmed", lambda: client.reveal(wrong))


def test_a_member_reveals_nothing_when_a_confirmation_is_of_other_survivors() -> None:
    table, client = at(Stage.UNMASK)
    request = table.notices[VICTIM]
    other = Survivors(SEVEN[:6]).signed_part(table.chosen.binding())
    forged = Confirmation(SEVEN[1], GROUP.signers[SEVEN[1]].sign(other))
    wrong = replace(request, confirmations=(forged, *request.confirmations[1:]))
    refused(client, IntegrityError, SEVEN[1], lambda: client.reveal(wrong))


def test_a_member_answers_one_partition_only() -> None:
    """The attack that unmasks one input: shares of a survivor's seed first, of its mask key then."""
    table, client = at(Stage.UNMASK)
    request = table.notices[VICTIM]
    revealed = client.reveal(request)
    assert dict(revealed.seed_shares).keys() == set(SEVEN) - {VICTIM}
    assert revealed.key_shares == ()
    second = UnmaskRequest(SEVEN[:6], (SEVEN[6],), request.confirmations)
    refused(client, ProtocolError, "once", lambda: client.reveal(second))


def test_stages_out_of_order_are_refused() -> None:
    client = Conversation(parameters(7, 6), GROUP).clients[VICTIM]
    refused(client, ProtocolError, "once, in order", lambda: client.confirm(Survivors(SEVEN)))
    client = Conversation(parameters(7, 6), GROUP).clients[VICTIM]
    client.advertise()
    refused(client, ProtocolError, "once", client.advertise)
