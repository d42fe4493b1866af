"""The picture of the fleet as JSON, beside the page."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse
from wearfleet_protos.errors import NotFoundError

if TYPE_CHECKING:
    from wearfleet_cloud.service.fleet_view import Json
    from wearfleet_cloud.service.live import LiveState

__all__ = ["api_router"]

_MAX_WAIT_S = 30.0


def api_router(live: LiveState) -> APIRouter:
    """Routes under ``/api/v1`` that read one picture.

    * ``GET /api/v1/fleet``: everything; with ``after=V`` it waits until the version exceeds V, at most ``wait_s``
      seconds, and gives what changed after V.
    * ``GET /api/v1/rounds``: ``{"round": ...}``, null when nothing is federated.
    * ``GET /api/v1/devices/{id}``: one device, or 404 with ``{"error": {"type", "message"}}``.

    Args:
        live: the picture.

    Returns:
        A router to include in the service's application.
    """
    router = APIRouter(prefix="/api/v1", tags=["fleet"])

    async def fleet(
        after: Annotated[int | None, Query(ge=0)] = None,
        wait_s: Annotated[float, Query(ge=0.0, le=_MAX_WAIT_S)] = 0.0,
    ) -> JSONResponse:
        if after is None:
            return JSONResponse(live.snapshot())
        await _wait_for_change(live, after, wait_s)
        return JSONResponse(live.delta(after))

    async def rounds() -> JSONResponse:
        return JSONResponse({"round": live.round_json()})

    async def device(device_id: str) -> JSONResponse:
        try:
            return JSONResponse(live.device_json(device_id))
        except NotFoundError as error:
            return JSONResponse(_error("not_found", str(error)), status_code=404)

    router.get("/fleet", response_model=None)(fleet)
    router.get("/rounds", response_model=None)(rounds)
    router.get("/devices/{device_id}", response_model=None)(device)
    return router


async def _wait_for_change(live: LiveState, after: int, wait_s: float) -> None:
    try:
        await asyncio.wait_for(live.changed(after), wait_s)
    except TimeoutError:
        return


def _error(kind: str, message: str) -> Json:
    return {"error": {"type": kind, "message": message}}
