"""Every configuration key, typed: what a YAML file or the command line may set, and what it means."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from typing import Any

from recllm.checks import check, check_hold_out, check_rows
from recllm.crm.config import CrmConfig
from recllm.data.config import PrepareConfig
from recllm.data.source import SourceConfig
from recllm.data.wording import Wording
from recllm.lm.config import AdapterConfig, EncoderConfig, LmStageConfig, TowersConfig
from recllm.retrieval.config import RetrievalConfig
from recllm.tuning.config import TuneConfig

EXECUTION = "trainer"
"""The section that says how, not what: it makes no finished stage stale."""


@dataclass(frozen=True)
class DatasetConfig:
    """Which data, and how an item is described to an LM."""

    name: str = "demo"
    """Name of the data set; its recipe is `data/<name>`, hyphens as underscores, or `source` describes it."""
    card: str = ""
    """What the LM reads of an item (vectors, pretraining): a format string over the items table's columns."""


@dataclass(frozen=True)
class PromptConfig:
    """What a prompt shows."""

    history: int = 10
    """Short history: events in a prompt."""
    retrieved: bool = True
    """Whether a Yes/No prompt shows the events nearest to the target (true) or the most recent (false)."""
    statistics: bool = False
    """Whether a Yes/No prompt says how often user, item and its category were met before, and how liked."""
    list_candidates: bool = False
    """Whether a next-title prompt lists the candidates; a tiny LM does not learn to read the list."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check(self.history >= 1, "prompt.history", self.history, "at least 1 event")


@dataclass(frozen=True)
class FitConfig:
    """How a module is trained; every stage has one."""

    epochs: float = 1.0
    """Passes over the stage's rows; a fraction ends early."""
    batch_size: int = 128
    """Rows of one optimizer step over all devices together (global batch)."""
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
    """Validations without a better score before training stops early."""
    precision: str = "32-true"
    """Lightning's precision: 32-true, bf16-mixed, bf16-true, 16-mixed."""
    valid_rows: str = "uniform2000"
    """Row set of the validation split that selects the checkpoint: all, first<n>, last<n>, uniform<n>, a
    fraction."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check(self.epochs > 0, "epochs", self.epochs, "more than 0")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1 row")
        check(self.lr > 0, "lr", self.lr, "more than 0")
        check(0 <= self.warmup < 1, "warmup", self.warmup, "a share from 0 to below 1")
        check(self.validations >= 1, "validations", self.validations, "at least 1")
        precisions = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
        check(self.precision in precisions, "precision", self.precision, f"one of {', '.join(precisions)}")
        check_rows("valid_rows", self.valid_rows)


@dataclass(frozen=True)
class Stage1Config:
    """The conventional recommendation model (CRM)."""

    crm: CrmConfig = field(default_factory=CrmConfig)
    recent: int = 60
    """Latest history events that the CRM reads."""
    retrieved: int = 0
    """Retrieved history events that it reads besides (SIM only)."""
    sparse_tables: bool = False
    """Whether user and item tables are trained by rows: a step touches those that its batch looked up. For
    tables of millions of rows; moments and weight decay of a row then move only with it (`RowAdamW`)."""
    objective: str = "ctr"
    """`ctr`: binary cross-entropy on the label; `rank`: softmax of a liked item against sampled negatives."""
    negatives: int = 7
    """Sampled negatives of a liked item, objective `rank` only; half uniform, half by popularity."""
    rank_rows: int = 100_000
    """Liked rows drawn in all, objective `rank` only (`fit.epochs` is not read there)."""
    hold_out: str = "none"
    """Row set of the training split that is left out: none, uniform<n>, last<n> or a fraction. With
    `stage2.representation=out_of_fold` the plan sets it to `subsample`, in a folder of its own."""
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        check(self.objective in ("ctr", "rank"), "stage1.objective", self.objective, "ctr or rank")
        check(self.recent >= 1, "stage1.recent", self.recent, "at least 1 event")
        least = 1 if self.crm.search else 0
        check(self.retrieved >= least, "stage1.retrieved", self.retrieved, f"at least {least} events")
        check(self.negatives >= 1, "stage1.negatives", self.negatives, "at least 1 item")
        check_hold_out("stage1.hold_out", self.hold_out)

    @property
    def monitor(self) -> str:
        """The validation score that selects: AUC, or the hit rate at 1 of what is trained to rank."""
        return "valid/auc" if self.objective == "ctr" else "valid/hr@1"

    @property
    def inputs(self) -> dict[str, Any]:
        """What the CRM's batches hold: `recent` and `retrieved` events, `search` for those, `statistics`."""
        found = self.retrieved if self.crm.search else 0
        known = {"search": self.crm.search, "statistics": self.crm.statistics}
        return {"recent": self.recent, "retrieved": found} | known


