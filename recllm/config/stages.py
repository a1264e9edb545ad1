"""How stages 1 to 3 are trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from recllm.crm.config import CrmConfig
from recllm.errors import check, check_choices
from recllm.eventlog.config import RejectedFrom
from recllm.eventlog.names import AUTO, check_hold_out, check_sized_rows
from recllm.lm.config import AdapterConfig, Precision


@dataclass(frozen=True)
class FitConfig:
    """How a module is trained; every stage has one."""

    epochs: float = 1.0
    """Passes over the stage's rows; a fraction ends early."""
    batch_size: int = 128
    """Rows of one optimizer step over all devices together (global batch); in stage 2, titles among them."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup: float = 0.05
    """Share of all steps in which the learning rate rises linearly from 0; it then falls linearly to 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, per step and unit of learning rate."""
    clip: float = 1.0
    """Largest L2 norm of all gradients together; larger ones are scaled down (0: never)."""
    validations: int = 4
    """Validations over the whole training, evenly spaced; the last step is always one."""
    patience: int = 3
    """Validations without a better score (AUC; HR@1 where titles are ranked) before training stops early."""
    precision: Precision = "32-true"
    """Lightning's precision; `mixed` keeps the trained weights in float32, `bf16-true` a gate alone."""
    valid_rows: str = "uniform2000"
    """Row set of the validation split that selects the checkpoint: all, first<n>, last<n>, uniform<n>, a
    fraction; `auto`: all, or 200,000 drawn of more. Not of stage 3, which selects on stored lists."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_choices("", self)  # which stage's it is, it does not know
        check(self.epochs > 0, "epochs", self.epochs, "more than 0")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1 row")
        check(self.lr > 0, "lr", self.lr, "more than 0")
        check(0 <= self.warmup < 1, "warmup", self.warmup, "a share from 0 to below 1")
        check(self.validations >= 1, "validations", self.validations, "at least 1")
        check_sized_rows("valid_rows", self.valid_rows)


@dataclass(frozen=True)
class NextItemConfig:
    """How a retriever is trained to find the next item of a history, over the whole catalog."""

    targets: Literal["any", "liked"] = "any"
    """Which events are to be found: `any`, or `liked` ones only; all are read in either case."""
    seen: Literal["removed", "kept"] = "removed"
    """Whether validation ranks items of a row's history, or leaves them out."""
    full_softmax: int = 20_000
    """Up to so many items the softmax is over all of them; beyond, over sampled ones."""
    sampled: int = 2048
    """Items that a step samples where the softmax is sampled: half uniformly, half by training events (Yang
    et al. 2020, mixed negative sampling), with logQ correction."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_choices("stage1.next", self)
        check(self.full_softmax >= 0, "stage1.next.full_softmax", self.full_softmax, "0 or more items")
        check(self.sampled >= 2, "stage1.next.sampled", self.sampled, "2 or more items")


@dataclass(frozen=True)
class NewestConfig:
    """The last pass of a CRM's training, over the newest rows alone; of objective `ctr`."""

    share: float = 0.0
    """Share of the training rows, the latest of them, that are gone over once more behind all other passes
    (0: none, as the papers do). Not where the log has no times."""
    lr: float = 1.0
    """Peak learning rate of this pass, as a multiple of `stage1.fit.lr`; it rises and falls as that one."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check(0 <= self.share <= 1, "stage1.newest.share", self.share, "a share from 0 to 1")
        check(self.lr > 0, "stage1.newest.lr", self.lr, "more than 0")


@dataclass(frozen=True)
class Stage1Config:
    """The conventional recommendation model (CRM)."""

    crm: CrmConfig = field(default_factory=lambda: CrmConfig(statistics=True))
    recent: int = 60
    """Latest history events that the CRM reads."""
    retrieved: int = 0
    """Retrieved history events that it reads besides (SIM only)."""
    sparse_tables: bool = False
    """Whether user and item tables are trained by rows: a step touches those that its batch looked up. For
    tables of millions of rows; moments and weight decay of a row then move only with it (`RowAdamW`)."""
    objective: Literal["ctr", "rank", "next"] = "ctr"
    """`ctr`: binary cross-entropy on the label; `rank`: softmax of a liked item against sampled negatives;
    `next`, of the retriever only: softmax over the catalog of the next event, at every event of a history."""
    next: NextItemConfig = field(default_factory=NextItemConfig)
    negatives: int = 7
    """Sampled negatives of a liked item, objective `rank` only; half uniform, half by popularity."""
    rank_rows: int = 100_000
    """Liked rows drawn in all, objective `rank` only (`fit.epochs` is not read there)."""
    hold_out: str = "none"
    """Row set of the training split that is left out: none, uniform<n>, last<n> or a fraction. With
    `stage2.representation=out_of_fold` the plan sets it to `subsample`, in a folder of its own."""
    newest: NewestConfig = field(default_factory=NewestConfig)
    half_life: float = 0.0
    """Share of the training rows, in time order, over which a row's weight in the loss halves with its age;
    the mean weight is 1 (0: all rows weigh the same, as in the papers). Not where the log has no times."""
    cold_share: float | None = None
    """Share of validation rows with a cold user (no training sample) in what selects, as it is to be expected
    in use: of the rows that are too many, a seeded draw is left out (null: rows as they are)."""
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(batch_size=1024, warmup=0.02, clip=10.0, valid_rows=AUTO)
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        check_choices("stage1", self)
        check(self.recent >= 1, "stage1.recent", self.recent, "at least 1 event")
        least = 1 if self.crm.search else 0
        check(self.retrieved >= least, "stage1.retrieved", self.retrieved, f"at least {least} events")
        check(self.negatives >= 1, "stage1.negatives", self.negatives, "at least 1 item")
        check_hold_out("stage1.hold_out", self.hold_out)
        check(self.half_life >= 0, "stage1.half_life", self.half_life, "0 or a share of the training rows")
        cold = self.cold_share
        check(cold is None or 0 <= cold <= 1, "stage1.cold_share", cold, "null or a share from 0 to 1")
        retrieves = self.crm.name == "retriever"
        wanted = "next with stage1.crm.name=retriever, and with no other"
        check((self.objective == "next") == retrieves, "stage1.objective", self.objective, wanted)

    @property
    def monitor(self) -> str:
        """The validation score that selects: AUC, or a figure of the ranks of what is trained to rank."""
        return {"ctr": "valid/auc", "rank": "valid/hr@1", "next": "valid/ndcg@10"}[self.objective]

    @property
    def inputs(self) -> dict[str, Any]:
        """What the CRM's batches hold: `recent` and `retrieved` events, `search` for those, `statistics`."""
        search = self.crm.search
        return {
            "recent": self.recent,
            "retrieved": self.retrieved if search else 0,
            "search": search,
            "statistics": self.crm.statistics,
        }


