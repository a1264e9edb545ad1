"""Which language model, and the size of the one that is trained here."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    """Size of the tiny LM."""

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
