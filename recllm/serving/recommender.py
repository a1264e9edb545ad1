"""Recommendations for anybody, from one folder: external ids in, tables of external ids out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recllm import paths
from recllm.eventlog.ids import FIRST_ID, UNKNOWN
from recllm.eventlog.log import EventLog, Rows
from recllm.eventlog.queries import Queries, QueryMaker
from recllm.pipeline.finished import Finished
from recllm.retrieval.vectors import normalize
from recllm.serving.bundle import check_bundle, version_of
from recllm.serving.opening import Parts, open_finished
from recllm.systems.cascade import Cascade, Lists
from recllm.systems.catalog import NO_ITEM, CatalogScorer, Excluded
from recllm.systems.catalog_counting import CatalogPopularity

OnUnknown = Literal["popular", "error", "skip"]
Ids = Sequence[Any] | NDArray[Any] | pl.Series
Time = int | float | str | date | datetime

LAST_SECOND = 253_402_300_799
"""The last second of the year 9999."""
BLOCK = 256
"""Users that are recommended to at once; bounds memory."""


class _Only(CatalogScorer):
    """A first step of which some queries may be recommended some items only.

    Args:
        scorer: the step.
        allowed: bool `[n_items]` each; None: all items.
        which: int64 `[Q]`, which of `allowed` holds for each query of a batch.
    """

    def __init__(
        self, scorer: CatalogScorer, allowed: Sequence[NDArray[np.bool_] | None], which: Rows
    ) -> None:
        super().__init__(scorer.name)
        self.scorer = scorer
        self.allowed = allowed
        self.which = which
        self._is_free = np.array([mask is None for mask in allowed])[which]

    def scores(self, log: EventLog, rows: Rows) -> NDArray[np.float32]:
        """See `CatalogScorer`."""
        scores = self.scorer.scores(log, rows)
        which = self.which[log.user[rows]]
        for place in np.unique(which).tolist():
            mask = self.allowed[place]
            if mask is not None:
                scores[np.ix_(which == place, ~mask)] = -np.inf
        return scores

    def best(
        self, log: EventLog, rows: Rows, k: int, exclude: Excluded | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """See `CatalogScorer`; who may be recommended all items is answered as by the step alone."""
        exclude = Excluded.of([]) if exclude is None else exclude
        items = np.full((len(rows), k), NO_ITEM, np.int32)
        scores = np.full((len(rows), k), -np.inf, np.float32)
        is_free = self._is_free[log.user[rows]]
        for best, chosen in (
            (self.scorer.best, np.flatnonzero(is_free)),
            (super().best, np.flatnonzero(~is_free)),
        ):
            if len(chosen):
                items[chosen], scores[chosen] = best(log, rows[chosen], k, _excluded_of(exclude, chosen))
        return items, scores


def _excluded_of(excluded: Excluded, chosen: Rows) -> Excluded:
    """What is left out of some places' lists, counted from the first of them; `chosen` ascends."""
    keep = np.isin(excluded.place, chosen)
    return Excluded(np.searchsorted(chosen, excluded.place[keep]), excluded.item[keep])


def seen(queries: Queries) -> Excluded:
    """All items that each query's user is known to have met, whatever part of them a history shows."""
    start, end = queries.all_events()
    place = np.repeat(np.arange(len(start)), end - start)
    first = np.cumsum(end - start) - (end - start)
    event = np.arange(len(place)) - first[place] + start[place]
    return Excluded(place, queries.log.item[event])


@dataclass(frozen=True)
class Filter:
    """What some users may be recommended.

    Attributes:
        viewed: whether items of a query's own history are left out.
        allowed: bool `[n_items]`; None: all.
        without: int32 `[n]`, items that are left out.
    """

    viewed: bool
    allowed: NDArray[np.bool_] | None
    without: NDArray[np.int32]


