"""Was the language model worth it? The answer in words, and the picture beside it: systems around the CRM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from matplotlib.ticker import MaxNLocator

from recllm.evaluation.results import HEADLINE, ResultRow, by_table
from recllm.evaluation.tables import COLUMNS, interval, number, p_values, table_title

LM_STAGES = ("lm", "stage2", "stage3")
"""Stages whose systems are language models, untuned, tuned and aligned."""
LEVEL = 0.05
"""A difference counts if its interval leaves 0 out and its p is below this."""
REACH = 3.0
"""How far the picture goes: so many times the farthest bound of a language model."""


class Answer(StrEnum):
    """Whether a language model is above the CRM."""

    YES = "Yes"
    NO = "No"
    NOT_SHOWN = "Not shown"
    NOT_ASKED = "Not asked"


class Difference(NamedTuple):
    """A system minus the reference in the headline metric, with its 95 % interval and its p."""

    delta: float
    interval95: tuple[float, float] | None
    p_value: float | None

    @property
    def sign(self) -> int:
        """1: above; -1: below; 0: the two cannot be told apart, or nothing says how sure it is."""
        if self.interval95 is None or (self.p_value is not None and self.p_value >= LEVEL):
            return 0
        return int(self.interval95[0] > 0) - int(self.interval95[1] < 0)

    @property
    def words(self) -> str:
        """`+.0038 [+.0010, +.0060], p <= .002`."""
        return ", ".join(filter(None, [interval(self.delta, self.interval95), p_values([self.p_value])]))


@dataclass(frozen=True)
class Mark:
    """One system of the picture.

    Attributes:
        label: the system.
        value: its headline metric, in words.
        words: its difference to the reference; empty where nothing compares the two.
        sign: of that difference, see `Difference.sign`.
        point: place of the system, percent of the picture's width.
        bounds: places of the interval's bounds, as far as the picture goes; None: there is no interval, or it
            lies beyond.
        is_reference: whether the others are compared with it.
        is_lm: whether it is a language model.
    """

    label: str
    value: str
    words: str
    sign: int
    point: float
    bounds: tuple[float, float] | None
    is_reference: bool
    is_lm: bool

    @property
    def is_outside(self) -> bool:
        """Whether it lies beyond the picture's edge, where an arrow stands for it."""
        return not 0 <= self.point <= 100


@dataclass(frozen=True)
class Verdict:
    """What one task says.

    Attributes:
        task: `ctr`, `ranking` or `next`.
        answer: whether a language model is above the CRM.
        sentence: why, in words.
        details: further sentences.
        title: of the table that it is read from.
        metric: the headline metric's name in tables.
        reference: label of the system that the others are compared with, the picture's line.
        line: its place, percent of the picture's width.
        marks: the systems, best first.
        ticks: places on the picture and the differences that stand there.
    """

    task: str
    answer: Answer
    sentence: str
    details: list[str]
    title: str
    metric: str
    reference: str
    line: float
    marks: list[Mark]
    ticks: list[tuple[float, str]]


def verdicts(rows: Iterable[ResultRow]) -> list[Verdict]:
    """The verdict of each task that was evaluated.

    Of a task's tables one counts: that with the most rows of those that compare a language model with a CRM,
    and of several the one with the most such comparisons, then with the most systems, then the first.

    Args:
        rows: any rows; those whose headline metric is undefined (AUC of one class) are left out.
    """
    found = []
    groups = by_table(row for row in rows if row.metrics.get(HEADLINE[row.task]) is not None)
    for task in HEADLINE:
        tables = [group for group in groups if group[0].task == task]
        if tables:
            found.append(_verdict(max(tables, key=_weight)))
    return found


def difference(row: ResultRow, reference: ResultRow) -> Difference | None:
    """A row minus the reference, as the row or the reference says it; None where neither does."""
    own = _told(row, reference.system)
    if own is not None:
        return own
    other = _told(reference, row.system)
    if other is None:
        return None
    bounds = other.interval95
    return Difference(-other.delta, None if bounds is None else (-bounds[1], -bounds[0]), other.p_value)


def reference_of(rows: Sequence[ResultRow]) -> ResultRow:
    """The row that a table's others are measured by.

    That is the CRM that most language models are compared with, first of all in their own column; of several
    the best. Without a CRM it is what most rows are compared with, in the end the first row.
    """
    crms = [row for row in rows if row.stage == "stage1"]
    others = [row for row in rows if is_lm(row)] if crms else list(rows)

    def weight(row: ResultRow) -> tuple[float, ...]:
        paired = sum(other.paired_with == row.system for other in others)
        compared = sum(row.system in other.against for other in others)
        return paired, compared, _value(row)

    return max(crms or rows, key=weight)


def is_lm(row: ResultRow) -> bool:
    """Whether a row is a language model's; blends of one with the CRM are controls, and do not count."""
    return row.stage in LM_STAGES


def _weight(rows: list[ResultRow]) -> tuple[bool, int, int, int]:
    reference = reference_of(rows)
    compared = 0
    if reference.stage == "stage1":
        compared = sum(is_lm(row) and difference(row, reference) is not None for row in rows)
    return compared > 0, rows[0].rows, compared, len(rows)


