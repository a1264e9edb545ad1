"""What describes a data set of one's own: where its files lie, what their columns mean, what counts as liked.

The section `source` of conf/dataset/<name>.yaml, for data/own/recipe.py; docs/own-data.md is the guide. A
recipe that knows its files asks here which part of them to take.
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from recllm.errors import check

TIME_UNITS = {"seconds": 1, "milliseconds": 1_000, "microseconds": 1_000_000}
ISO = "iso"


def _check(ok: bool, key: str, got: object, wanted: str) -> None:
    """Refuse a value of this section: the key, what it is, what is wanted, and where that is explained."""
    check(ok, f"source.{key}", repr(got), f"{wanted}; docs/own-data.md tells how")


@dataclass(frozen=True)
class FileSource:
    """A table's file, or the folder of its files, and how text is written there."""

    path: str = ""
    """File or folder of files: .csv, .tsv, .txt, .dat (also .gz), .parquet, .jsonl; relative to RAW."""
    separator: str = ""
    """The character between columns of text; empty: a tab for .tsv, else a comma."""
    quote: str = '"'
    """The character around text that holds separators or line breaks; empty: quotes are letters like any."""
    escape: str = ""
    """The character before a quote that is a letter, as '\\'; empty: such quotes are doubled."""
    encoding: str = "utf-8"
    """Encoding of text, as Python names it: utf-8, latin-1, cp1252, utf-16 ..."""
    columns: list[str] = field(default_factory=list)
    """Names of the columns where a text file has no line of names; empty: its first line names them."""
    nulls: list[str | None] = field(default_factory=list)
    r"""Texts that mean "nothing", beside the empty one, in single quotes: ['NA', 'NULL', '\N']."""


@dataclass(frozen=True)
class EventsSource(FileSource):
    """The log: one row an event."""

    user: str = "user"
    """Column of the user's id; ids are text, compared letter by letter. Lists may be without (empty)."""
    item: str = "item"
    """Column of the item's id."""
    rating: str = ""
    """Column of the rating; empty: the log has none."""
    rating_scale: list[float] = field(default_factory=list)
    """The lowest and the highest rating, e.g. [1, 5]; needed where there are ratings."""
    rating_step: float = 0.0
    """Histories show ratings in steps of it, as 0.5 (0: as they are), at most 100; labels go by the file."""
    not_rated: float | None = None
    """The rating that stands for "not rated", e.g. 0; null: an empty field alone does."""
    decimal_comma: bool = False
    """Whether 4,5 is four and a half."""
    timestamp: str = ""
    """Column of the time; empty: the log has none, and the order of its rows is that of a user's events."""
    time_unit: str = "seconds"
    """seconds, milliseconds or microseconds since 1970, iso, or a strptime format as "%d.%m.%Y %H:%M"."""
    layout: Literal["rows", "sequences", "windows"] = "rows"
    """A row is an event (`rows`), all events of a user (`sequences`), or one and those before (`windows`)."""
    list_separator: str = " "
    """The text between the values of a list; lists in parquet and JSON lines need none."""
    history: str = ""
    """Layout `windows`: column of the list of the items before the row's own, oldest first."""
    windows: Literal["continue", "begin", "alone"] = "continue"
    """What goes on from no row before is a fault, or (`begin`) another user; `alone`: every row is one."""
    named_by: str = ""
    """Column of the items file by which items are named here, as their title; empty: their id."""
    split: str = ""
    """Column that says the split of an event (prepare.split=given); empty there: history only."""
    split_texts: list[str] = field(default_factory=lambda: ["train", "valid", "test"])
    """What it says of training, validation and test, in this order."""
    candidates: str = ""
    """Column of the list of items that the row's own is ranked among, the own one with them."""
    store: str = ""
    """URL of a service's event store, whose events join those of path, or are all; without a password."""

    @property
    def name(self) -> str:
        """Where the events lie, for messages."""
        return self.path or self.store


@dataclass(frozen=True)
class HeldOutSource(FileSource):
    """A split in a file of its own, in the layout of `events`; a column without a name has the one there."""

    user: str = ""
    """Column of the user's id; empty: as in `events`, as with the others."""
    item: str = ""
    """Column of the item's id."""
    history: str = ""
    """Layout `windows`: column of the list of the items before."""
    named_by: str = ""
    """Column of the items file by which items are named here."""
    candidates: str = ""
    """Column of the list of items that the row's own is ranked among."""


