"""docs/results.md: its tables are filled in from `results/<dataset>/table.json`.

The prose of the page is written by hand. Between a line `<!-- generated: NAME -->` and the next
`<!-- end -->` stands the table that `BLOCKS` describes under that name. `python -m stages.document results`
fills all of them anew, and a test checks that the page is up to date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recllm.evaluation.results import ResultRow, read
from recllm.evaluation.tables import interval, number

MARKED = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.S)
"""A generated block: its first line, its name, its last line."""

Published = Mapping[str, Mapping[str, float | None]]
"""System -> its figures in the paper (`results/published.json`)."""


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
        task: `ctr` or `ranking`.
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


def count(name: str, heading: str, unit: float = 1, places: int = 0, system: str = "{}") -> Column:
    """A column of a cost (rows, weights, tokens, seconds), in multiples of `unit`."""

    def show(row: ResultRow) -> str:
        value = row.metrics.get(name)
        return "" if value is None else f"{value / unit:,.{places}f}"

    return Column(heading, show, system=system)


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
            delta, bounds = row.delta, row.interval95
            p = p_values([entry.get("p_value") for entry in row.seeds])
        elif other in row.against:
            delta, bounds = row.against[other]["delta"], row.against[other]["interval95"]
            p = p_values([entry["against"][other]["p_value"] for entry in row.seeds])
        else:
            return ""
        return f"{interval(delta, bounds)}, {p}"

    return Column(f"to `{other}`", show, candidates=candidates)


def of_paper(figures: Mapping[str, float | None]) -> str:
    """The paper's AUC and log loss, as far as it has them."""
    values = [number(figures.get(name)) for name in ("auc", "logloss")]
    return " / ".join(value for value in values if value)


def p_values(values: Sequence[float | None]) -> str:
    """`p = .004`, or over seeds `p .004 to .046`, the least and the largest; see `p_value`."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    least, largest = p_value(min(known)), p_value(max(known))
    if least != largest:
        return f"p {least} to {largest}"
    return f"p {largest}" if largest.startswith("<=") else f"p = {largest}"


def p_value(value: float) -> str:
    """Two places, three below a tenth; `<= .002` where the bootstrap's draws can tell no smaller one."""
    if value <= LEAST_P:
        return f"<= {LEAST_P:.3f}".replace("0.", ".")
    text = f"{value:.3f}" if value < 0.0995 else f"{value:.2f}"
    return text.removeprefix("0")


def lines(names: str) -> list[Line]:
    """Lines of systems by their names."""
    return [Line(name) for name in names.split()]


LEAST_P = 0.001999
"""The least p-value of the tracked figures, rounded up: 2 / 1,001, where none of 1,000 draws is beyond 0."""
HEADINGS = {"auc": "AUC", "logloss": "log loss", "hr@1": "HR@1", "ndcg@10": "NDCG@10"}

PAPER = Column("the paper", published=True)

RANKING = (
    metric("hr@1", heading="HR@1 uniform", candidates="uniform20"),
    metric("ndcg@10", candidates="uniform20"),
    metric("hr@1", heading="HR@1 popular", candidates="popular20"),
    metric("ndcg@10", candidates="popular20"),
)

CATALOG = "popularity popularity-7-days transitions item-knn ease"
"""Baselines over the whole catalog, in the order of a table."""

STACKED = (
    Line("refit"),
    Line("blend", "`blend` of `sim` and `lora`"),
    Line("blend-refit"),
)

ITEMS = "lm-vectors+hard-0+prepare.split-items+stage1.fit.epochs-0.4"
"""Variant of the rows of items that nobody has rated."""
UNRATED = "popularity popularity-by-category text-knn din din-lm sim sim-lm"
"""What is asked about them."""
NO_GATE = "ranker+lora+preference"


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