def _verdict(rows: list[ResultRow]) -> Verdict:
    reference = reference_of(rows)
    differences = [None if row is reference else difference(row, reference) for row in rows]
    answer, sentence = _answer(rows, differences, reference)
    places = _Scale(rows, differences, reference)
    marks = []
    for row, apart in sorted(zip(rows, differences, strict=True), key=lambda pair: -_value(pair[0])):
        delta = _value(row) - _value(reference) if apart is None else apart.delta
        bounds = None if apart is None else apart.interval95
        mark = Mark(
            label=row.label,
            value=number(_value(row)),
            words="" if apart is None else apart.words,
            sign=0 if apart is None else apart.sign,
            point=places.percent(delta),
            bounds=None if bounds is None else places.span(bounds),
            is_reference=row is reference,
            is_lm=is_lm(row),
        )
        marks.append(mark)
    return Verdict(
        task=rows[0].task,
        answer=answer,
        sentence=sentence,
        details=_details(rows, differences, reference),
        title=table_title(rows[0]),
        metric=_metric(rows[0]),
        reference=reference.label,
        line=places.percent(0.0),
        marks=marks,
        ticks=places.ticks(),
    )


def _answer(
    rows: Sequence[ResultRow], differences: Sequence[Difference | None], reference: ResultRow
) -> tuple[Answer, str]:
    """The answer, and the sentence that says why."""
    pairs = zip(rows, differences, strict=True)
    compared = [(row, apart) for row, apart in pairs if is_lm(row) and apart is not None]
    if reference.stage != "stage1":
        return Answer.NOT_ASKED, "no CRM was evaluated that an LM could be above."
    if not compared:
        return Answer.NOT_ASKED, f"no LM was compared with the CRM {reference.label}."
    above = [(row, apart) for row, apart in compared if apart.sign > 0]
    row, apart = max(above or compared, key=lambda pair: pair[1].delta)
    figures = (
        f"{_metric(row)} {number(_value(row))} against {number(_value(reference))}, a difference of "
        f"{apart.words}."
    )
    if above:
        return Answer.YES, f"{row.label} is above the CRM {reference.label}: {figures}"
    best = f"no LM is above the CRM {reference.label}; the best of them, {row.label},"
    if apart.sign < 0:
        return Answer.NO, f"{best} is below it: {figures}"
    return Answer.NOT_SHOWN, f"{best} cannot be told apart from it: {figures}"


def _details(
    rows: Sequence[ResultRow], differences: Sequence[Difference | None], reference: ResultRow
) -> list[str]:
    """How many LMs are above and below, and what is best of all."""
    details = []
    signs = [apart.sign for row, apart in zip(rows, differences, strict=True) if is_lm(row) and apart]
    if len(signs) > 1 and reference.stage == "stage1":
        details.append(
            f"Of {len(signs)} LM systems {signs.count(1)} are above the CRM, {signs.count(-1)} below it, and "
            f"{signs.count(0)} cannot be told apart from it."
        )
    best = max(rows, key=_value)
    if not is_lm(best):
        place = list(rows).index(best)
        apart = differences[place]
        words = f", {apart.words} to {reference.label}" if apart is not None else ""
        details.append(f"Best of all is {best.label} with {_metric(best)} {number(_value(best))}{words}.")
    return details


class _Scale:
    """Differences -> places on the picture, percent of its width.

    The picture holds every language model and the reference; what is much farther off than these is cut.
    """

    def __init__(
        self, rows: Sequence[ResultRow], differences: Sequence[Difference | None], reference: ResultRow
    ) -> None:
        every = [0.0]
        near = [0.0]
        for row, apart in zip(rows, differences, strict=True):
            ends = [_value(row) - _value(reference)]
            if apart is not None:
                ends = [apart.delta, *(apart.interval95 or ())]
            every += ends
            if is_lm(row):
                near += ends
        reach = REACH * max(abs(end) for end in near)
        low = min(every)
        high = max(every)
        if reach:
            low = max(low, -reach)
            high = min(high, reach)
        margin = 0.04 * (high - low) or 1e-3
        self.low = low - margin
        self.high = high + margin

    def percent(self, delta: float) -> float:
        """The place of a difference."""
        return round(100 * (delta - self.low) / (self.high - self.low), 2)

    def span(self, bounds: tuple[float, float]) -> tuple[float, float] | None:
        """The part of an interval that the picture holds."""
        low, high = (min(max(self.percent(bound), 0.0), 100.0) for bound in bounds)
        return (low, high) if low < high else None

    def ticks(self) -> list[tuple[float, str]]:
        """A few round differences and their places."""
        values = MaxNLocator(nbins=4, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)
        inside = [float(value) for value in values if self.low <= value <= self.high]
        return [(self.percent(value), _short(value)) for value in inside]


def _short(value: float) -> str:
    """`+.02`: a round number, as short as it goes; `0` is the reference."""
    return "0" if abs(value) < 1e-12 else f"{value:+.4g}".replace("0.", ".", 1)


def _value(row: ResultRow) -> float:
    """The headline metric."""
    value = row.metrics[HEADLINE[row.task]]
    assert value is not None  # see `verdicts`
    return value


def _metric(row: ResultRow) -> str:
    return COLUMNS[row.task][HEADLINE[row.task]]


def _told(row: ResultRow, other: str) -> Difference | None:
    """What a row says of its difference to another system."""
    delta = row.delta
    bounds = row.interval95
    p_value = row.p_value
    if row.paired_with != other:
        if other not in row.against:
            return None
        entry = row.against[other]
        delta = entry["delta"]
        bounds = entry["interval95"]
        p_value = entry.get("p_value")
    if delta is None:
        return None
    return Difference(delta, None if bounds is None else (bounds[0], bounds[1]), p_value)