@dataclass(frozen=True)
class ItemsSource(FileSource):
    """The catalog: one row an item. Columns that are not named here keep their names."""

    item: str = "item"
    """Column of the item's id."""
    title: str = "title"
    """Column of the title."""
    untitled: str = ""
    """Title of an item without one: a format string such as "Item {item}"; empty: such an item is a fault."""
    lists: list[str] = field(default_factory=list)
    """Columns that hold several values: each is written with commas, and `<column>_first` holds the first."""
    list_separator: str = "|"
    """The text between the values of such a column."""
    aliases: list[list[str]] = field(default_factory=list)
    """Other names of items in the events, each with the one in the items file: [['Plus 44', '+44']]."""


@dataclass(frozen=True)
class UsersSource(FileSource):
    """What is known of users; without a path nothing is. Columns that are not named here keep their names."""

    user: str = "user"
    """Column of the user's id."""


@dataclass(frozen=True)
class LabelSource:
    """What counts as liked."""

    rule: Literal["rating", "column", "clicks"] = "rating"
    """`rating`: liked = rating > threshold; `column`: a column says; `clicks`: every event is a liked one."""
    threshold: float | None = None
    """Rule `rating`: the highest rating that is not liked; an event without a rating is history only."""
    column: str = ""
    """Rule `column`: the column of the events that says it; an empty field is history only."""
    liked: list[str | None] = field(default_factory=lambda: ["1", "true", "True"])
    """Rule `column`: texts that mean liked."""
    disliked: list[str | None] = field(default_factory=lambda: ["0", "false", "False"])
    """Rule `column`: texts that mean not liked."""
    history: list[str | None] = field(default_factory=list)
    """Rule `column`: texts of events that are history but no samples."""


@dataclass(frozen=True)
class SourceConfig:
    """A data set of one's own; without `events.path` and `events.store` the recipe of its own name is run."""

    events: EventsSource = field(default_factory=EventsSource)
    valid: HeldOutSource = field(default_factory=HeldOutSource)
    test: HeldOutSource = field(default_factory=HeldOutSource)
    items: ItemsSource = field(default_factory=ItemsSource)
    users: UsersSource = field(default_factory=UsersSource)
    label: LabelSource = field(default_factory=LabelSource)
    subset: str = "all"
    """Part of a published data set (goodreads: a genre, as `poetry`); all: the whole. Not for own files."""
    feedback: str = ""
    """Log of a published data set (goodreads: interactions, reviews); empty: its first. Not for own files."""
    faulty: Literal["error", "drop"] = "error"
    """A row that cannot be used: `error` stops at the first one, `drop` leaves them out and counts them."""

    @property
    def given(self) -> bool:
        """Whether this describes a data set."""
        return bool(self.events.path or self.events.store)

    @property
    def splits_are_given(self) -> bool:
        """Whether files or a column say which split an event is of."""
        return bool(self.events.split or self.valid.path or self.test.path)

    def __post_init__(self) -> None:
        """Check what can be known before a file is read."""
        if not self.given:
            return
        events, label = self.events, self.label
        _check(bool(self.items.path), "items.path", "", "the file or folder of the items")
        _check_lists(self)
        _check_store(self)
        for name, file in (
            ("events", events),
            ("valid", self.valid),
            ("test", self.test),
            ("items", self.items),
            ("users", self.users),
        ):
            signs = {"separator": file.separator, "quote": file.quote, "escape": file.escape}
            for key, value in signs.items():
                _check(
                    len(value.encode()) <= 1, f"{name}.{key}", value, "one ASCII character, or none at all"
                )
            others = (file.separator, file.quote)
            is_usable = not file.escape or (bool(file.quote) and file.escape not in others)
            _check(is_usable, f"{name}.escape", file.escape, f"another sign than {others}, and a quote")
            _check_texts(f"{name}.nulls", file.nulls)
            _check(_is_encoding(file.encoding), f"{name}.encoding", file.encoding, "e.g. utf-8 or latin-1")
        is_named = bool(events.user) or events.layout != "rows"
        _check(is_named, "events.user", events.user, "the name of a column")
        _check(bool(events.item), "events.item", events.item, "the name of a column")
        _check(bool(self.items.item), "items.item", "", "the name of a column")
        _check(
            bool(self.items.title or self.items.untitled), "items.title", "", "a column, or items.untitled"
        )
        braces = self.items.untitled.replace("{item}", "")
        _check(not set("{}") & set(braces), "items.untitled", self.items.untitled, "no braces but {item}")
        if events.rating:
            scale = events.rating_scale
            _check(len(scale) == 2 and scale[0] < scale[1], "events.rating_scale", scale, "[lowest, highest]")
        _check(events.rating_step >= 0, "events.rating_step", events.rating_step, "0 or more")
        units = (*TIME_UNITS, ISO)
        known = events.time_unit in units or "%" in events.time_unit
        _check(known, "events.time_unit", events.time_unit, f"{', '.join(units)}, or a strptime format")
        if label.rule == "rating":
            _check(bool(events.rating), "events.rating", "", "a column, or label.rule: column or clicks")
            _check(label.threshold is not None, "label.threshold", None, "liked = rating > threshold")
        for name, texts in (("liked", label.liked), ("disliked", label.disliked), ("history", label.history)):
            _check_texts(f"label.{name}", texts)
        if label.rule == "column":
            _check(bool(label.column), "label.column", "", "the column that says what was liked")
            texts = [*label.liked, *label.disliked, *label.history]
            _check(len(texts) == len(set(texts)), "label", texts, "each text in one list only")
            _check(bool(label.liked and label.disliked), "label", texts, "some text in liked and in disliked")


