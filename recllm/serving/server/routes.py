"""`POST /recommend`, `POST /score`, `GET /info`: what clients ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Response

from recllm.serving.recommender import Recommender
from recllm.serving.server.answering import ListQuestion, PairQuestion, ask
from recllm.serving.server.batching import Kind
from recllm.serving.server.event_routes import note_impressions, read_stored
from recllm.serving.server.messages import (
    Info,
    OneUser,
    RecommendAnswer,
    RecommendRequest,
    ScoreAnswer,
    ScoreRequest,
    failures,
)
from recllm.serving.server.refusals import Refusal, as_json
from recllm.serving.server.service import Service, service_of
from recllm.serving.server.settings import Settings

router = APIRouter()
Asks = Annotated[Service, Depends(service_of)]

FAILURES = failures(
    {
        400: "the body is no JSON",
        401: "the API key is missing or another",
        413: "the body is too large",
        422: "the request cannot be answered",
        503: "not ready, or too much is at work; Retry-After says when to ask again",
        504: "no answer within the deadline",
    }
)


@router.post("/recommend", response_model=RecommendAnswer, responses=FAILURES)
async def recommend(request: RecommendRequest, service: Asks) -> Response:
    """The k items that each user is most likely to want next; what cannot be answered is told by user."""
    settings = service.settings
    served = service.current
    recommender = served.recommender
    _check_users(request.users, settings, recommender)
    _check_most("k", request.k, settings.max_k)
    _check_most("items_to_recommend", len(request.items_to_recommend or []), settings.max_items)
    _check_most("exclude", len(request.exclude), settings.max_items)
    texts = None
    if request.items_to_recommend is not None:
        texts = [str(item) for item in request.items_to_recommend]
    try:
        recommender.check_k(request.k)
        filters = recommender.filters(
            ask(recommender, []), request.filter_viewed, texts, [str(item) for item in request.exclude]
        )
    except ValueError as error:
        raise Refusal(422, str(error)) from None
    stored = await read_stored(service, served, request.users)
    questions = [
        ListQuestion(user.user, stored.join(user), user.time, request.k, filters.each[0], request.on_unknown)
        for user in request.users
    ]
    answers = await service.batcher.answer(served, Kind.LISTS, questions)
    for answer in answers:
        if answer["source"] is not None:
            service.metrics.lists.labels(answer["source"]).inc()
    headers = note_impressions(service, served, answers)
    return as_json({"bundle": served.bundle, "answers": answers}, headers=headers)


@router.post("/score", response_model=ScoreAnswer, responses=FAILURES)
async def score(request: ScoreRequest, service: Asks) -> Response:
    """How likely each user is to like his items; what cannot be answered is told by item."""
    settings = service.settings
    served = service.current
    _check_users(request.users, settings, served.recommender)
    _check_most(
        "items, of all users together,", sum(len(user.items) for user in request.users), settings.max_items
    )
    stored = await read_stored(service, served, request.users)
    questions = [
        PairQuestion(user.user, stored.join(user), user.time, item)
        for user in request.users
        for item in user.items
    ]
    scored = iter(await service.batcher.answer(served, Kind.PAIRS, questions))
    answers = [
        {"user": user.user, "items": [next(scored) for _ in user.items], "error": None}
        for user in request.users
    ]
    return as_json({"bundle": served.bundle, "answers": answers})


@router.get("/info", response_model=Info, responses={401: FAILURES[401], 503: FAILURES[503]})
async def info(service: Asks) -> Response:
    """Which bundle answers, what it is made of and until when its data reach."""
    return as_json(service.current.info())


def _check_users(users: Sequence[OneUser], settings: Settings, recommender: Recommender) -> None:
    """Refuse more than may be asked, and times where the log has none."""
    _check_most("users", len(users), settings.max_users)
    for place, user in enumerate(users):
        _check_most(f"users.{place}.history", len(user.history), settings.max_history)
        if user.time is not None and not recommender.log.timed:
            raise Refusal(422, f"users.{place}.time: no event of {recommender.dataset} has a time; send none")


def _check_most(name: str, got: int, most: int) -> None:
    if got > most:
        raise Refusal(422, f"{name}: {got:,} are asked for; wanted at most {most:,}")
