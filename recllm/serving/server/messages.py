"""What clients send and get, with an example each; `/openapi.json` is made of these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictStr, WithJsonSchema

from recllm.serving.recommender import LAST_SECOND, second_of

LARGEST_ID = 2**63 - 1
LARGEST_FLOAT = 2**53
"""Up to it every whole number is a float of its own."""
LONGEST_ID = 200
LONGEST_TIME = 40


def _whole(value: object) -> object:
    """A number without a fraction as JSON may write it too, 5.0, as the integer that it is."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_FLOAT:
        return int(value)
    return value


def _id(value: object) -> int | str:
    value = _whole(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) <= LARGEST_ID:
            return value
        raise ValueError("wanted a whole number of 64 bits; longer ids go as text")
    if isinstance(value, str) and 0 < len(value) <= LONGEST_ID:
        if not any("\ud800" <= character <= "\udfff" for character in value):
            return value
        raise ValueError("wanted text without halves of characters (surrogates)")
    raise ValueError(f"wanted a whole number, or a text of 1 to {LONGEST_ID} characters")


Id = Annotated[
    int | str,
    BeforeValidator(_id),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": -LARGEST_ID, "maximum": LARGEST_ID},
                {"type": "string", "minLength": 1, "maxLength": LONGEST_ID},
            ]
        }
    ),
]
"""External id of a user or an item: a whole number, or text."""


def _second(value: object) -> int:
    wanted = "wanted Unix seconds or ISO text, e.g. 2026-01-31T12:00"
    value = _whole(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(wanted)
    if isinstance(value, str) and len(value) > LONGEST_TIME:
        raise ValueError(wanted)
    if isinstance(value, int) and not -LAST_SECOND <= value <= LAST_SECOND:
        raise ValueError("wanted a second before the year 10000")
    try:
        return second_of(value)
    except ValueError:
        raise ValueError(wanted) from None


def _time_schema(earliest: int) -> dict[str, Any]:
    return {
        "anyOf": [
            {"type": "integer", "minimum": earliest, "maximum": LAST_SECOND},
            {"type": "string", "maxLength": LONGEST_TIME, "format": "date-time"},
        ]
    }


Second = Annotated[
    int,
    BeforeValidator(_second),
    WithJsonSchema(_time_schema(-LAST_SECOND)),
]
"""A time in Unix seconds; it may be sent as ISO text, which without a zone is UTC."""


def _label(value: object) -> object:
    value = _whole(value)
    if isinstance(value, bool):
        raise ValueError("wanted 1 (liked), 0 or null")
    return value


Label = Annotated[Literal[0, 1], BeforeValidator(_label)]
"""Whether an event's item was liked."""


class Message(BaseModel):
    """What a client sends: a name that is not known is told, not ignored."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Event(Message):
    """What a user did with an item."""

    item: Id
    rating: Annotated[float, Field(strict=True)] | None = Field(None, description="as in the log's own scale")
    label: Label | None = Field(None, description="1: liked; none: what most events of the rating are")
    timestamp: Second | None = Field(None, description="Unix seconds or ISO text; none: after all others")


class NewEvent(Event):
    """What a user did, to be stored."""

    user: Id
    timestamp: Annotated[Second, WithJsonSchema(_time_schema(0))] | None = Field(
        None, description="Unix seconds from 1970 on, or ISO text; none: now"
    )
    key: Annotated[StrictStr, Field(min_length=1, max_length=200)] | None = Field(
        None, description="idempotency key, unique among all events; none: the header's, or a new one"
    )


class EventsRequest(Message):
    """What users did: all of it is stored, or nothing."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        json_schema_extra={
            "examples": [{"events": [{"user": 1, "item": 93, "rating": 4, "key": "order-4711"}]}]
        },
    )

    events: list[NewEvent] = Field(min_length=1)


