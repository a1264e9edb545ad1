"""Which language model, and the size of the one that is trained here."""

from __future__ import annotations

from dataclasses import dataclass


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
