"""Which language model and which encoder, and the size of those that are trained here."""

from __future__ import annotations

from dataclasses import dataclass, field

from recllm.checks import check


@dataclass(frozen=True)
class LmConfig:
    """Which language model, and how it is held in memory."""

    name: str = "tiny"
    """Name in folder names and tables."""
    path: str | None = None
    """Hub id or folder; None: the LM that `stages/lm.py` trains."""
    revision: str | None = None
    """Commit or tag on the hub; None: the newest."""
    dtype: str = "float32"
    """Type of the weights: auto (as stored), float32, bfloat16 or float16."""
    quantization: str = "none"
    """none, 4bit or 8bit; the last two need a GPU and bitsandbytes."""
    prefix: str = ""
    """Text before every prompt, for LMs that were tuned as chat."""
    suffix: str = ""
    """Text between every prompt and its answer, for the same."""
    context: int | None = None
    """Most tokens of prompt and answer; None: as many as the LM allows."""


@dataclass(frozen=True)
class TinyConfig:
    """Size of the tiny LM, or of the tiny encoder."""

    hidden: int = 128
    """Width of the hidden states."""
    layers: int = 4
    """Number of layers."""
    heads: int = 4
    """Attention heads of a layer."""
    intermediate: int = 344
    """Width inside the MLPs."""
    vocabulary: int = 6144
    """Most tokens, those of the template among them; small data use fewer."""
    context: int = 512
    """Longest input (tokens)."""


@dataclass(frozen=True)
class LmTrainingConfig:
    """How `LM=tiny` is trained on text of the training split."""

    text_tokens: int = 4_500_000
    """Tokens of the first phase (item cards, timelines, questions with answers)."""
    prompt_tokens: int = 6_000_000
    """Tokens of the second phase (prompts with retrieved histories)."""
    batch_tokens: int = 3_584
    """Tokens of one optimizer step."""
    block: int = 224
    """Tokens of a packed training row."""
    label_weight: float = 4.0
    """Loss weight of a rating or answer token; a title token weighs 1."""
    question_share: float = 0.25
    """Share of the first phase's tokens that are questions with answers (of the subsample only)."""
    timeline_share: float = 0.15
    """Share of the second phase's tokens that are timelines and cards, so that the LM forgets little."""
    lr: float = 3e-3
    """Peak learning rate of the first phase."""
    prompt_lr: float = 2e-3
    """Peak learning rate of the second phase."""
    precision: str = "32-true"
    """Lightning's precision for pretraining."""


@dataclass(frozen=True)
class LmStageConfig:
    """The causal LM: which one, and how `tiny` is made."""

    model: LmConfig = field(default_factory=LmConfig)
    tiny: TinyConfig = field(default_factory=TinyConfig)
    training: LmTrainingConfig = field(default_factory=LmTrainingConfig)
    seed: int = 0
    """Seed of the LM's start and of its text; apart from `seed`, so that all seeds share one LM."""


@dataclass(frozen=True)
class EncoderTrainingConfig:
    """How the tiny encoder is trained on text of the training split, by masked tokens."""

    tokens: int = 10_500_000
    """Tokens read in all: as many as the tiny LM reads in both of its phases."""
    batch_tokens: int = 3_584
    """Tokens of one optimizer step, about."""
    mask_share: float = 0.3
    """Share of the tokens of titles, cards and ratings that are to be guessed; of those, 80 % are masked,
    10 % are any other token, 10 % stay. Template and profile are never guessed."""
    label_weight: float = 4.0
    """Loss weight of a rating token; a title token weighs 1."""
    lr: float = 2e-3
    """Peak learning rate."""
    precision: str = "32-true"
    """Lightning's precision for pretraining."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check(self.tokens >= 1, "encoder.training.tokens", self.tokens, "at least 1")
        share = self.mask_share
        check(0 < share < 1, "encoder.training.mask_share", share, "a share above 0 and below 1")


@dataclass(frozen=True)
class EncoderConfig:
    """The bidirectional encoder of a two-tower system: which one, and how the tiny one is made."""

    path: str | None = None
    """Hub id or folder of an encoder (BERT and its kin); None: the one that `stages/encoder.py` trains."""
    revision: str | None = None
    """Commit or tag on the hub; None: the newest."""
    context: int | None = None
    """Most tokens of a text; None: as many as the encoder allows."""
    tiny: TinyConfig = field(default_factory=lambda: TinyConfig(intermediate=512))
    """Size of the one that is trained here; a BERT's MLP has two matrices, the LM's three."""
    training: EncoderTrainingConfig = field(default_factory=EncoderTrainingConfig)
    seed: int = 0
    """Seed of the encoder's start and masks; apart from `seed`, so that all seeds share one encoder."""


@dataclass(frozen=True)
class TowersConfig:
    """Two towers over one encoder, and the head that fuses them late; a file that sets it is such a one."""

    pooling: str = "mean"
    """A text's vector: `mean` of the last layer over its tokens, or that of its first token (`first`)."""
    hidden: int = 128
    """Hidden width of the head."""
    dropout: float = 0.1
    """Dropout in the head; the encoder has its own."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check(self.pooling in ("mean", "first"), "towers.pooling", self.pooling, "mean or first")
        check(self.hidden >= 1, "towers.hidden", self.hidden, "at least 1")
        check(0 <= self.dropout < 1, "towers.dropout", self.dropout, "a share from 0 to below 1")
