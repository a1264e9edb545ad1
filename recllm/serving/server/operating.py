"""`GET /health`, `GET /metrics`, `POST /admin/reload`: what those ask who run the service."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from recllm.serving.server.messages import Failure, Health, Reloaded
from recllm.serving.server.refusals import Refusal, as_json
from recllm.serving.server.service import Service, service_of

public = APIRouter()
"""Needs no API key."""
router = APIRouter()
Asks = Annotated[Service, Depends(service_of)]

REFUSED: dict[int | str, dict[str, Any]] = {
    401: {"model": Failure, "description": "the API key is missing or another"},
    403: {"model": Failure, "description": "no API key is set"},
    409: {"model": Failure, "description": "a bundle is being loaded already"},
    422: {"model": Failure, "description": "the bundle is refused"},
}


@public.get("/health", response_model=Health, responses={503: {"model": Health, "description": "not ready"}})
async def health(service: Asks) -> Response:
    """Status 200 once a model has answered, until the service is told to stop."""
    return as_json({"status": service.status}, 200 if service.status == "ready" else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: Asks) -> Response:
    """What Prometheus reads."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.post("/admin/reload", response_model=Reloaded, responses=REFUSED)
async def reload(service: Asks) -> Response:
    """Load the bundle's folder anew beside what answers now, let it answer once, and switch."""
    if not service.has_key:
        raise Refusal(403, "no API key is set, so that nobody may reload; set one, or send SIGHUP")
    before, served = await service.reload()
    return as_json({"before": before, "bundle": served.bundle})