@dataclass(frozen=True)
class Stage2Config:
    """Tuning the LM with a (personalized) LoRA on the subsample."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    license: str = ""
    """SPDX identifier under which the adapter may be shared, for its model card; empty: not stated."""
    mixed_prompts: bool = False
    """Train on every row twice, with the events nearest to the target and with the most recent (ReLLa)."""
    representation: Literal["crm", "out_of_fold"] = "crm"
    """Which CRM gates: `crm`: the one that was trained on all samples, those of the subsample among them;
    `out_of_fold`: one of the same settings that never saw the subsample's samples."""
    gate_first: float = 0.0
    """Passes over the subsample in which gate and LM head's meta-LoRAs learn alone, before all do; where the
    adapter is gated. The LM head has to be one of its target modules."""
    title_share: float = 0.2
    """Share of a batch's rows that ask for the next title instead of Yes/No (0: Yes/No only)."""
    title_weight: float = 0.2
    """Weight of the next-title loss (mean over titles, summed over a title's tokens) against the Yes/No
    loss."""
    valid_lists: int = 500
    """Stored validation rows, each with its candidates, on whose HR@1 the checkpoint for stage 3 is selected;
    of every kind of list, the first so many."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(lr=2e-3, patience=4, valid_rows="uniform4000"))

    def __post_init__(self) -> None:
        """Check ranges."""
        check_choices("stage2", self)
        check(self.gate_first >= 0, "stage2.gate_first", self.gate_first, "0 or more passes")
        check(0 <= self.title_share < 1, "stage2.title_share", self.title_share, "a share from 0 to below 1")
        check(self.valid_lists >= 1, "stage2.valid_lists", self.valid_lists, "at least 1 row")


@dataclass(frozen=True)
class Stage3Config:
    """Preference alignment of a stage-2 adapter."""

    start: str = "reclora"
    """System of stage 2 to start from; it is also the frozen reference."""
    task: Literal["titles", "answers"] = "titles"
    """What is compared: `titles`, the log-probability of a candidate's title; `answers`, point-wise: that of
    Yes to each candidate, in a prompt and with a gate of its own. They start from the stage-2 checkpoint with
    the best validation HR@1 and AUC."""
    gate: Literal["list", "item"] = "list"
    """What gates a title, where titles are compared: `list`, the mean of all candidates' representations, as
    in stage 2; `item`, its own candidate's, while the prompt keeps the mean. For losses that contrast titles
    only: a chosen title's likelihood behind its own gate is learned by reading the item off the gate."""
    loss: Literal["softmax-dpo", "dpo-pairwise", "dmpo", "mppo", "sft"] = "softmax-dpo"
    """`softmax-dpo` (K = 1 is DPO), `dpo-pairwise`, `dmpo`, `mppo` (no reference): see `recllm/losses.py`.
    Or as a control `sft`: the chosen title's likelihood, as many steps."""
    beta: float = 1.0
    """Weight of the log-ratio to the reference in a reward."""
    length_normalize: bool = False
    """Whether rewards are of the log-probability per token instead of its sum, which titles are ranked by."""
    sft_weight: float = 0.0
    """Weight of the chosen title's negative log-likelihood (nats a token), added to the loss."""
    label_smoothing: float = 0.0
    """Probability, below 0.5, that a rejected title is in truth the better one."""
    negatives: int = 3
    """Rejected titles K of a row, drawn anew in every pass; fewer than `prepare.candidates`."""
    negatives_from: RejectedFrom = "random"
    """Which K of a row's candidates: `random`; hard ones, which the `reference` or the gate's `crm` scores
    highest; `half`: half of them the reference's highest, the others random."""
    lists: Literal["mixed", "uniform", "popular"] = "mixed"
    """How the other candidates of a row, `prepare.candidates` - 1, are drawn: `uniform`, `popular` (in
    proportion to training events) or `mixed` (by turns)."""
    rows: int = 4000
    """Liked training rows to align on, disjoint from the stage-2 subsample where the data suffice."""
    valid_lists: int = 0
    """Stored validation rows, each with its candidates, on whose HR@1 the checkpoint is selected; of every
    kind of list, the first so many (0: 500, and 150 where answers are compared, of 20 prompts a row)."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(batch_size=32, lr=5e-4, patience=4))

    def __post_init__(self) -> None:
        """Check ranges."""
        check_choices("stage3", self)
        if self.task == "answers":  # the likelihood of Yes alone is best where every answer is Yes
            wanted = "a loss that contrasts items where stage3.task is answers, e.g. softmax-dpo"
            check(self.loss != "sft", "stage3.loss", self.loss, wanted)
        if self.gate == "item":
            wanted = "list where a title's likelihood is learned: its own gate names the item"
            check(self.loss != "sft" and self.sft_weight == 0, "stage3.gate", self.gate, wanted)
        check(self.negatives >= 1, "stage3.negatives", self.negatives, "at least 1 rejected title")
        check(self.beta > 0, "stage3.beta", self.beta, "more than 0")
        check(self.sft_weight >= 0, "stage3.sft_weight", self.sft_weight, "0 or more")
        smoothing = self.label_smoothing
        check(0 <= smoothing < 0.5, "stage3.label_smoothing", smoothing, "a probability from 0 to below 0.5")
        check(self.rows >= 1, "stage3.rows", self.rows, "at least 1 row")
        check(self.valid_lists >= 0, "stage3.valid_lists", self.valid_lists, "0 or more rows")
        valid_rows = self.fit.valid_rows
        wanted = "none: stage 3 selects its checkpoint on stored validation lists"
        check(valid_rows == FitConfig.valid_rows, "stage3.fit.valid_rows", valid_rows, wanted)