class EventsAnswer(BaseModel):
    """What became of events, which are on disk now."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"stored": 1, "repeated": 0}]})

    stored: int = Field(description="events that are new")
    repeated: int = Field(description="events that were there already, by their keys")


class PastEvent(BaseModel):
    """An event of a history."""

    item: Id
    title: str | None = Field(description="null: the bundle does not know the item")
    rating: float | None
    label: Literal[0, 1] | None
    timestamp: int | None = Field(description="Unix seconds; null: the log has no times")
    source: Literal["log", "store"] = Field(description="the bundle's log, or the event store")


class HistoryAnswer(BaseModel):
    """What is known of a user."""

    bundle: str = Field(description="hash of the bundle whose log it is")
    user: str
    is_known: bool = Field(description="whether the bundle's log knows the user")
    events: list[PastEvent] = Field(description="the latest ones, oldest first")


class OneUser(Message):
    """A user who is asked about, known to the log or not."""

    user: Id
    history: list[Event] = Field([], description="events, which join those that the log knows of the user")
    time: Second | None = Field(
        None, description="the user is asked about as of then; none: after everything"
    )


class RecommendRequest(Message):
    """Who wants recommendations, and of what."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        json_schema_extra={
            "examples": [
                {
                    "users": [{"user": 1}, {"user": "new", "history": [{"item": 5, "rating": 4}]}],
                    "k": 10,
                }
            ]
        },
    )

    users: list[OneUser] = Field(min_length=1)
    k: int = Field(10, ge=1, strict=True, description="items of a list")
    filter_viewed: bool = Field(True, strict=True, description="leave out items of a user's own history")
    items_to_recommend: list[Id] | None = Field(
        None, min_length=1, description="the only items that may be recommended"
    )
    exclude: list[Id] = Field([], description="items that nobody is recommended")
    on_unknown: Literal["popular", "error"] = Field(
        "popular", description="users that the log does not know and that bring no history"
    )


class RecommendedItem(BaseModel):
    """A place of a list."""

    item: Id
    score: float
    rank: int = Field(description="from 1")
    title: str | None
    steps: dict[str, float | None] = Field(description="each step's own score; null where it gave none")


class UserAnswer(BaseModel):
    """The list of one user, or why there is none."""

    user: Id
    items: list[RecommendedItem]
    source: Literal["cascade", "popularity"] | None = Field(
        description="popularity: nothing is known of the user"
    )
    error: str | None = None


class RecommendAnswer(BaseModel):
    """A list for each user, in the order asked."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "bundle": "3f6f0a2c9d1e",
                    "answers": [
                        {
                            "user": 1,
                            "items": [
                                {
                                    "item": 93,
                                    "score": 1.69,
                                    "rank": 1,
                                    "title": "Wrong Alibi 5 (1986)",
                                    "steps": {"retriever": 0.97, "crm": -0.97, "lm": -5.76},
                                }
                            ],
                            "source": "cascade",
                            "error": None,
                        }
                    ],
                }
            ]
        }
    )

    bundle: str = Field(description="hash of the bundle that answered")
    answers: list[UserAnswer]


class UserItems(OneUser):
    """A user, and the items to score for him."""

    items: list[Id] = Field(min_length=1)


class ScoreRequest(Message):
    """Which items are to be scored for whom."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        json_schema_extra={"examples": [{"users": [{"user": 1, "items": [5, 93]}]}]},
    )

    users: list[UserItems] = Field(min_length=1)


class ScoredItem(BaseModel):
    """How likely a user is to like an item."""

    item: Id
    score: float | None
    title: str | None
    steps: dict[str, float | None]
    error: str | None = None


class UserScores(BaseModel):
    """The scores of one user's items, in the order asked."""

    user: Id
    items: list[ScoredItem]
    error: str | None = None


class ScoreAnswer(BaseModel):
    """Scores for each user, in the order asked."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "bundle": "3f6f0a2c9d1e",
                    "answers": [
                        {
                            "user": 1,
                            "items": [
                                {
                                    "item": 5,
                                    "score": 0.236,
                                    "title": "Burning Platoon 5 (1992)",
                                    "steps": {"retriever": 0.11, "crm": -1.55, "lm": 0.236},
                                    "error": None,
                                }
                            ],
                            "error": None,
                        }
                    ],
                }
            ]
        }
    )

    bundle: str
    answers: list[UserScores]


class Health(BaseModel):
    """Whether requests are answered."""

    status: Literal["ready", "starting", "stopping"]


class Info(BaseModel):
    """What answers."""

    bundle: str = Field(description="hash of the bundle: of what its files are")
    cascade: str
    dataset: str
    steps: list[str]
    users: int
    items: int
    data_until: str | None = Field(
        description="time of the last event of the log, ISO, UTC; null: it has none"
    )
    made: str | None = Field(description="when the bundle was made, ISO, UTC")
    loaded: str = Field(description="when this process loaded it, ISO, UTC")
    versions: dict[str, str]


class Reloaded(BaseModel):
    """What a reload has done."""

    before: str | None = Field(description="hash of the bundle that answered before")
    bundle: str


class Failure(BaseModel):
    """Why a request is not answered."""

    error: str = Field(description="one sentence")


def failures(meanings: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    """What a route's description says of its statuses: status -> meaning."""
    return {status: {"model": Failure, "description": meaning} for status, meaning in meanings.items()}
