"""Tables of a document: which rows of which file of results they show, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from recllm.evaluation.results import ResultRow
from recllm.evaluation.tables import interval, number, p_values

Published = Mapping[str, Mapping[str, float | None]]
"""System -> its figures in the paper (`results/published.json`)."""

HEADINGS = {"auc": "AUC", "logloss": "log loss", "hr@1": "HR@1", "ndcg@10": "NDCG@10"}
"""Metric -> heading of its column."""


@dataclass(frozen=True)
class Line:
    """One line of a block.

    Attributes:
        name: the system; or what a column's `system` or `lm` is filled with.
        label: the first cell; empty: the name as code.
        variant: variant of the rows where it is not the block's.
        k: rejected titles in training; part of what says which row is meant.
    """

    name: str
    label: str = ""
    variant: str | None = None
    k: int | None = None


@dataclass(frozen=True)
class Column:
    """One column of a block.

    Attributes:
        heading: text of the heading.
        show: the cell of a row.
        system: which system's row, with `{}` for the line's name.
        lm: which LM's row, with `{}` for the line's name; empty: the block's.
        candidates: which candidate lists (ranking only).
        published: whether the cell is a figure of the paper; `show` is then not used.
    """

    heading: str
    show: Callable[[ResultRow], str] = lambda row: ""
    system: str = "{}"
    lm: str = ""
    candidates: str | None = None
    published: bool = False


@dataclass(frozen=True)
class Block:
    """One table: which rows of which file, and how they are shown.

    Attributes:
        dataset: folder of `results/`.
        task: `ctr`, `ranking` or `next`.
        row_set: as in the file.
        lines: top to bottom.
        columns: left to right, behind the line's label.
        variant: as in the file, empty for the default.
        lm: the LM of rows that have one; of several, the one that is shown.
        heading: heading of the first column.
    """

    dataset: str
    task: str
    row_set: str
    lines: Sequence[Line]
    columns: Sequence[Column]
    variant: str = ""
    lm: str = "tiny"
    heading: str = "system"

    def row(self, rows: Sequence[ResultRow], line: Line, column: Column) -> ResultRow:
        """The row that a cell shows.

        Raises:
            ValueError: if there is none, or more than one.
        """
        system = column.system.format(line.name)
        lm = column.lm.format(line.name) or self.lm
        variant = self.variant if line.variant is None else line.variant
        wanted = (self.task, self.row_set, system, variant, line.k, column.candidates)
        found = []
        for row in rows:
            got = (row.task, row.row_set, row.system, row.variant or "", row.k, row.candidates)
            if got == wanted and row.lm in (None, lm):
                found.append(row)
        if len(found) != 1:
            raise ValueError(
                f"results/{self.dataset}/table.json has {len(found)} rows of {wanted} with the LM {lm}, want "
                "one; mend BLOCKS in recllm/report/results_page.py"
            )
        return found[0]

    def markdown(self, rows: Sequence[ResultRow], published: Published) -> str:
        """The table in Markdown, lines that end in line breaks."""
        headings = [self.heading, *(column.heading for column in self.columns)]
        written = [headings, ["---"] * len(headings)]
        for line in self.lines:
            cells = [line.label or f"`{line.name}`"]
            for column in self.columns:
                if column.published:
                    cells.append(of_paper(published.get(line.name, {})))
                else:
                    cells.append(column.show(self.row(rows, line, column)))
            written.append(cells)
        return "".join(f"| {' | '.join(cells)} |\n" for cells in written)


def metric(name: str, heading: str = "", system: str = "{}", candidates: str | None = None) -> Column:
    """A column of one metric, a mean over seeds."""
    heading = heading or HEADINGS[name]
    return Column(heading, lambda row: number(row.metrics.get(name)), system=system, candidates=candidates)


def three_places(name: str, heading: str) -> Column:
    """A column of one metric that needs no fourth place."""

    def show(row: ResultRow) -> str:
        value = row.metrics.get(name)
        return "" if value is None else f"{value:.3f}".removeprefix("0")

    return Column(heading, show)


def count(
    name: str,
    heading: str,
    unit: float = 1,
    places: int = 0,
    system: str = "{}",
    candidates: str | None = None,
) -> Column:
    """A column of a cost (rows, weights, tokens, seconds), in multiples of `unit`."""

    def show(row: ResultRow) -> str:
        value = row.metrics.get(name)
        return "" if value is None else f"{value / unit:,.{places}f}"

    return Column(heading, show, system=system, candidates=candidates)


def auc_and_loss(system: str, lm: str) -> Column:
    """A column with AUC and log loss in one cell."""

    def show(row: ResultRow) -> str:
        return f"{number(row.metrics['auc'])} / {number(row.metrics['logloss'])}"

    return Column(f"`{system}`", show, system=system, lm=lm)


def of_seeds(name: str, write: Callable[[Sequence[float]], str], candidates: str | None = None) -> Column:
    """A column of the seeds' figures, as `write` puts them; empty where all are the same."""

    def show(row: ResultRow) -> str:
        values = [entry["metrics"][name] for entry in row.seeds]
        return "" if min(values) == max(values) else write(values)

    return Column("of the seeds", show, candidates=candidates)


