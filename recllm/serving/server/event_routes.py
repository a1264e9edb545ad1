"""`POST /events`, `GET /users/{user}/history`, and what other routes want of the event store."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Header, Query, Response
from sqlalchemy.exc import OperationalError

from recllm.eventlog.ids import FIRST_ID
from recllm.serving.server.events import EventStore, KeyConflict, Place, StoreUnavailable, UserEvent
from recllm.serving.server.histories import Stored, stored_events, whole_history
from recllm.serving.server.logs import tell
from recllm.serving.server.messages import EventsAnswer, EventsRequest, HistoryAnswer, OneUser, failures
from recllm.serving.server.refusals import Refusal, as_json
from recllm.serving.server.served import Served
from recllm.serving.server.service import Service, service_of

router = APIRouter()
Asks = Annotated[Service, Depends(service_of)]
FAILURES = failures(
    {
        400: "the body is no JSON",
        401: "the API key is missing or another",
        404: "this service stores no events",
        413: "the body is too large",
        422: "an event cannot be stored, or its key is that of another one; nothing is stored",
        503: "the event store does not answer; Retry-After says when to send the same again",
        504: "no answer within the deadline: send the same again",
    }
)
Value = TypeVar("Value")


@router.post("/events", response_model=EventsAnswer, responses=FAILURES)
async def append(
    request: EventsRequest,
    service: Asks,
    idempotency_key: Annotated[
        str | None,
        Header(min_length=1, max_length=150, description="key of the whole request, for events without one"),
    ] = None,
) -> Response:
    """Store what users did, each key once; answered when it is on disk, and read by the next request."""
    store = _store_of(service)
    if len(request.events) > service.settings.max_events:
        raise Refusal(
            422, f"events: {len(request.events):,} are sent; wanted at most {service.settings.max_events:,}"
        )
    try:
        events = []
        for place, event in enumerate(request.events):
            key = event.key
            if key is None:
                key = uuid.uuid4().hex if idempotency_key is None else f"{idempotency_key}#{place}"
            user, item = str(event.user), str(event.item)
            events.append(UserEvent(user, item, event.rating, event.label, event.timestamp, key))
        appended = await asyncio.wrap_future(store.submit(events))
    except StoreUnavailable as error:
        raise _failed(service, error) from None
    except (KeyConflict, ValueError) as error:
        service.metrics.events.labels("refused").inc(len(request.events))
        raise Refusal(422, str(error)) from None
    service.metrics.events.labels("stored").inc(appended.stored)
    service.metrics.events.labels("repeated").inc(appended.repeated)
    return as_json({"stored": appended.stored, "repeated": appended.repeated})


@router.get(
    "/users/{user:path}/history",
    response_model=HistoryAnswer,
    responses={status: FAILURES[status] for status in (401, 422, 503, 504)},
)
async def history(
    user: str, service: Asks, limit: Annotated[int, Query(ge=1, description="events, at most")] = 100
) -> Response:
    """The latest events of a user: those of the bundle's log, and those that were stored since."""
    most = service.settings.max_history
    if limit > most:
        raise Refusal(422, f"limit: {limit:,} are asked for; wanted at most {most:,}")
    served = service.current
    recommender = served.recommender
    events = await _read(service, lambda: whole_history(service.events, recommender, user, limit))
    is_known = int(recommender.maker.users.dense([user])[0]) >= FIRST_ID
    return as_json({"bundle": served.bundle, "user": user, "is_known": is_known, "events": events})


async def read_stored(service: Service, served: Served, users: Sequence[OneUser]) -> Stored:
    """What the store holds of the users of a request beyond the log of what answers it.

    Raises:
        Refusal: the store does not answer.
    """
    if service.events is None:
        return Stored({})
    names = [str(user.user) for user in users]
    return await _read(service, lambda: stored_events(service.events, served.recommender, names))


def note_impressions(service: Service, served: Served, answers: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Have the lists of a request written behind its answer, where that is switched on.

    Args:
        service: whose store it is.
        served: what answered.
        answers: what `recllm.serving.server.messages.UserAnswer` says.

    Returns:
        Headers that tell the client under which name they are stored.
    """
    if service.events is None or not service.settings.impressions:
        return {}
    request = uuid.uuid4().hex
    places = [
        Place(str(answer["user"]), str(item["item"]), item["rank"], item["score"])
        for answer in answers
        for item in answer["items"]
    ]

    def count(future: Future[None]) -> None:
        error = future.exception()
        result = "stored" if error is None else "lost"
        service.metrics.impressions.labels(result).inc(len(places))
        if error is not None:
            _tell(error)

    service.events.submit_impressions(places, request, served.bundle).add_done_callback(count)
    return {"X-Request-Id": request}


async def _read(service: Service, read: Callable[[], Value]) -> Value:
    """What a function reads, in a thread.

    Raises:
        Refusal: the store does not answer.
    """
    try:
        return await asyncio.to_thread(read)
    except StoreUnavailable as error:
        raise _failed(service, error) from None


def _store_of(service: Service) -> EventStore:
    if service.events is None:
        raise Refusal(404, "this service stores no events; EVENTS_URL says where they would go")
    return service.events


def _failed(service: Service, error: StoreUnavailable) -> Refusal:
    _tell(error)
    return Refusal(
        503, "the event store does not answer; send the same again soon", service.settings.retry_after
    )


def _tell(error: BaseException) -> None:
    """Write to the log that the store failed, and why, where what it said cannot repeat what a user sent."""
    says_why = isinstance(error.__cause__, OperationalError)
    facts = {"reason": str(error)} if says_why else {}
    tell("event store failed", level=logging.ERROR, error=error, **facts)
