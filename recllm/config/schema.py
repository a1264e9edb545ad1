"""Every configuration key, typed: what a YAML file or the command line may set, and what it means."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field

from recllm.config.stages import Stage1Config, Stage2Config, Stage3Config, TuneConfig
from recllm.errors import check, check_rows
from recllm.eventlog.config import PrepareConfig
from recllm.lm.config import EncoderConfig, LmStageConfig, TowersConfig
from recllm.retrieval.config import RetrievalConfig
from recllm.tables.config import SourceConfig
from recllm.text.config import Wording

EXECUTION = "trainer"
"""The section that says how, not what: it makes no finished stage stale."""


@dataclass(frozen=True)
class DatasetConfig:
    """Which data, and how an item is described to an LM."""

    name: str = "demo"
    """Name of the data set; its recipe is `data/<name>`, hyphens as underscores, or `source` describes it."""
    description: str = ""
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
class EvaluateConfig:
    """What is measured on the test split."""

    ctr_rows: str = "all"
    """Row set of the test split on which LM systems answer Yes/No; CRMs are measured on it and on all
    rows."""
    aligned_rows: str = "uniform4000"
    """Row set of the test split on which stage 3 and what it starts from answer Yes/No, too: what alignment
    costs there."""
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
    check(
        bool(config.dataset.description),
        "dataset.description",
        "''",
        "what an LM reads of an item, e.g. '{title}'",
    )
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
