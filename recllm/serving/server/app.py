"""The application: which routes there are, and what every request passes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from recllm import __version__
from recllm.serving.server import event_routes, operating, page_routes, routes
from recllm.serving.server.gate import Gate
from recllm.serving.server.limits import write_limits
from recllm.serving.server.refusals import add_refusals
from recllm.serving.server.service import Service

_bearer = HTTPBearer(auto_error=False, description="the API key, where one is set")


async def check_key(
    request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> None:
    """Refuse who does not bring the API key."""
    service: Service = request.app.state.service
    service.check_key(None if given is None else given.credentials)


def create_app(service: Service) -> FastAPI:
    """The application of a service, which starts and ends with it.

    Args:
        service: is found by routes as `app.state.service`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="recllm",
        version=__version__,
        description="Recommendations and scores from a bundle, by retriever, CRM and language model.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts of another host
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    add_refusals(app)
    # Without an API key: whether it is ready, and the page, which asks for the key.
    app.include_router(operating.public)
    app.include_router(page_routes.public)
    # With it, where one is set: everything that answers.
    locks = [Depends(check_key)] if service.has_key else []
    for router in (routes.router, event_routes.router, operating.router, page_routes.router):
        app.include_router(router, dependencies=locks)
    app.add_middleware(Gate, service=service)
    write_limits(app.openapi(), service.settings)  # it is made once, and kept
    return app