BLOCKS = {
    "ml-1m-crms": Block(
        "ml-1m",
        "ctr",
        "test/all",
        lines("popularity deepfm autoint dcnv2 gru4rec caser sasrec din sim"),
        (metric("auc"), span("auc"), metric("logloss"), difference(), PAPER),
        variant="share-0",
        heading="CTR, all 97,002 test rows",
    ),
    "ml-1m-crms-newest": Block(
        "ml-1m",
        "ctr",
        "test/all",
        lines("popularity deepfm autoint dcnv2 gru4rec caser sasrec din sim"),
        (metric("auc"), span("auc"), metric("logloss"), difference(), PAPER),
        heading="CTR, all 97,002 test rows",
    ),
    "ml-1m-items": Block(
        "ml-1m",
        "ctr",
        "test/all",
        lines(UNRATED),
        (metric("auc"), metric("logloss"), difference()),
        variant=ITEMS,
        lm="smollm2-135m-instruct",
        heading="CTR, 9,569 test rows of 370 unrated items",
    ),
    "ml-1m-items-ranking": Block(
        "ml-1m",
        "ranking",
        "test/2000",
        lines(UNRATED),
        (
            metric("hr@1", "HR@1, uniform", candidates="uniform20"),
            metric("ndcg@10", "NDCG@10", candidates="uniform20"),
            metric("hr@1", "HR@1, popular", candidates="popular20"),
            metric("ndcg@10", "NDCG@10", candidates="popular20"),
        ),
        variant=ITEMS,
        lm="smollm2-135m-instruct",
        heading="20 unrated items, 2,000 test rows",
    ),
    "ml-1m-paper": Block(
        "ml-1m",
        "ctr",
        "test/first30000",
        [*lines("sim sim-heldout lm tallrec rella lora reclora"), *STACKED],
        (metric("auc"), span("auc"), metric("logloss"), against("sim"), against("blend"), PAPER),
        variant="paper",
        heading="CTR, first 30,000 test rows",
    ),
    "ml-1m-smollm2": Block(
        "ml-1m",
        "ctr",
        "test/uniform1000",
        [*lines("sim sim-heldout lm lora reclora"), *STACKED],
        (metric("auc"), metric("logloss"), against("sim"), against("blend")),
        variant="probe",
        lm="smollm2-135m-instruct",
        heading="CTR, 1,000 test rows",
    ),
    "ml-1m-sim-lm": Block(
        "ml-1m",
        "ctr",
        "test/all",
        lines("sim-lm"),
        (metric("auc"), metric("logloss"), difference()),
        lm="smollm2-135m-instruct",
        variant="share-0",
        heading="CTR, 97,002 test rows",
    ),
    "ml-1m-more-text": Block(
        "ml-1m",
        "ctr",
        "test/first30000",
        [Line("tiny", "`LM=tiny`, AUC / log loss"), Line("tiny-24m", "`LM=tiny-24m`")],
        [auc_and_loss(system, "{}") for system in ("lm", "lora", "reclora", "blend", "blend-refit")],
        variant="paper",
        heading="",
    ),
    "ml-1m-wide": Block(
        "ml-1m",
        "ctr",
        "test/uniform10000",
        lines(
            "sim sim-heldout lm ctr-bert tallrec rella lora lora-wide dora rslora vera adalora pissa milora "
            "random-svd reclora reclora-factor reclora-core reclora-milora reclora-pissa reclora-random-svd "
            "reclora-in-sample reclora-uniform reclora-shuffled refit blend blend-refit"
        ),
        (
            metric("auc"),
            metric("logloss"),
            against("sim"),
            against("blend"),
            three_places("forgotten", "forgets"),
            three_places("update", "update"),
        ),
        variant="wide",
        heading="CTR, 10,000 test rows",
    ),
    "ml-1m-few2many": Block(
        "ml-1m",
        "ctr",
        "test/uniform10000",
        [
            Line("last776", "776, 0.1 %"),
            Line("last7760", "7,760, 1 %"),
            Line("last38800", "38,800, 5 %"),
            Line("last70000", "70,000, 9 %"),
        ],
        [
            *(
                metric("auc", heading=f"`{system}`", system=f"{system}+subsample-{{}}")
                for system in ("lora", "reclora", "refit", "blend")
            ),
            count("tuning_seconds", "seconds, `lora`", system="lora+subsample-{}"),
            count("tuning_seconds", "seconds, `reclora`", system="reclora+subsample-{}"),
        ],
        variant="paper",
        heading="tuning rows",
    ),
    "ml-1m-sweeps": Block(
        "ml-1m",
        "ctr",
        "test/uniform10000",
        [
            Line("num_meta-4", "`stage2.adapter.num_meta` (N_m) = 4"),
            Line("num_meta-16", "`stage2.adapter.num_meta` = 16"),
            Line("num_meta-64", "`stage2.adapter.num_meta` = 64"),
            Line("r-2", "`stage2.adapter.r` = 2"),
            Line("r-32", "`stage2.adapter.r` = 32"),
            Line("history-5", "`prompt.history` (k_short) = 5"),
            Line("history-20", "`prompt.history` = 20"),
            Line("stage1.retrieved-10", "`stage1.retrieved` (k_long) = 10"),
        ],
        (
            metric("auc", system="reclora+{}"),
            count("tuning_trainable", "million weights that train", 1e6, 2, "reclora+{}"),
            count("tuning_tokens", "million tokens", 1e6, 2, "reclora+{}"),
            count("tuning_seconds", "seconds", system="reclora+{}"),
        ),
        variant="paper",
        heading="key = value",
    ),
    "ml-1m-preference": Block(
        "ml-1m",
        "ranking",
        "test/2000",
        [
            *lines("popularity cooccurrence cooccurrence-directed"),
            Line("sim", "`sim` (a CTR logit is no ranker)", variant="share-0"),
            Line("crm-ranker", "`crm-ranker`, which gates"),
            Line("lm", "`lm`, untuned"),
            Line("sft", "`sft` of `lora`, no gate", NO_GATE),
            Line("sft-continued", "`sft-continued` of `lora`", NO_GATE),
            Line("dpo", "`dpo` of `lora`, K = 1", NO_GATE, 1),
            *(Line("s-dpo", f"`s-dpo` of `lora`, K = {k}", NO_GATE, k) for k in (3, 7, 15)),
            Line("sft", "`sft` of `reclora`"),
            Line("sft-continued"),
            Line("dpo-item", "`dpo-item`, K = 1", k=1),
            *(Line("s-dpo-item", f"`s-dpo-item`, K = {k}", k=k) for k in (3, 7, 15)),
            Line("s-dpo-item-hard", "`s-dpo-item-hard`, K = 3", k=3),
        ],
        (
            *RANKING,
            each_seed("hr@1", "popular20"),
            difference("popular20", "difference, HR@1 popular"),
            against("crm-ranker", "popular20"),
        ),
        variant="ranker+preference",
        heading="next liked film, 2,000 test rows",
    ),
    "ml-1m-preference-long": Block(
        "ml-1m",
        "ranking",
        "test/2000",
        [
            Line("crm-ranker"),
            *lines("sft sft-continued"),
            Line("dpo-item", "`dpo-item`, K = 1", k=1),
            *(Line("s-dpo-item", f"`s-dpo-item`, K = {k}", k=k) for k in (3, 7, 15)),
        ],
        (
            *RANKING,
            each_seed("hr@1", "popular20"),
            against("sft-continued", "popular20"),
            against("dpo-item", "popular20"),
            against("crm-ranker", "popular20"),
        ),
        variant="ranker+preference-long",
        heading="next liked film, 2,000 test rows",
    ),
    "demo-ctr": Block(
        "demo",
        "ctr",
        "test/all",
        [
            *lines("popularity din sim"),
            Line("sim-heldout", "`sim-heldout`, without the tuning rows; it gates `reclora`"),
            Line("lm", "`lm`, untuned"),
            *lines("lora reclora"),
            *STACKED,
        ],
        (metric("auc"), metric("logloss"), difference(), against("sim", further=True)),
        heading="CTR, all 4,807 test rows",
    ),
    "demo-ranking": Block(
        "demo",
        "ranking",
        "test/2000",
        [
            *lines("popularity cooccurrence-directed crm-ranker sft sft-continued"),
            Line("dpo", k=1),
            Line("s-dpo", "`s-dpo`, K = 3", k=3),
        ],
        (
            metric("hr@1", heading="HR@1 uniform", candidates="uniform20"),
            metric("hr@1", heading="HR@1 popular", candidates="popular20"),
            difference("uniform20", "difference, uniform"),
        ),
        heading="next liked film, 2,000 test rows",
    ),
    "ml-1m-next": Block(
        "ml-1m",
        "next",
        "test/all/any",
        lines(CATALOG + " als retriever"),
        next_item("unseen", untied=True),
        variant="leave-one-out",
        heading="MovieLens-1M, leave-one-out, 6,040 test rows",
    ),
    "ml-1m-next-by-time": Block(
        "ml-1m",
        "next",
        "test/all/liked",
        lines(CATALOG),
        next_item("unseen"),
        heading="MovieLens-1M by time, next liked film, 52,739 test rows",
    ),
    "beauty-next": Block(
        "amazon14-beauty",
        "next",
        "test/all/any",
        lines(CATALOG.replace("popularity-7-days ", "")),
        next_item("unseen"),
        heading="Beauty, leave-one-out, 22,363 test rows",
    ),
    "industrial-next": Block(
        "minionerec-industrial",
        "next",
        "test/all/any",
        lines(CATALOG.replace("popularity-7-days ", "") + " retriever"),
        next_item("catalog"),
        heading="Industrial and Scientific, 4,533 test rows",
    ),
    "lastfm-titles": Block(
        "sdpo-lastfm",
        "ranking",
        "test/2495",
        [
            *lines("popularity cooccurrence cooccurrence-directed din crm-ranker lm sft sft-continued"),
            Line("dpo", k=1),
            Line("s-dpo", "`s-dpo`, K = 3", k=3),
        ],
        (
            metric("hr@1", candidates="given20"),
            metric("ndcg@10", candidates="given20"),
            metric("valid_ratio", "valid ratio", candidates="given20"),
            difference(candidates="given20"),
        ),
        variant="din+lora+next-title+stage2.fit.epochs-0.3",
        heading="20 given artists, 2,495 test rows",
    ),
}
"""Name of a block on the page -> what stands in it."""


def fill(page: str, results: Path) -> str:
    """The page with all its generated blocks written anew.

    Args:
        page: Markdown with marked blocks.
        results: the folder `results/`.

    Raises:
        ValueError: if a block's name is unknown, or a row of a block is missing.
    """
    content = json.loads((results / "published.json").read_text())
    published = {str(figures["system"]): figures for figures in content["rows"]}

    def written(match: re.Match[str]) -> str:
        first, name, last = match.groups()
        if name not in BLOCKS:
            raise ValueError(f"a block is named {name!r}, want one of {', '.join(BLOCKS)}")
        block = BLOCKS[name]
        rows = read(results / block.dataset / "table.json")
        return first + block.markdown(rows, published) + last

    return MARKED.sub(written, page)
