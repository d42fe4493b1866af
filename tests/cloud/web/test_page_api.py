"""The JSON interface, over a real application."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI
from wearfleet_cloud.service.live import LiveState, RibbonCell, RoundView
from wearfleet_cloud.service.web.api import api_router


@pytest.fixture
def live() -> LiveState:
    state = LiveState("simulator", simulated=True)
    state.on_prediction("d1", "Amina", RibbonCell(0, 5, 1, 0.75, 0.5, True), 3, ("walking", "sitting"))
    return state


@pytest.fixture
async def client(live: LiveState) -> httpx.AsyncClient:
    app = FastAPI()
    app.include_router(api_router(live))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as session:
        yield session


async def test_the_fleet_is_the_snapshot_and_says_that_it_is_simulated(
    client: httpx.AsyncClient, live: LiveState
) -> None:
    body = (await client.get("/api/v1/fleet")).json()
    assert body["fleet"]["simulated"] is True
    assert body["version"] == live.version
    assert body["devices"][0]["ribbon"] == [[0, 0, 0, 1, 0.75, 0.5, 1]]


async def test_a_reader_may_wait_for_the_next_change(client: httpx.AsyncClient, live: LiveState) -> None:
    waiting = asyncio.create_task(client.get("/api/v1/fleet", params={"after": live.version, "wait_s": 20}))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    live.on_status("d2", True, 1)
    body = (await asyncio.wait_for(waiting, 5)).json()
    assert [row["id"] for row in body["devices"]] == ["d2"]


async def test_waiting_in_vain_ends_with_an_empty_delta(client: httpx.AsyncClient, live: LiveState) -> None:
    body = (await client.get("/api/v1/fleet", params={"after": live.version, "wait_s": 0.05})).json()
    assert (body["version"], body["devices"]) == (live.version, [])


@pytest.mark.parametrize("query", ["after=-1", "after=x", "after=0&wait_s=900"])
async def test_a_senseless_query_is_refused(client: httpx.AsyncClient, query: str) -> None:
    assert (await client.get(f"/api/v1/fleet?{query}")).status_code == 422


async def test_rounds_are_null_until_there_is_one(client: httpx.AsyncClient, live: LiveState) -> None:
    assert (await client.get("/api/v1/rounds")).json() == {"round": None}
    live.on_round(RoundView("r", "FedBN", 2, 5, "collecting"))
    assert (await client.get("/api/v1/rounds")).json()["round"]["number"] == 2


async def test_one_device_or_a_typed_error(client: httpx.AsyncClient) -> None:
    assert (await client.get("/api/v1/devices/d1")).json()["activity"] == "sitting"
    missing = await client.get("/api/v1/devices/d7")
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "not_found"
    assert "d7" in missing.json()["error"]["message"]
