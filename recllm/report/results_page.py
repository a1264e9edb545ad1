"""docs/results.md: its tables are filled in from `results/<dataset>/table.json`.

The prose of the page is written by hand. Between a line `<!-- generated: NAME -->` and the next
`<!-- end -->` stands the table that `BLOCKS` describes under that name. `python -m stages.document results`
fills all of them anew, and a test checks that the page is up to date.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from recllm.evaluation.results import read
from recllm.report.blocks import (
    Block,
    Column,
    Line,
    against,
    auc_and_loss,
    cascade,
    count,
    difference,
    each_seed,
    lines,
    metric,
    next_item,
    span,
    three_places,
)

MARKED = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.S)
"""A generated block: its first line, its name, its last line."""

PAPER = Column("the paper", published=True)

RANKING = (
    metric("hr@1", heading="HR@1 uniform", candidates="uniform20"),
    metric("ndcg@10", candidates="uniform20"),
    metric("hr@1", heading="HR@1 popular", candidates="popular20"),
    metric("ndcg@10", candidates="popular20"),
)

CATALOG = "popularity popularity-7-days transitions item-knn ease"
"""Baselines over the whole catalog, in the order of a table."""
UNTIMED_CATALOG = CATALOG.replace("popularity-7-days ", "")
"""Those that a log without times has."""

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
CASCADE = "args-be236c37"
"""Variant of the rows of retriever, SIM and LMs that order liked films anew."""


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
        [
            *lines(CATALOG + " als"),
            Line("sasrec-rectools", "RecTools' SASRec, one seed"),
            Line("retriever"),
        ],
        next_item("unseen", untied=True),
        variant="leave-one-out",
        heading="MovieLens-1M, leave-one-out, 6,040 test rows",
    ),
    "ml-1m-next-by-time": Block(
        "ml-1m",
        "next",
        "test/all/liked",
        [*lines(CATALOG), Line("retriever", variant=CASCADE)],
        next_item("unseen"),
        heading="MovieLens-1M by time, next liked film, 52,739 test rows",
    ),
    "ml-1m-next-cascade": Block(
        "ml-1m",
        "next",
        "test/uniform10000/liked",
        [
            *lines("transitions retriever retriever+sim retriever+sim+lm retriever+sim+sft"),
            Line("retriever+sim+s-dpo", "`retriever+sim+s-dpo`, K = 3", k=3),
        ],
        cascade("unseen"),
        variant=CASCADE,
        heading="MovieLens-1M by time, next liked film, 5,433 test rows",
    ),
    "beauty-next": Block(
        "amazon14-beauty",
        "next",
        "test/all/any",
        lines(UNTIMED_CATALOG),
        next_item("unseen"),
        heading="Beauty, leave-one-out, 22,363 test rows",
    ),
    "industrial-next": Block(
        "minionerec-industrial",
        "next",
        "test/all/any",
        lines(UNTIMED_CATALOG + " retriever"),
        next_item("catalog"),
        heading="Industrial and Scientific, 4,533 test rows",
    ),
    "industrial-next-known": Block(
        "minionerec-industrial",
        "next",
        "test/all/any",
        lines(UNTIMED_CATALOG + " retriever"),
        next_item("catalog"),
        variant="events.path-train_known.csv",
        heading="without the guessed rows, 4,533 test rows",
    ),
    "industrial-next-lm": Block(
        "minionerec-industrial",
        "next",
        "test/uniform2000/any",
        [
            *lines("transitions retriever retriever+lm retriever+sft"),
            Line("retriever+s-dpo", "`retriever+s-dpo`, K = 3", k=3),
        ],
        cascade("catalog"),
        variant="retriever+lora+next-title+stage2.fit.epochs-0.1",
        heading="Industrial and Scientific, 990 test rows",
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