@dataclass(frozen=True)
class Filters:
    """What each user may be recommended.

    Attributes:
        each: filters, of which each user has one.
        which: int64 `[U]`, the place of each user's own in `each`.
        user: place of a user, int64 `[m]` ascending, of whom one more item is left out.
        item: int32 `[m]`, that item.
    """

    each: Sequence[Filter]
    which: Rows
    user: Rows
    item: NDArray[np.int32]

    @classmethod
    def together(cls, filters: Sequence[Filter]) -> Filters:
        """A filter for each user."""
        return cls(filters, np.arange(len(filters)), np.zeros(0, np.int64), np.zeros(0, np.int32))

    def of(self, queries: Queries, low: int) -> Excluded:
        """What is left out of the lists of queries, of whom the first one has place `low` among all."""
        count = len(queries)
        which = self.which[low : low + count]
        is_viewed_out = np.array([filter_.viewed for filter_ in self.each])[which]
        parts = []
        for place in np.unique(which).tolist():
            without = self.each[place].without
            if len(without):
                users = np.flatnonzero(which == place)
                parts.append(Excluded(np.repeat(users, len(without)), np.tile(without, len(users))))
        first, last = np.searchsorted(self.user, (low, low + count))
        parts.append(Excluded(self.user[first:last] - low, self.item[first:last]))
        if is_viewed_out.any():
            viewed = seen(queries)
            keep = is_viewed_out[viewed.place]
            parts.append(Excluded(viewed.place[keep], viewed.item[keep]))
        place = np.concatenate([part.place for part in parts])
        item = np.concatenate([part.item for part in parts])
        order = np.argsort(place, kind="stable")
        return Excluded(place[order], item[order])

    def restrict(self, scorer: CatalogScorer, low: int, count: int) -> CatalogScorer:
        """A first step that recommends to queries from place `low` on what they may be recommended."""
        which = self.which[low : low + count]
        allowed = [filter_.allowed for filter_ in self.each]
        if all(allowed[place] is None for place in np.unique(which).tolist()):
            return scorer
        return _Only(scorer, allowed, which)