@dataclass(frozen=True)
class Stage2Config:
    """Tuning the LM with a (personalised) LoRA on the subsample."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    license: str = ""
    """SPDX identifier under which the adapter may be shared, for its model card; empty: not stated."""
    mixed_prompts: bool = False
    """Train on every row twice, with the events nearest to the target and with the most recent (ReLLa)."""
    representation: str = "crm"
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
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        known = ("crm", "out_of_fold")
        check(self.representation in known, "stage2.representation", self.representation, " or ".join(known))
        check(self.gate_first >= 0, "stage2.gate_first", self.gate_first, "0 or more passes")
        check(0 <= self.title_share < 1, "stage2.title_share", self.title_share, "a share from 0 to below 1")


@dataclass(frozen=True)
class Stage3Config:
    """Preference alignment of a stage-2 adapter."""

    start: str = "reclora"
    """System of stage 2 to start from; it is also the frozen reference."""
    task: str = "titles"
    """What is compared: `titles`, the log-probability of a candidate's title; `answers`, point-wise: that of
    Yes to each candidate, in a prompt and with a gate of its own. They start from the stage-2 checkpoint with
    the best validation HR@1 and AUC."""
    gate: str = "list"
    """What gates a title, where titles are compared: `list`, the mean of all candidates' representations, as
    in stage 2; `item`, its own candidate's, while the prompt keeps the mean. For losses that contrast titles
    only: a chosen title's likelihood behind its own gate is learned by reading the item off the gate."""
    loss: str = "softmax-dpo"
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
    """Rejected titles K of a row, drawn anew in every pass."""
    negatives_from: str = "random"
    """Which K of a row's candidates: `random`; hard ones, which the `reference` or the gate's `crm` scores
    highest; `half`: half of them the reference's highest, the others random."""
    lists: str = "mixed"
    """How the 19 other candidates of a row are drawn: `uniform`, `popular` (in proportion to training events)
    or `mixed` (by turns)."""
    rows: int = 4000
    """Liked training rows to align on, disjoint from the stage-2 subsample where the data suffice."""
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        losses: tuple[str, ...] = ("softmax-dpo", "dpo-pairwise", "dmpo", "mppo", "sft")
        check(self.loss in losses, "stage3.loss", self.loss, f"one of {', '.join(losses)}")
        check(self.task in ("titles", "answers"), "stage3.task", self.task, "titles or answers")
        if self.task == "answers":
            losses = losses[:-1]  # the likelihood of Yes alone is best where every answer is Yes
            wanted = f"one of {', '.join(losses)} where stage3.task is answers"
            check(self.loss in losses, "stage3.loss", self.loss, wanted)
        check(self.gate in ("list", "item"), "stage3.gate", self.gate, "list or item")
        if self.gate == "item":
            wanted = "list where a title's likelihood is learned: its own gate names the item"
            check(self.loss != "sft" and self.sft_weight == 0, "stage3.gate", self.gate, wanted)
        check(1 <= self.negatives <= 19, "stage3.negatives", self.negatives, "1 to 19 rejected titles")
        kinds = ("random", "reference", "crm", "half")
        check(self.negatives_from in kinds, "stage3.negatives_from", self.negatives_from, ", ".join(kinds))
        lists = ("mixed", "uniform", "popular")
        check(self.lists in lists, "stage3.lists", self.lists, ", ".join(lists))
        check(self.beta > 0, "stage3.beta", self.beta, "more than 0")
        check(self.sft_weight >= 0, "stage3.sft_weight", self.sft_weight, "0 or more")
        smoothing = self.label_smoothing
        check(0 <= smoothing < 0.5, "stage3.label_smoothing", smoothing, "a probability from 0 to below 0.5")
        check(self.rows >= 1, "stage3.rows", self.rows, "at least 1 row")
        valid, unread = self.fit.valid_rows, FitConfig.valid_rows
        wanted = "none: stage 3 selects its checkpoint on stored validation lists"
        check(valid == unread, "stage3.fit.valid_rows", valid, wanted)


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on the test split."""

    ctr_rows: str = "all"
    """Row set on which LM systems answer Yes/No; CRMs are measured on it and on all rows."""
    aligned_rows: str = "uniform4000"
    """Row set on which stage 3 and what it starts from answer Yes/No, too: what alignment costs there."""
    blend_rows: str = "uniform6000"
    """Row set of the validation split on which the stacking control is fitted."""
    candidates: list[str] = field(default_factory=lambda: ["uniform20", "popular20"])
    """Kinds of candidate lists: `uniform20`, `popular20`, `hard20` (items that are alike)."""
    ranking_rows: int = 2000
    """Rows of the ranking task, at most those stored by `prepare`."""
    generate_rows: int = 200
    """Rows on which titles are generated greedily for the valid ratio (0: none)."""
    bootstrap: int = 1000
    """Draws of the paired bootstrap clustered by user."""
    batch_size: int = 256
    """Yes/No prompts of one forward pass of the LM; a quarter as many where all titles of a list stand behind
    one, a sixteenth as many rows where each of their candidates has a prompt."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_rows("evaluate.ctr_rows", self.ctr_rows)
        check_rows("evaluate.aligned_rows", self.aligned_rows)
        check_rows("evaluate.blend_rows", self.blend_rows)
        lists = [kind for kind in self.candidates if not re.fullmatch(r"(uniform|popular|hard)\d+", kind)]
        check(not lists, "evaluate.candidates", lists, "uniform20, popular20 or hard20")


