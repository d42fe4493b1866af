"""A secure round on the service: repeated answers, deadlines, devices left out, and the sum or why there is none."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from secure_rounds import GROUP, SEVEN, parameters, plain_mean, updates
from virtual_clock import in_virtual_time
from wearfleet_cloud.service.secure_room import SecureRoom
from wearfleet_protos.errors import AggregationError, ConflictError, DeniedError, IntegrityError
from wearfleet_protos.secagg.codec import answer_from_pb, fill_answer, notice_from_pb, notice_to_pb
from wearfleet_protos.secagg.messages import Answer, Deliveries, NeighbourKeys, Survivors, UnmaskRequest
from wearfleet_protos.v1 import secagg_pb2

CHOSEN = parameters(7, 5)
UPDATES = updates(SEVEN, 5)
STAGE_S, PATIENCE_S = 30.0, 300.0


class Table:
    """A room and seven devices, whose messages go through their wire form."""

    def __init__(self) -> None:
        self.out: list[tuple[frozenset[str], str]] = []
        self.room = SecureRoom(CHOSEN, GROUP.verifier, STAGE_S, lambda who, why: self.out.append((who, why)))
        self.clients = GROUP.clients(CHOSEN)
        self.inputs: dict[str, Any] = {}
        self.sent: dict[str, list[Answer]] = {name: [] for name in SEVEN}

    async def ask(self, name: str, answer: Answer | None, wait_s: float = PATIENCE_S) -> Any:
        request = secagg_pb2.SecureRequest()
        if answer is not None:
            self.sent[name].append(answer)
            fill_answer(request, answer)
        notice = await self.room.exchange(name, answer_from_pb(request, name), wait_s)
        return notice_from_pb(secagg_pb2.SecureResponse.FromString(notice_to_pb(notice).SerializeToString()))

    async def share(self, name: str) -> None:
        """Stages 0 to 2 of a device."""
        client = self.clients[name]
        keys = await self.ask(name, client.advertise())
        assert isinstance(keys, NeighbourKeys)
        deliveries = await self.ask(name, client.share_keys(keys))
        assert isinstance(deliveries, Deliveries)
        self.inputs[name] = client.mask(deliveries, *UPDATES[name])

    async def unmask(self, name: str) -> None:
        """Stages 3 and 4 of a device."""
        survivors = await self.ask(name, None)
        assert isinstance(survivors, Survivors)
        request = await self.ask(name, self.clients[name].confirm(survivors))
        assert isinstance(request, UnmaskRequest)
        assert await self.ask(name, self.clients[name].reveal(request)) is None


async def all_of(names: tuple[str, ...], work: Any) -> None:
    await asyncio.gather(*(work(name) for name in names))


def check(total: Any, members: tuple[str, ...]) -> None:
    assert total.members == members
    assert np.abs(total.mean - plain_mean(UPDATES, members, CHOSEN)).max() < 2 * CHOSEN.clip / CHOSEN.levels


@in_virtual_time
async def test_a_round_gives_the_mean_and_answers_may_be_repeated_at_any_time() -> None:
    table = Table()
    await all_of(SEVEN, table.share)
    first = table.sent[SEVEN[0]]
    assert isinstance(
        await table.ask(SEVEN[0], first[0]), NeighbourKeys
    )  # the reply was lost, its stage is over
    assert isinstance(await table.ask(SEVEN[0], first[1]), Deliveries)
    total = asyncio.ensure_future(table.room.total(table.inputs))
    await all_of(SEVEN, table.unmask)
    check(await total, SEVEN)
    assert await table.ask(SEVEN[0], table.sent[SEVEN[0]][-1]) is None
    assert table.out == []


@in_virtual_time
async def test_devices_that_come_too_late_are_left_out_at_the_deadline_and_told_so() -> None:
    table = Table()
    await all_of(SEVEN[:6], table.share)
    assert table.out == [(frozenset(SEVEN[6:]), "secure aggregation: it did not share its keys in time")]
    with pytest.raises(ConflictError):
        await table.ask(SEVEN[6], table.clients[SEVEN[6]].advertise())
    assert table.room.fault_of(SEVEN[6])
    assert not table.room.fault_of(SEVEN[0])
    total = asyncio.ensure_future(table.room.total(table.inputs))
    await all_of(SEVEN[:6], table.unmask)
    check(await total, SEVEN[:6])


@in_virtual_time
async def test_a_device_lost_after_it_shared_its_keys_is_not_in_the_sum() -> None:
    table = Table()
    await all_of(SEVEN, table.share)
    table.room.lose(SEVEN[6])
    table.room.lose(SEVEN[6])
    del table.inputs[SEVEN[6]]
    total = asyncio.ensure_future(table.room.total(table.inputs))
    await all_of(SEVEN[:6], table.unmask)
    check(await total, SEVEN[:6])
    with pytest.raises(ConflictError, match="is over for"):
        await table.ask(SEVEN[6], None)


@in_virtual_time
async def test_devices_that_vanish_before_they_reveal_cost_the_round_only_below_the_threshold() -> None:
    table = Table()
    await all_of(SEVEN, table.share)
    total = asyncio.ensure_future(table.room.total(table.inputs))
    await all_of(SEVEN[:5], table.unmask)
    check(await total, SEVEN)  # two are gone, five of seven confirm and reveal: each secret has four holders
    table = Table()
    await all_of(SEVEN, table.share)
    total = asyncio.ensure_future(table.room.total(table.inputs))
    for name in SEVEN[:4]:
        await table.ask(name, table.clients[name].confirm(await table.ask(name, None)), wait_s=0.0)
    with pytest.raises(AggregationError, match="secure aggregation"):
        await total


@in_virtual_time
async def test_too_few_at_the_first_deadline_leaves_everybody_out() -> None:
    table = Table()
    waiting = asyncio.gather(*(table.share(name) for name in SEVEN[:3]), return_exceptions=True)
    assert all(isinstance(error, ConflictError) for error in await waiting)
    ((who, why),) = table.out
    assert who == frozenset(SEVEN)
    assert "advertised" in why
    with pytest.raises(AggregationError):
        await table.room.total({})


@in_virtual_time
async def test_nobody_waits_longer_than_it_asked_for_and_others_go_on() -> None:
    table = Table()
    assert await table.ask(SEVEN[0], table.clients[SEVEN[0]].advertise(), wait_s=0.05) is None
    await all_of(SEVEN[1:], lambda name: table.ask(name, table.clients[name].advertise(), wait_s=0.0))
    assert isinstance(await table.ask(SEVEN[0], table.sent[SEVEN[0]][0]), NeighbourKeys)


@in_virtual_time
async def test_strangers_and_forged_answers_change_nothing() -> None:
    table = Table()
    with pytest.raises(DeniedError):
        await table.room.exchange("stranger", None, 0.0)
    from dataclasses import replace

    forged = replace(table.clients[SEVEN[0]].advertise(), signature=bytes(64))
    with pytest.raises(IntegrityError):
        await table.ask(SEVEN[0], forged)
    table.clients = GROUP.clients(CHOSEN)
    await all_of(SEVEN, table.share)


@in_virtual_time
async def test_a_closed_room_answers_at_once() -> None:
    table = Table()
    waiting = asyncio.ensure_future(table.ask(SEVEN[0], table.clients[SEVEN[0]].advertise()))
    await asyncio.sleep(0.01)
    table.room.close()
    with pytest.raises(ConflictError, match="over"):
        await asyncio.wait_for(waiting, 5)
