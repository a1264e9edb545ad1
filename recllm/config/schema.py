"""Every configuration key, typed: what a YAML file or the command line may set, and what it means."""

from __future__ import annotations

from dataclasses import dataclass, field

from recllm.config.cascade import CascadeConfig
from recllm.config.evaluate import EvaluateConfig
from recllm.config.stages import Stage1Config, Stage2Config, Stage3Config
from recllm.config.trainer import TrainerConfig
from recllm.config.tune import TuneConfig
from recllm.errors import check
from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.names import check_rows
from recllm.lm.config import EncoderConfig, LmStageConfig, TowersConfig
from recllm.retrieval.config import RetrievalConfig
from recllm.tables.config import SourceConfig
from recllm.text.config import PromptConfig, Wording

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
    cascade: CascadeConfig = field(default_factory=CascadeConfig)
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
    has_dislikes = source.label.rule != "clicks" or negatives > 0 or prepare.labels == "liked"
    wanted = "1 or more, as clicks know no dislike, or prepare.labels=liked"
    check(has_dislikes, "prepare.sampled_negatives", negatives, wanted)
    has_splits = prepare.split != "given" or source.splits_are_given
    wanted = "another, as neither source.events.split nor source.valid.path is given"
    check(has_splits, "prepare.split", prepare.split, wanted)
    if not source.events.timestamp:
        wanted = "last, user, random or given, as source.events.timestamp is empty"
        check(prepare.split not in ("time", "items"), "prepare.split", prepare.split, wanted)
    if not source.users.path:
        fields, profile = prepare.user_fields, config.wording.profile
        check(not fields, "prepare.user_fields", fields, "none, as source.users.path is empty")
        check("{" not in profile, "wording.profile", repr(profile), "'', as source.users.path is empty")
