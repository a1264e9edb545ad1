"""The precision in which Lightning trains an LM with an adapter."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.plugins.precision import HalfPrecision


class AdapterPrecision(HalfPrecision):
    """Lightning's `bf16-true` for an LM with an adapter: its batches stay as they are.

    The frozen LM and the adapter's A and B are converted. What reads a representation stays float32
    (`recllm.reclora.heads.Head`), and so do representations and the log-probabilities of a reference, which
    Lightning would round.
    """

    def convert_input(self, data: Any) -> Any:
        """The batch, as it is."""
        return data