class Recommender:
    """Recommends items of a catalog to users: `Recommender.load(folder)`, then `recommend`.

    `counts` says of the last call how many users, histories and lists were what: unknown, without history,
    shorter than k, and so on; of a file that a call went on with, of the parts that it answered.

    Args:
        parts: log and steps.
        name: of the folder, e.g. `cascade/reclora`.
        dataset: name of the data set.
        version: hash of what it was made of: another model of the same name has another one.
    """

    def __init__(self, parts: Parts, name: str, dataset: str, version: str = "") -> None:
        """Reads ids and titles."""
        self.parts = parts
        self.name = name
        self.dataset = dataset
        self.version = version
        self.log = parts.log
        self.cascade = parts.cascade
        self.maker = QueryMaker(parts.log)
        self.counts: Counter[str] = Counter()
        items = pl.read_parquet(parts.log.folder / "items.parquet")
        self.item_titles = items["title"] if "title" in items.columns else None
        self.popularity = CatalogPopularity(parts.log)

    @classmethod
    def load(cls, folder: str | Path, verify: bool = True) -> Recommender:
        """Open a bundle, or a finished cascade among artifacts. Nothing is written.

        Args:
            folder: `artifacts/demo/bundle/reclora`, copied to wherever; or `artifacts/demo/cascade/reclora`.
            verify: whether every file of a bundle is read once to see that it is whole.

        Raises:
            StageError: the bundle is of another version, or a file of it is missing or changed; or the stage
                is not finished.
        """
        folder = Path(folder)
        if (folder / paths.BUNDLE).exists():
            stage = Finished.open(folder / check_bundle(folder, verify))
        else:
            stage = Finished.open(folder)
        return cls(open_finished(stage), stage.name, stage.file.dataset, version_of(folder))

    # ---- what users call

    def recommend(
        self,
        users: Ids | pl.DataFrame | None = None,
        k: int = 10,
        *,
        filter_viewed: bool = True,
        items_to_recommend: Ids | None = None,
        exclude: Ids | pl.DataFrame | None = None,
        time: Time | None = None,
        on_unknown: OnUnknown = "popular",
        histories: pl.DataFrame | None = None,
    ) -> pl.DataFrame:
        """The k items that each user is most likely to want next.

        Args:
            users: external ids, each once; or a table with a column `user`, and `time` where each has his
                own. None: those of `histories`.
            k: items of a list.
            filter_viewed: whether items of a user's own history are left out.
            items_to_recommend: external ids of the only items that may be recommended; None: all.
            exclude: external ids of items that nobody is recommended; or a table of `user` and `item`.
            time: when the user is asked about: Unix seconds, a date, or ISO text. History is what lies
                before. None: after everything that the log knows.
            on_unknown: users that the log does not know, and that bring no history: `popular`: the most
                popular items; `error`; `skip`: no lines.
            histories: events that users bring: `user`, `item`, and where they are known `rating`, `label`
                (liked: 1, else 0) and `timestamp` (Unix seconds). They go with what the log knows of the user
                (`recllm.eventlog.queries` has the rules).

        Returns:
            `user`, `item`, `score`, `rank` (from 1), `title`, and of each step its own score, null where it
            gave none. In the order of users, then of ranks. A list is shorter than k where fewer items are
            left; a user without any history gets the most popular items, whose steps are all null.

        Raises:
            ValueError: a value that cannot be used, in a line.
        """
        asked = self.ask(users, time, histories)
        asked.refuse_problems()
        filters = self.filters(asked, filter_viewed, items_to_recommend, exclude)
        self.check_k(k)
        if on_unknown not in get_args(OnUnknown):
            raise ValueError(f"on_unknown={on_unknown!r}; wanted one of {', '.join(get_args(OnUnknown))}")
        self.counts = Counter()
        tables = []
        for _, table in self.blocks(asked, k, filters, on_unknown):
            asked.refuse_problems()
            tables.append(table)
        if not tables:
            return self._table(asked.users[:0], self._empty_lists(0, k), np.zeros(0, np.int64))
        return pl.concat(tables)

    def score(
        self,
        pairs: pl.DataFrame,
        *,
        time: Time | None = None,
        on_unknown: Literal["null", "error"] = "null",
        histories: pl.DataFrame | None = None,
    ) -> pl.DataFrame:
        """How likely each user is to like an item.

        Args:
            pairs: `user`, `item`, and `time` where each pair has its own.
            time: as of `recommend`.
            on_unknown: items that the log does not know: `null`, their score; `error`.
            histories: as of `recommend`.

        Returns:
            `user`, `item`, `score`, `title` and each step's own score, in the order of `pairs`. The score is
            the language model's probability of Yes if it is part of the cascade, else that of the CRM (its
            logit, where it was trained to rank), else the first step's.

        Raises:
            ValueError: a value that cannot be used, in a line.
        """
        asked = self.ask(pairs, time, histories, distinct=False)
        asked.refuse_problems()
        if "item" not in pairs.columns:
            raise ValueError(f"pairs have columns {', '.join(pairs.columns)}; wanted user and item")
        items = self.maker.items.dense(pairs["item"])
        if on_unknown == "error" and (items < FIRST_ID).any():
            first = int(np.flatnonzero(items < FIRST_ID)[0])
            raise ValueError(
                f"item {pairs['item'][first]!r} is not in the log; wanted one of its "
                f"{self.log.n_items - FIRST_ID:,} items, or on_unknown='null'"
            )
        self.counts = Counter()
        tables = []
        for _, table in self.score_blocks(asked, pairs["item"], items):
            asked.refuse_problems()
            tables.append(table)
        return (
            pl.concat(tables) if tables else self._scored(asked.users[:0], pairs["item"][:0], items[:0], {})
        )

    def similar_items(self, items: Ids, k: int = 10) -> pl.DataFrame:
        """The k items whose vectors are most like those of each item, by cosine.

        Args:
            items: external ids.
            k: items of a list.

        Returns:
            `target_item`, `item`, `score`, `rank` (from 1) and `title`, in the order of `items`.

        Raises:
            ValueError: an item that the log does not know, or one without a vector.
        """
        given = items if isinstance(items, pl.Series) else pl.Series("target_item", list(items))
        dense = self.maker.items.dense(given)
        if (dense < FIRST_ID).any():
            first = int(np.flatnonzero(dense < FIRST_ID)[0])
            raise ValueError(f"item {given[first]!r} is not in the log; wanted one of its items")
        vectors = self._unit_vectors
        is_there: NDArray[np.bool_] = np.asarray(vectors.any(1), np.bool_)
        is_there[:FIRST_ID] = False
        if not is_there[dense].all():
            first = int(np.flatnonzero(~is_there[dense])[0])
            raise ValueError(
                f"item {given[first]!r} has no vector, as nothing is known of it; wanted another"
            )
        most = int(is_there.sum()) - 1
        if not 1 <= k <= most:
            raise ValueError(f"k is {k}; wanted 1 to {most}, the other items that have a vector")
        tables = []
        size = max(1, (1 << 24) // len(vectors))
        for low in range(0, max(1, len(dense)), size):  # of no items too, for an empty table
            part = dense[low : low + size]
            score = vectors[part] @ vectors.T
            score[:, ~is_there] = -np.inf
            score[np.arange(len(part)), part] = -np.inf
            best = np.argsort(-score, axis=1, kind="stable")[:, :k]
            tables.append(
                pl.DataFrame(
                    {
                        "target_item": given[np.repeat(np.arange(low, low + len(part)), k)],
                        "item": self.maker.items.external(best.ravel()),
                        "score": np.take_along_axis(score, best, 1).ravel(),
                        "rank": np.tile(np.arange(1, k + 1, dtype=np.int32), len(part)),
                        **self._title_column(best.ravel()),
                    }
                )
            )
        return pl.concat(tables)

    def titles(self, items: Ids) -> list[str | None]:
        """The title of each item, by external id; None of one that the log does not know."""
        dense = self.maker.items.dense(items)
        column = self._title_column(dense).get("title")
        return [None] * len(dense) if column is None else column.to_list()

    # ---- what they are made of

    def ask(
        self,
        users: Ids | pl.DataFrame | None,
        time: Time | None,
        histories: pl.DataFrame | None,
        distinct: bool = True,
    ) -> Asked:
        """What is asked, checked: every user's place, second, and events.

        Raises:
            ValueError: columns are missing, or nobody is asked about.
        """
        if users is None:
            if histories is None:
                raise ValueError("neither users nor histories are given; wanted one of them")
            users = _column(histories, "user", "histories").unique(maintain_order=True)
        seconds = None
        if isinstance(users, pl.DataFrame):
            if "time" in users.columns:
                seconds = _seconds(users["time"])
            given = _column(users, "user", "users")
        else:
            given = users if isinstance(users, pl.Series) else pl.Series("user", list(users))
        if time is not None:
            if seconds is not None:
                raise ValueError("time is given, and a column time as well; wanted one of the two")
            seconds = pl.Series("time", [second_of(time)] * len(given), dtype=pl.Int64)
        if seconds is not None and not self.log.timed:
            raise ValueError(f"time is given, but no event of {self.dataset} has one; wanted none")
        problems: dict[int, str] = {}
        if given.null_count():
            for place in given.is_null().arg_true().to_list():
                problems[place] = "no user id; wanted one"
        if distinct and given.n_unique() < len(given):
            counts = given.to_frame("user").with_row_index("place").filter(pl.col("user").is_duplicated())
            for place in counts.filter(pl.col("user").is_not_null())["place"].to_list():
                problems[place] = "stands there more than once; wanted each user once"
        own = None
        if histories is not None:
            own = self._own_events(given, histories, distinct)
        return Asked(given, seconds, own, problems)

    def filters(
        self,
        asked: Asked,
        filter_viewed: bool,
        items_to_recommend: Ids | None,
        exclude: Ids | pl.DataFrame | None,
    ) -> Filters:
        """Filters in dense ids.

        Raises:
            ValueError: they leave nothing that can be recommended.
        """
        allowed = None
        if items_to_recommend is not None:
            dense = self.maker.items.dense(items_to_recommend)
            allowed = np.zeros(self.log.n_items, np.bool_)
            allowed[dense[dense >= FIRST_ID]] = True
            if not (allowed & self._recommendable).any():
                raise ValueError(
                    f"none of the {len(dense):,} items_to_recommend is an item of the log that can be "
                    "recommended (by a training event, or the retriever's text); wanted at least one"
                )
        everywhere = np.zeros(0, np.int32)
        user = np.zeros(0, np.int64)
        item = np.zeros(0, np.int32)
        if isinstance(exclude, pl.DataFrame):
            names = pl.DataFrame({"user": asked.users}).with_row_index("place")
            pairs = pl.DataFrame(
                {
                    "user": _column(exclude, "user", "exclude").cast(asked.users.dtype, strict=False),
                    "item": self.maker.items.dense(_column(exclude, "item", "exclude")),
                }
            )
            pairs = pairs.join(names, on="user", how="inner").sort("place")
            user = pairs["place"].cast(pl.Int64).to_numpy()
            item = pairs["item"].to_numpy()
        elif exclude is not None and len(exclude):
            everywhere = np.unique(self.maker.items.dense(exclude))
        left = self._recommendable if allowed is None else self._recommendable & allowed
        if len(everywhere):
            left = left.copy()
            left[everywhere] = False
        if not left.any():
            raise ValueError("exclude leaves no item that could be recommended; wanted fewer")
        each = [Filter(filter_viewed, allowed, everywhere)]
        return Filters(each, np.zeros(len(asked), np.int64), user, item)

    def blocks(
        self,
        asked: Asked,
        k: int | Rows,
        filters: Filters,
        on_unknown: OnUnknown | Sequence[OnUnknown],
        size: int = BLOCK,
    ) -> Iterator[tuple[Rows, pl.DataFrame]]:
        """Recommendations of some users after the other: their table, and the place of each line's user.

        Users with a problem have no lines; it is told in `asked.problems`, which those join that are found
        only now. Lengths of lists, filters and what is done about strangers may differ between users, who
        go through every step together all the same.
        """
        lengths_asked = np.broadcast_to(k, len(asked))
        of_strangers = np.broadcast_to(on_unknown, len(asked))
        for low in range(0, len(asked), size):
            places = range(low, min(low + size, len(asked)))
            queries = asked.queries(self.maker, places)
            for place, problem in queries.problems.items():
                asked.problems.setdefault(low + place, problem)
            unknown = (queries.user == UNKNOWN) & (queries.lengths == 0)
            asked_lengths = lengths_asked[low : low + len(queries)]
            longest = int(asked_lengths.max())
            rule = of_strangers[low : low + len(queries)]
            if (rule == "error").any():
                for place in np.flatnonzero(unknown & (rule == "error")).tolist():
                    line = "is not in the log and brings no history; wanted a known user, or histories"
                    asked.problems.setdefault(low + place, line)
            is_left_out = np.isin(np.arange(len(queries)), [place - low for place in asked.problems])
            skipped = unknown & ~is_left_out & (rule == "skip")
            if skipped.any():
                self.counts["skipped_users"] += int(skipped.sum())
            is_left_out |= skipped
            self.counts.update(queries.counts)
            excluded = filters.of(queries, low)
            without = queries.lengths == 0
            first = filters.restrict(self.cascade.first, low, len(queries))
            cascade = replace(self.cascade, first=first)
            popular = filters.restrict(self.popularity, low, len(queries))
            lists = self._empty_lists(len(queries), longest)
            for scorer, which in ((cascade, ~without), (popular, without)):
                chosen = np.flatnonzero(which & ~is_left_out)
                if len(chosen):
                    self._fill(lists, scorer, queries.some(chosen), chosen, excluded, longest)
            self.counts["answered_by_popularity"] += int((without & ~is_left_out).sum())
            lists.items[np.arange(longest) >= asked_lengths[:, None]] = NO_ITEM
            lengths = (lists.items >= FIRST_ID).sum(1)
            self.counts["lists"] += int((~is_left_out).sum())
            self.counts["shorter_lists"] += int(((lengths < asked_lengths) & ~is_left_out).sum())
            recommended = lists.items[lists.items >= FIRST_ID]
            self.counts["recommended_by_text_alone"] += int((self.log.item_count[recommended] == 0).sum())
            of_lines = np.repeat(np.arange(low, low + len(queries)), lengths)
            yield of_lines, self._table(asked.users[low : low + len(queries)], lists, lengths)

    def score_blocks(
        self, asked: Asked, names: pl.Series, items: NDArray[np.int32], size: int = 4 * BLOCK
    ) -> Iterator[tuple[Rows, pl.DataFrame]]:
        """Scores of some pairs after the other: their table, and the place of each line's pair."""
        for low in range(0, len(asked), size):
            places = range(low, min(low + size, len(asked)))
            queries = asked.queries(self.maker, places)
            for place, problem in queries.problems.items():
                asked.problems.setdefault(low + place, problem)
            self.counts.update(queries.counts)
            part = items[low : low + size]
            self.counts["unknown_items"] += int((part < FIRST_ID).sum())
            known = np.flatnonzero(part >= FIRST_ID)
            steps = self._step_scores(queries, part, known)
            window = slice(low, low + len(queries))
            yield (
                np.arange(low, low + len(queries)),
                self._scored(asked.users[window], names[window], part, steps),
            )

    def _step_scores(
        self, queries: Queries, items: NDArray[np.int32], known: Rows
    ) -> dict[str, NDArray[np.float32]]:
        """Each step's score of one item of each query, NaN where the item is unknown; the last one counts."""
        first = self.cascade.first.name
        steps = {first: np.full(len(items), np.nan, np.float32)}
        steps[first][known] = self._first_scores(queries.some(known), items[known])
        if self.parts.crm is not None:
            steps["crm"] = np.full(len(items), np.nan, np.float32)
            crm = self.parts.crm.for_queries(queries)
            steps["crm"][known] = crm.logits(queries.rows[known], items[known])
        if self.parts.lm is not None:
            steps["lm"] = np.full(len(items), np.nan, np.float32)
            if len(known):
                steps["lm"][known] = self.parts.lm.answers(queries.some(known), items[known])
        return steps

    def _first_scores(self, queries: Queries, items: NDArray[np.int32]) -> NDArray[np.float32]:
        """The first step's score of one item of each query; NaN where it does not recommend the item."""
        retriever = self.parts.retriever
        if retriever is None:
            counts = self.log.item_count[items].astype(np.float32)
            return np.where(counts > 0, counts, np.nan)
        users = retriever.users(queries.log, queries.rows)
        own = np.einsum("bd,bd->b", users, retriever.item_vectors[items], optimize=False)
        return np.where(retriever.is_known[items], own, np.nan).astype(np.float32)

    def _scored(
        self,
        users: pl.Series,
        names: pl.Series,
        items: NDArray[np.int32],
        steps: dict[str, NDArray[np.float32]],
    ) -> pl.DataFrame:
        score = np.full(len(items), np.nan, np.float32)
        if steps:
            name = list(steps)[-1]
            score = steps[name]
            if name == "crm" and self.parts.crm is not None and not self.parts.crm.ranks:
                score = (1 / (1 + np.exp(-score.astype(np.float64)))).astype(np.float32)
        columns = {name: pl.Series(values, nan_to_null=True) for name, values in steps.items()}
        return pl.DataFrame(
            {
                "user": users,
                "item": names,
                "score": pl.Series(score, nan_to_null=True),
                **self._title_column(items),
                **(columns or dict.fromkeys(self.cascade.names, pl.Series([], dtype=pl.Float32))),
            }
        )

    def _own_events(self, users: pl.Series, histories: pl.DataFrame, distinct: bool) -> pl.DataFrame:
        """Events of histories with the place of their user, sorted by it; others' events are left out."""
        _column(histories, "user", "histories")
        _column(histories, "item", "histories")
        if "timestamp" in histories.columns and not histories["timestamp"].dtype.is_integer():
            histories = histories.with_columns(timestamp=_seconds(histories["timestamp"]))
        places = pl.DataFrame({"user": users}).with_row_index("query")
        events = histories.with_columns(pl.col("user").cast(users.dtype, strict=False))
        if distinct:
            places = places.unique("user", keep="first", maintain_order=True)
        return events.join(places, on="user", how="inner", maintain_order="left").sort(
            "query", maintain_order=True
        )

    @cached_property
    def _recommendable(self) -> NDArray[np.bool_]:
        """Items that some list can hold, bool `[n_items]`: by an event in training, or by a text."""
        there = self.log.item_count > 0
        there[:FIRST_ID] = False
        if self.parts.retriever is not None:
            there[self.parts.retriever.by_text] = True
        return there

    def check_k(self, k: int) -> None:
        """Refuse a length of lists that no list can have.

        Raises:
            ValueError: it is below 1, or above the number of items that can be recommended.
        """
        most = int(self._recommendable.sum())
        if not isinstance(k, int | np.integer) or not 1 <= k <= most:
            raise ValueError(f"k is {k}; wanted 1 to {most:,}, the items that can be recommended")

    def _fill(
        self,
        lists: Lists,
        scorer: Cascade | CatalogScorer,
        queries: Queries,
        chosen: Rows,
        excluded: Excluded,
        k: int,
    ) -> None:
        """Put the lists of some queries, by a cascade or by popularity, where they belong, `chosen`."""
        part = _excluded_of(excluded, chosen)
        if isinstance(scorer, Cascade):
            found = scorer.lists(queries, k, part)
            lists.items[chosen] = found.items
            lists.score[chosen] = found.score
            for name, values in found.steps.items():
                lists.steps[name][chosen] = values
        else:
            lists.items[chosen], lists.score[chosen] = scorer.best(queries.log, queries.rows, k, part)

    def _empty_lists(self, count: int, k: int) -> Lists:
        """Lists without any item."""
        steps = {name: np.full((count, k), np.nan, np.float32) for name in self.cascade.names}
        return Lists(np.full((count, k), NO_ITEM, np.int32), np.full((count, k), -np.inf), steps)

    def _table(self, users: pl.Series, lists: Lists, lengths: Rows) -> pl.DataFrame:
        """The first items of each list as lines."""
        place = np.repeat(np.arange(len(lengths)), lengths)
        column = np.arange(len(place)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        items = lists.items[place, column]
        steps = {
            name: pl.Series(values[place, column], nan_to_null=True, dtype=pl.Float32)
            for name, values in lists.steps.items()
        }
        return pl.DataFrame(
            {
                "user": users[place],
                "item": self.maker.items.external(items),
                "score": pl.Series(lists.score[place, column], dtype=pl.Float64),
                "rank": (column + 1).astype(np.int32),
                **self._title_column(items),
                **steps,
            }
        )

    def _title_column(self, items: NDArray[np.integer]) -> dict[str, pl.Series]:
        return {} if self.item_titles is None else {"title": self.item_titles[np.asarray(items, np.int64)]}

    @cached_property
    def _unit_vectors(self) -> NDArray[np.float32]:
        """Item vectors of length 1, `[n_items, d]`; zero where there is none."""
        if self.parts.retriever is not None:
            is_known = self.parts.retriever.is_known[:, None]
            return normalize(np.where(is_known, self.parts.retriever.item_vectors, 0))
        retrieval = self.parts.retrieval
        if retrieval is None:
            raise ValueError(f"{self.name} has no item vectors; wanted a cascade with a retriever or an LM")
        return normalize(retrieval.searcher.vectors[: self.log.n_items])


@dataclass(frozen=True)
class Asked:
    """Users who are asked about.

    Attributes:
        users: external ids as they were given, `[U]`.
        seconds: Unix seconds `[U]`; None: after everything.
        own: events that they bring, sorted by `query`, the place of their user; None: none.
        problems: place of a user -> why he cannot be asked about, in a line.
    """

    users: pl.Series
    seconds: pl.Series | None
    own: pl.DataFrame | None
    problems: dict[int, str]

    def __len__(self) -> int:
        return len(self.users)

    def refuse_problems(self) -> None:
        """Raise a ValueError about the first user who cannot be asked about, if there is one."""
        if self.problems:
            place = min(self.problems)
            raise ValueError(f"user {self.users[place]!r}: {self.problems[place]}")

    def queries(self, maker: QueryMaker, places: range) -> Queries:
        """Queries of some users who stand side by side."""
        low, high = places.start, places.stop
        own = None
        if self.own is not None:
            first, last = np.searchsorted(self.own["query"].to_numpy(), (low, high)).tolist()
            own = self.own[first:last].with_columns(pl.col("query").cast(pl.Int64) - low)
        seconds = None if self.seconds is None else self.seconds[low:high]
        return maker.make(self.users[low:high], seconds, own)


def _column(table: pl.DataFrame, name: str, what: str) -> pl.Series:
    if name not in table.columns:
        raise ValueError(f"{what} has columns {', '.join(table.columns)}; wanted one named {name}")
    return table[name]


def second_of(time: object) -> int:
    """A time as Unix seconds; a date begins at midnight UTC, as does text without a zone.

    Args:
        time: seconds, ISO text, or a date.

    Raises:
        ValueError: it is no time, or one that is thousands of years away.
    """
    wanted = f"time={time!r}; wanted Unix seconds or ISO text, e.g. 2026-01-31T12:00"
    if isinstance(time, str):
        text = time.strip()
        try:
            time = int(text) if text.lstrip("-").isdigit() else datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(wanted) from None
    if isinstance(time, date) and not isinstance(time, datetime):
        time = datetime(time.year, time.month, time.day)
    if isinstance(time, datetime):
        second = (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    elif isinstance(time, bool) or not isinstance(time, int | float | np.integer | np.floating):
        raise ValueError(wanted)
    else:
        second = time if isinstance(time, int) else float(time)
    if not -LAST_SECOND <= second <= LAST_SECOND:  # nor is a NaN
        raise ValueError(f"time={time}; wanted a second before the year 10000")
    return int(second)


def _seconds(column: pl.Series) -> pl.Series:
    """A column of times as Unix seconds; null stays."""
    if column.dtype.is_numeric():
        return column.cast(pl.Int64)
    if column.dtype in (pl.Date, pl.Datetime):
        return column.dt.epoch("s").cast(pl.Int64)
    values = [None if time is None else second_of(time) for time in column.to_list()]
    return pl.Series(column.name, values, dtype=pl.Int64)