def span(name: str) -> Column:
    """A column of the lowest and the highest of the seeds."""
    return of_seeds(name, lambda values: f"{number(min(values))} to {number(max(values))}")


def each_seed(name: str, candidates: str) -> Column:
    """A column of every seed's figure, in their order."""
    return of_seeds(name, lambda values: ", ".join(map(number, values)), candidates)


def difference(candidates: str | None = None, heading: str = "difference") -> Column:
    """A column of the difference to the system that a row is first of all compared with."""

    def show(row: ResultRow) -> str:
        if row.delta is None:
            return ""
        p = p_values([entry.get("p_value") for entry in row.seeds])
        return f"{interval(row.delta, row.interval95)} `{row.paired_with}`, {p}"

    return Column(heading, show, candidates=candidates)


def against(other: str, candidates: str | None = None, further: bool = False) -> Column:
    """A column of the difference to one system; `further`: not where it is a row's first comparison."""

    def show(row: ResultRow) -> str:
        if further and row.paired_with == other:
            return ""
        if row.paired_with == other and row.delta is not None:
            delta = row.delta
            bounds = row.interval95
            p = p_values([entry.get("p_value") for entry in row.seeds])
        elif other in row.against:
            delta = row.against[other]["delta"]
            bounds = row.against[other]["interval95"]
            p = p_values([entry["against"][other]["p_value"] for entry in row.seeds])
        else:
            return ""
        return f"{interval(delta, bounds)}, {p}"

    return Column(f"to `{other}`", show, candidates=candidates)


def of_paper(figures: Mapping[str, float | None]) -> str:
    """The paper's AUC and log loss, as far as it has them."""
    values = [number(figures.get(name)) for name in ("auc", "logloss")]
    return " / ".join(value for value in values if value)


def lines(names: str) -> list[Line]:
    """Lines of systems by their names."""
    return [Line(name) for name in names.split()]


def next_item(candidates: str, untied: bool = False) -> tuple[Column, ...]:
    """Columns of the next item over the whole catalog.

    Args:
        candidates: as in the file.
        untied: whether rows that no order of ties could change have columns of their own.
    """
    names = {"hr@10": "HR@10", "ndcg@10": "NDCG@10", "recall@500": "recall@500"}
    if untied:
        names |= {"hr@10/untied": "HR@10, untied", "ndcg@10/untied": "NDCG@10, untied"}
    figures = [metric(name, heading, candidates=candidates) for name, heading in names.items()]
    coverage = metric("coverage@10", "coverage@10", candidates=candidates)
    return *figures, coverage, difference(candidates, "difference in NDCG@10")


def cascade(candidates: str) -> tuple[Column, ...]:
    """Columns of what orders anew what a retriever found.

    Args:
        candidates: as in the file.
    """
    return (
        metric("hr@10", "HR@10", candidates=candidates),
        metric("ndcg@10", candidates=candidates),
        count("milliseconds", "ms a user", places=1, candidates=candidates),
        difference(candidates, "difference in NDCG@10"),
        against("retriever", candidates, further=True),
    )
