"""`GET /`, `GET /items`, `POST /explain`: a page that shows why somebody is recommended what."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from typing import Annotated, Any

import polars as pl
from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

from recllm.eventlog.ids import FIRST_ID
from recllm.serving.explain import Change, Explanation, explain
from recllm.serving.finding import FoundItem, find_items
from recllm.serving.recommender import Recommender
from recllm.serving.server.event_routes import read_stored
from recllm.serving.server.messages import Event, Id, Message, OneUser, Second
from recllm.serving.server.refusals import Refusal, as_json
from recllm.serving.server.routes import FAILURES
from recllm.serving.server.service import Service, service_of

public = APIRouter()
"""The page itself, which needs no API key: nothing of the bundle is in it."""
router = APIRouter()
Asks = Annotated[Service, Depends(service_of)]

FOUND = 20
"""Items that a search gives at most."""
KNOWN_USERS = 20
"""Users that the page names for a beginning."""

HEADERS = {
    # Everything comes from here, nothing is run that is not a file of the page, and no other page shows it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class ChangeRequest(Message):
    """One event more or less."""

    remove: Annotated[StrictInt, Field(ge=0, lt=2**31)] | None = Field(
        None, description="place of the event in the whole history, from 0, the oldest"
    )
    add: Event | None = None

    @model_validator(mode="after")
    def _check_one(self) -> ChangeRequest:
        if (self.remove is None) == (self.add is None):
            raise ValueError("wanted either remove or add")
        return self


class ExplainRequest(Message):
    """Who is asked about, and which event is removed or added."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        json_schema_extra={"examples": [{"user": 1, "k": 10, "change": {"add": {"item": 5, "rating": 4}}}]},
    )

    user: Id | None = Field(None, description="null: nobody that the log knows")
    history: list[Event] = Field([], description="events, which join those that the log knows of the user")
    time: Second | None = Field(None, description="as of when; none: after everything")
    removed: list[Annotated[StrictInt, Field(ge=0, lt=2**31)]] = Field(
        [], description="places of events that are left out from the start"
    )
    change: ChangeRequest | None = Field(None, description="what the answer is after, and compared with")
    k: int = Field(10, ge=1, strict=True, description="items of a list")
    target: Id | None = Field(
        None, description="the item that retrieval is about; none: the first of the list"
    )


class ExplainAnswer(BaseModel):
    """Why somebody is recommended what."""

    bundle: str
    explanation: Explanation


class Start(BaseModel):
    """What the page begins with."""

    bundle: str
    dataset: str
    cascade: str
    steps: list[str]
    users: list[Id] = Field(description="some that the log knows")
    ratings: list[float] = Field(description="ratings that events may have; none: they are liked or not")
    max_k: int


class FoundItems(BaseModel):
    """Items of a search."""

    items: list[FoundItem]


@public.get("/", response_class=Response, responses={200: {"content": {"text/html": {}}}})
async def page() -> Response:
    """The page, for a browser."""
    return _file("index.html", "text/html")


@public.get("/page/page.js", response_class=Response, include_in_schema=False)
async def script() -> Response:
    """What the page does."""
    return _file("page.js", "text/javascript")


@public.get("/page/page.css", response_class=Response, include_in_schema=False)
async def style() -> Response:
    """How the page looks."""
    return _file("page.css", "text/css")


@router.get("/page/start", response_model=Start, responses={401: FAILURES[401], 503: FAILURES[503]})
async def start(service: Asks) -> Response:
    """What the page begins with: some users, and which ratings there are."""
    served = service.current
    recommender = served.recommender
    users = recommender.maker.users.by_dense_id[FIRST_ID : FIRST_ID + KNOWN_USERS]
    return as_json(
        {
            "bundle": served.bundle,
            "dataset": recommender.dataset,
            "cascade": recommender.name,
            "steps": recommender.cascade.names,
            "users": users.to_list(),
            "ratings": [float(level) for level in recommender.log.meta["rating_levels"]],
            "max_k": service.settings.max_k,
        }
    )


@router.get(
    "/items",
    response_model=FoundItems,
    responses={status: FAILURES[status] for status in (401, 422, 503)},
)
async def items(
    service: Asks,
    query: Annotated[str, Query(max_length=200, description="words of a title, or an id; empty: all")] = "",
) -> Response:
    """Items whose title has every word, those with the most events first."""
    found = await asyncio.to_thread(find_items, service.current.recommender, query, FOUND)
    return as_json({"items": [asdict(item) for item in found]})


@router.post("/explain", response_model=ExplainAnswer, responses=FAILURES)
async def explain_user(request: ExplainRequest, service: Asks) -> Response:
    """What is known of a user, the list after each step, and what one event changes.

    Events that the service has stored of the user are part of the history, as in every list.
    """
    served = service.current
    settings = service.settings
    for name, got, most in (
        ("history", len(request.history), settings.max_history),
        ("removed", len(request.removed), settings.max_history),
        ("k", request.k, settings.max_k),
    ):
        if got > most:
            raise Refusal(422, f"{name}: {got:,} are asked for; wanted at most {most:,}")
    history: Sequence[Event] = request.history
    if request.user is not None:
        user = OneUser.model_construct(user=request.user, history=request.history, time=request.time)
        history = (await read_stored(service, served, [user])).join(user)
    change = None
    if request.change is not None:
        add = None if request.change.add is None else _table([request.change.add])
        change = Change(request.change.remove, add)

    def work(recommender: Recommender) -> Explanation | ValueError:
        try:
            return explain(
                recommender,
                None if request.user is None else str(request.user),
                _table(history),
                time=None if request.time is None else int(request.time),
                removed=request.removed,
                change=change,
                k=request.k,
                target=None if request.target is None else str(request.target),
                most=settings.max_history,
            )
        except ValueError as error:
            return error

    explanation = await service.batcher.call(served, work)
    if isinstance(explanation, ValueError):
        raise Refusal(422, " ".join(str(explanation).split()))
    return as_json({"bundle": served.bundle, "explanation": asdict(explanation)})


def _table(events: Sequence[Event]) -> pl.DataFrame:
    """Events of a request as the recommender takes them."""
    schema = {"item": pl.String, "rating": pl.Float64, "label": pl.Int8, "timestamp": pl.Int64}
    lines = [
        {"item": str(event.item), "rating": event.rating, "label": event.label, "timestamp": event.timestamp}
        for event in events
    ]
    return pl.DataFrame(lines, schema=schema)


def _file(name: str, kind: str) -> Response:
    """A file of the page."""
    content: Any = resources.files("recllm.serving.server").joinpath("page", name).read_bytes()
    return Response(content, media_type=kind, headers=HEADERS)