@dataclass(frozen=True)
class TrainerConfig:
    """How, not what: nothing here makes a finished stage stale."""

    accelerator: str = "auto"
    """Lightning's accelerator: auto, cpu, gpu ..."""
    devices: int = 1
    """Processes or GPUs of one training."""
    strategy: str = "auto"
    """Lightning's strategy: auto, ddp ...; or `sharded`: ddp, and each process holds its share only of the
    weights of a frozen LM's layers (FSDP2)."""
    threads: int = 0
    """CPU threads of a process (0: torch's default)."""
    attention: str = "sdpa"
    """`sdpa` (PyTorch's, any device) or `flex` (FlexAttention: compiled, skips what is masked; GPU only)."""
    recompute: bool = False
    """Whether an LM's layers keep no activations and compute them anew in the backward (gradient
    checkpointing): less memory, a third more time."""
    checkpoint_every: int = 50
    """Optimizer steps between two writes of last.ckpt, from which a killed stage resumes."""
    progress: bool = False
    """Whether a progress bar is drawn."""
    tensorboard: bool = False
    """Whether curves are written for TensorBoard beside logs/metrics.csv."""
    wandb: bool = False
    """Whether curves go to Weights & Biases too, project `recllm-<dataset>`; needs the library `wandb`."""
    compile: bool = False
    """Whether stage 1's model is compiled by torch.compile; where that fails, it says why and goes on."""
    deterministic: bool = False
    """Whether operations without a deterministic form are refused (on a GPU, the others are slower)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check(self.devices >= 1, "trainer.devices", self.devices, "at least 1")
        check(self.attention in ("sdpa", "flex"), "trainer.attention", self.attention, "sdpa or flex")
        every = self.checkpoint_every
        check(every >= 1, "trainer.checkpoint_every", every, "at least 1 step")
        there = not self.wandb or importlib.util.find_spec("wandb") is not None
        check(there, "trainer.wandb", self.wandb, "false, or the library: pip install wandb")


@dataclass(frozen=True)
class Config:
    """Everything; a stage sees the sections that reach it, the others are None there."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    wording: Wording = field(default_factory=Wording)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    lm: LmStageConfig = field(default_factory=LmStageConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    subsample: str = "0.1"
    """Training samples that stage 2 and the LM's questions see: a fraction or `uniform<n>`, drawn; `last<n>`,
    the latest: an out-of-fold CRM is asked there as it will be later, of what comes after it."""
    stage1: Stage1Config = field(default_factory=Stage1Config)
    stage2: Stage2Config = field(default_factory=Stage2Config)
    towers: TowersConfig = field(default_factory=TowersConfig)
    stage3: Stage3Config = field(default_factory=Stage3Config)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    seed: int = 0
    """Seed of stages 1 to 3 (`SEED=`); the split and the LM have their own."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.subsample is not None:  # None where it does not reach a stage
            check_rows("subsample", self.subsample)


def check_own(config: Config) -> None:
    """Refuse what does not go with a data set of one's own, as far as is known before a file is read.

    Raises:
        ConfigError: the first key that does not go with the section `source`.
    """
    source, prepare = config.source, config.prepare
    check(bool(config.dataset.card), "dataset.card", "''", "what an LM reads of an item, e.g. '{title}'")
    threshold, negatives = prepare.label_threshold, prepare.sampled_negatives
    check(threshold is None, "prepare.label_threshold", threshold, "null, as source.label has the rule")
    has_dislikes = source.label.rule != "clicks" or negatives > 0
    check(has_dislikes, "prepare.sampled_negatives", negatives, "1 or more, as clicks know no dislike")
    if not source.events.timestamp:
        wanted = "last, user or random, as source.events.timestamp is empty"
        check(prepare.split != "time", "prepare.split", prepare.split, wanted)
    if not source.users.path:
        fields, profile = prepare.user_fields, config.wording.profile
        check(not fields, "prepare.user_fields", fields, "none, as source.users.path is empty")
        check("{" not in profile, "wording.profile", repr(profile), "'', as source.users.path is empty")
