"""What tuning changed in an LM: its loss on text like that of its pretraining, and the size of the update.

MiLoRA (arXiv 2406.09044) moves the minor singular directions of the weights so that the LM keeps what it
knows. Both figures are taken of every adapter, so that the starts can be compared by them.
"""

from __future__ import annotations

import math
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

from recllm import processes
from recllm.eventlog.log import EventLog
from recllm.lm.adapters import load_adapter
from recllm.reclora import export_mean
from recllm.text import documents
from recllm.text.prompts import Pieces

BLOCKS = 256
"""Most blocks of text that the loss is taken on."""


def held_out_text(
    log: EventLog, pieces: Pieces, history: int, block: int, count: int = BLOCKS
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Text like that on which `LM=tiny` is pretrained, of events that it does not hold: the validation rows.

    The text is the timelines of `recllm.text.documents`, packed as for pretraining. Pretraining text is made
    of training events alone: its cards, timelines and prompts hold none of these events (films and profiles
    are the same ones). Stage 2 does not tune on this text either, though it selects by its answers on some of
    the same rows. What another LM was pretrained on is not known: it is scored on the same text, and is
    compared with itself only.

    Args:
        log: the event log.
        pieces: the text pieces, of the LM's tokenizer.
        history: half of the most events that a document tells, as in pretraining (`prompt.history`).
        block: tokens of a block.
        count: most blocks; of more text, documents are drawn, always the same ones.

    Returns:
        Tokens int32 `[blocks, block]`; and float32 `[blocks, block]`, 1 for those that count as targets
        (titles, ratings, EOS), else 0.
    """
    rows = log.rows("valid", "all")
    timelines = documents.timelines(log, pieces, rows[~log.is_drawn(rows)], 2 * history)
    rng = np.random.default_rng(0)
    timelines = timelines[rng.permutation(len(timelines))]
    num_tokens = np.cumsum(pieces.lengths[timelines].sum(1))
    num_documents = np.searchsorted(num_tokens, count * block) + 1
    ids, weights = documents.pack(pieces, [timelines[:num_documents]], block, rng, label_weight=1.0)
    return ids[:count], weights[:count]


@torch.inference_mode()
def text_loss(model: Any, ids: NDArray[np.int32], weights: NDArray[np.float32], size: int = 8) -> float:
    """Cross-entropy of the next token, in nats, mean over the tokens that count; dealt over all processes.

    Args:
        model: the LM, alone or with an adapter that needs no representation (see `fix_gate_at_mean`).
        ids: int32 `[blocks, block]`, each block a context of its own.
        weights: float32 `[blocks, block]`, more than 0 where a token counts as a target; the first never
            does.
        size: blocks of a batch.
    """
    device = next(model.parameters()).device
    nats = np.zeros(math.ceil(len(ids) / size))
    for number, is_own in processes.dealt(len(nats)):
        if is_own:
            part = slice(number * size, (number + 1) * size)
            batch = torch.from_numpy(ids[part].astype(np.int64)).to(device)
            is_target = torch.from_numpy(weights[part, 1:] > 0).to(device)
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits[is_target]
            nats[number] = float(F.cross_entropy(logits.float(), batch[:, 1:][is_target], reduction="sum"))
    processes.complete(nats)
    total = 0.0
    for of_batch in nats.tolist():  # one after the other: the sum does not depend on how it is computed
        total += of_batch
    return total / int((weights[:, 1:] > 0).sum())


def fix_gate_at_mean(model: PeftModel, representations: Tensor) -> PeftModel:
    """Replace a gated adapter by the plain LoRA that it is for its mean gate.

    Args:
        model: the LM with the gated adapter, which is taken off: only the returned model can be used.
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
        ValueError: the update differs from row to row (see `fix_gate_at_mean`).
    """
    squares: dict[str, NDArray[np.float64]] = {}  # module name -> squared norms of update and weight, `[2]`
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            weight = _base_weight(layer)
            norms = []
            for matrix in (_update(layer, weight), weight):
                norms.append(float(torch.linalg.vector_norm(matrix, dtype=torch.float64)))
            name = path.rpartition(".")[2]
            squares[name] = squares.get(name, np.zeros(2)) + np.square(norms)
    groups = {"update": sum(squares.values(), np.zeros(2))}
    for name in sorted(squares):
        groups[f"update/{name}"] = squares[name]
    return {name: float(np.sqrt(update / weight)) for name, (update, weight) in groups.items()}


def _base_weight(layer: BaseTunerLayer) -> Tensor:
    """The LM's own weight under an adapter, float32 `[d_out, d_in]`, dequantized where it is quantized."""
    base: Any = layer.get_base_layer()
    parameter = base.weight
    weight: Tensor = dequantize_module_weight(base).float()
    base.weight = parameter  # on a CPU, PEFT puts an 8-bit weight in its place that has lost its scales
    return weight


def _update(layer: Any, weight: Tensor) -> Tensor:
    """What the active adapter adds to a layer's weight, float32 `[d_out, d_in]`."""
    (name,) = layer.active_adapters
    delta: Tensor = layer.get_delta_weight(name).float()
    magnitudes = getattr(layer, "lora_magnitude_vector", {})
    if name not in magnitudes:
        return delta
    # DoRA (arXiv 2402.09353, equation 5): the sum's rows get the lengths that were trained.
    adapted = weight + delta
    length = torch.linalg.vector_norm(adapted, dim=1, keepdim=True)
    return magnitudes[name].weight[:, None].float() / length * adapted - weight
