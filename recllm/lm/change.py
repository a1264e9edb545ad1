"""What tuning changed in an LM: its loss on text like that of its pretraining, and the size of the update.

MiLoRA (arXiv 2406.09044) moves the minor singular directions of the weights so that the LM keeps what it
knows. Both figures are taken of every adapter, so that the starts can be compared by them.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

from recllm.data.log import EventLog
from recllm.data.prompts import Pieces
from recllm.lm import documents
from recllm.lm.adapters import load_adapter
from recllm.reclora import export_mean

DOCUMENTS = 512
"""Documents of text, at most."""


def held_out(
    log: EventLog, pieces: Pieces, history: int, context: int, count: int = DOCUMENTS
) -> documents.Text:
    """Text of the kind that `LM=tiny` is pretrained on, of events that it was not: the validation samples.

    The timelines of `recllm.lm.documents`. That is made of training events alone: its cards, timelines and
    prompts hold none of these events (films and profiles are the same ones). Nor does stage 2 tune on this
    text, though it selects by its answers on some of the same rows. What another LM was pretrained on is not
    known: it is asked the same text, and so is compared with itself only.

    Args:
        log: the event log.
        pieces: the text pieces, of the LM's tokenizer.
        history: half of the most events that a document tells, as in pretraining (`prompt.history`).
        context: most tokens of a document; a longer one goes on in another.
        count: most documents; of more text they are drawn, always the same ones.

    Returns:
        Documents in which titles, ratings and EOS weigh 1.
    """
    rows = log.rows("valid", "all")
    told = documents.timelines(log, pieces, rows[rows < log.n_events], 2 * history)
    order = np.random.default_rng(0).permutation(len(told))
    return documents.Text.of(pieces, [told[order[:count]]], context, label_weight=1.0)


@torch.inference_mode()
def text_loss(model: Any, text: documents.Text, size: int = 16) -> float:
    """Cross-entropy of the next token, in nats, mean over the tokens that count.

    Args:
        model: the LM, alone or with an adapter that needs no representation (see `at_mean_gate`).
        text: documents; what weighs more than 0 counts as a target, but for each one's first token.
        size: documents of a batch.
    """
    device = next(model.parameters()).device
    nats, count = 0.0, 0
    for start in range(0, len(text), size):
        batch = text.batch(np.arange(start, min(start + size, len(text))))
        ids, asked = batch["ids"].to(device), (batch["weights"][:, 1:] > 0).to(device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[asked]
        nats += float(F.cross_entropy(logits.float(), ids[:, 1:][asked], reduction="sum"))
        count += int(asked.sum())
    return nats / count


def at_mean_gate(model: PeftModel, representations: Tensor) -> PeftModel:
    """The LM with the plain LoRA that a gated adapter is for its mean gate, in place of that adapter.

    Args:
        model: the LM with the gated adapter, which is taken off: use only what is returned.
        representations: `[n, d_c]` over which the gate is averaged.
    """
    with TemporaryDirectory() as folder:
        export_mean(model, representations, folder)
        return load_adapter(model.unload(), Path(folder)).eval()


@torch.inference_mode()
def update_size(model: PeftModel) -> dict[str, float]:
    """||dW|| / ||W||, Frobenius norms, of the weights that an adapter changes.

    Args:
        model: the LM with an adapter of any kind that has one update for all rows; W is the LM's own weight,
            also where a start by singular vectors is subtracted from the update.

    Returns:
        `update` over all of them together, and `update/<module>` over those of one name in all layers, e.g.
        `update/q_proj`.

    Raises:
        ValueError: the update differs from row to row (see `at_mean_gate`).
    """
    squares: dict[str, NDArray[np.float64]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            base: Any = layer.get_base_layer()
            kept = base.weight
            weight = dequantize_module_weight(base).float()
            base.weight = kept  # on a CPU, PEFT puts an 8-bit weight in its place that has lost its scales
            norms = [
                torch.linalg.vector_norm(part, dtype=torch.float64)
                for part in (_update(layer, weight), weight)
            ]
            name = path.rpartition(".")[2]
            squares[name] = squares.get(name, np.zeros(2)) + np.square([float(norm) for norm in norms])
    every = {"update": sum(squares.values(), np.zeros(2))}
    every |= {f"update/{name}": squares[name] for name in sorted(squares)}
    return {name: float(np.sqrt(moved / whole)) for name, (moved, whole) in every.items()}


def _update(layer: Any, weight: Tensor) -> Tensor:
    (name,) = layer.active_adapters
    delta: Tensor = layer.get_delta_weight(name).float()
    magnitudes = getattr(layer, "lora_magnitude_vector", {})
    if name not in magnitudes:
        return delta
    # DoRA (arXiv 2402.09353, equation 5): the sum's rows get the lengths that were trained.
    whole = weight + delta
    length = torch.linalg.vector_norm(whole, dim=1, keepdim=True)
    return magnitudes[name].weight[:, None].float() / length * whole - weight