def _check_lists(source: SourceConfig) -> None:
    """Refuse what says lists, windows and given splits wrongly."""
    events = source.events
    _check(bool(events.list_separator), "events.list_separator", "", "a text, e.g. ' '")
    has_windows = events.layout == "windows"
    wanted = "the column of the items before" if has_windows else "'', as source.events.layout is not windows"
    _check(bool(events.history) == has_windows, "events.history", events.history, wanted)
    wanted = "continue, as source.events.layout is not windows"
    _check(has_windows or events.windows == "continue", "events.windows", events.windows, wanted)
    wanted = "begin or alone, as source.events.user is empty"
    named = bool(events.user) or not has_windows or events.windows != "continue"
    _check(named, "events.windows", events.windows, wanted)
    both = bool(source.valid.path) == bool(source.test.path)
    wanted = "a file each, or none of both"
    _check(both, "valid.path", source.valid.path, f"{wanted} (source.test.path={source.test.path!r})")
    one_way = not (events.split and source.valid.path)
    _check(one_way, "events.split", events.split, "'', as source.valid.path is a file of its own")
    texts = events.split_texts
    three = len(texts) == 3 and len(set(texts)) == 3
    _check(three, "events.split_texts", texts, "three texts: of training, validation, test")
    pairs = [pair for pair in source.items.aliases if len(pair) != 2]
    _check(not pairs, "items.aliases", source.items.aliases, "pairs of two texts, [['other', 'own']]")
    if not source.valid.path:
        for name, part in (("valid", source.valid), ("test", source.test)):
            stated = [key for key, value in vars(part).items() if value != getattr(HeldOutSource(), key)]
            _check(not stated, f"{name}.path", "", f"a file, as source.{name} says {', '.join(stated)}")


def _check_store(source: SourceConfig) -> None:
    """Refuse a store that cannot be one, or cannot go with the rest."""
    path, store = source.events.path, source.events.store
    _check("://" not in path, "events.path", path, "a file or a folder; an event store is events.store")
    if not store:
        return
    is_known = store.startswith(("sqlite:///", "postgresql://", "postgresql+psycopg://"))
    # What is wrong may hold a password, and is not repeated.
    wanted = "sqlite:///events.db or postgresql+psycopg://user@host/database"
    _check(is_known, "events.store", store.partition(":")[0], wanted)
    user, at, _ = store.partition("://")[2].partition("@")
    wanted = "a URL without one, as stages keep this; PGPASSWORD or ~/.pgpass has it"
    _check(not (at and ":" in user), "events.store", "a URL with a password", wanted)
    _check("password=" not in store, "events.store", "a URL with a password", wanted)
    is_plain = source.events.layout != "windows" and not source.splits_are_given
    _check(is_plain, "events.store", store, "'', as no split and no window of a stored event is known")


def _check_texts(key: str, texts: Sequence[str | None]) -> None:
    """Refuse what YAML makes of texts that mean something else without quotes, or within double ones."""
    wanted = "a text in single quotes, e.g. 'NULL' or '\\N'"
    for text in texts:
        _check(
            text is not None, key, text, f"{wanted}, as NULL, null and ~ without quotes are YAML's nothing"
        )
        is_letters = not any(unicodedata.category(sign) in ("Cc", "Zl", "Zp") for sign in text or "")
        _check(is_letters, key, text, f'{wanted}, as "\\N" and the like are single signs to YAML')


def _is_encoding(name: str) -> bool:
    try:
        codecs.lookup(name)
    except LookupError:
        return False
    return True
