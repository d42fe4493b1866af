"""Turns at the download of tensors: a few at a time, and nobody is held up by others for long."""

import asyncio

from wearfleet_cloud.service.work_stream import Turns


async def test_the_third_waits_until_one_of_two_is_done():
    turns, order = Turns(2, 60.0), []
    gates = [asyncio.Event() for _ in range(3)]

    async def take(number):
        async with turns:
            order.append(number)
            await gates[number].wait()

    tasks = [asyncio.create_task(take(number)) for number in range(3)]
    await asyncio.sleep(0.05)
    assert order == [0, 1]
    gates[1].set()
    await asyncio.wait_for(tasks[1], 10)
    await asyncio.sleep(0.05)
    assert order == [0, 1, 2]
    for gate in gates:
        gate.set()
    await asyncio.gather(*tasks)


async def test_who_waited_as_long_as_the_limit_goes_ahead_and_gives_back_no_turn_that_it_did_not_have():
    turns = Turns(1, 0.01)
    slow = asyncio.Event()

    async def hold():
        async with turns:
            await slow.wait()

    holder = asyncio.create_task(hold())
    await asyncio.sleep(0)
    for _ in range(3):
        async with turns:
            pass  # although the first one is not done
    assert turns._free.locked()
    slow.set()
    await holder
    assert not turns._free.locked()


async def test_who_is_cancelled_gives_the_turn_back():
    turns = Turns(1, 60.0)

    async def hold():
        async with turns:
            await asyncio.sleep(60)

    holder = asyncio.create_task(hold())
    await asyncio.sleep(0.01)
    holder.cancel()
    await asyncio.gather(holder, return_exceptions=True)
    assert not turns._free.locked()
