"""Micro-batches: the rows of a step, cut so that no forward has more tokens than fit into memory.

The gradient of a step is the sum of its micro-batches', each with its rows' share of the loss, so that a cut
step is the step of the whole batch. Rows of like length share a micro-batch, and little of it is padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from recllm.config.trainer import TrainerConfig
from recllm.console import say
from recllm.lm.forwards import Lengths, Places, cut
from recllm.training.precision import device_of

MEMORY_SHARE = 0.5
"""Share of the free memory that the activations of one forward may take."""
LARGEST_ON_CPU = 2e9
"""Bytes of activations of one forward beyond which a CPU gains no speed (`make bench-lm`)."""
OVERHEAD = 1.5
"""Activations that are kept for the backward pass, against the inputs and outputs of linear layers alone."""


def cut_alike(lengths: list[Lengths], rank: int, tokens: int) -> list[Places]:
    """`cut` of one process's rows into as many micro-batches as every other process has.

    A forward of a sharded LM waits for all processes: they must have equally many.

    Args:
        lengths: those of every process's rows.
        rank: whose rows are cut.
        tokens: as of `cut`.
    """
    most = max(len(cut(one, tokens)) for one in lengths)
    rows = min(len(one) for one in lengths)
    if most > rows:  # a process has a row less than others have forwards: theirs are a little too wide
        return np.array_split(np.argsort(lengths[rank], kind="stable"), rows)
    return cut(lengths[rank], tokens, most)


@dataclass
class TokenBudget:
    """How large a forward may be.

    Attributes:
        tokens: most tokens, padding included; 0: any number.
        widest: tokens of the widest forward that there may be where nothing is cut.
    """

    tokens: int
    widest: int

    def halve(self) -> bool:
        """Take half of it from now on; False where a single token is left already."""
        now = self.tokens or self.widest
        if now <= 1:
            return False
        self.tokens = now // 2
        return True


def token_budget(model: torch.nn.Module, config: TrainerConfig, lengths: Lengths, rows: int) -> TokenBudget:
    """What a forward may have; no step is cut where all fit, and it is said where one is.

    Args:
        model: the LM with its adapter.
        config: its `tokens_per_forward`, and processes and parts that share a step.
        lengths: tokens of each row that may stand in a step, `[n]`.
        rows: of a step.
    """
    each = token_bytes(model)
    tokens = config.tokens_per_forward
    if not tokens:
        device = device_of(config)
        memory = MEMORY_SHARE * free_memory(device)
        if device.type == "cpu":
            memory = min(memory, LARGEST_ON_CPU)
        tokens = max(1, int(memory / each))
    most = math.ceil(rows / (config.processes * config.accumulate)) * int(lengths.max(initial=0))
    if most <= tokens:
        return TokenBudget(0, most)
    say(
        f"a step of up to {most:,} tokens is cut into forwards of {tokens:,} at most, "
        f"{tokens * each / 1e9:.1f} GB of activations"
    )
    return TokenBudget(tokens, most)


def token_bytes(model: torch.nn.Module) -> int:
    """About how many bytes of activations a token leaves for the backward pass.

    What stands before and behind every linear layer but the LM head, which runs on few tokens, and half as
    much again for norms, attention and activations.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    width = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        is_matrix = isinstance(weight, torch.Tensor) and weight.dim() == 2
        if is_matrix and module is not head and not isinstance(module, torch.nn.Embedding):
            assert isinstance(weight, torch.Tensor)
            width += sum(weight.shape)
    size = next(model.parameters()).element_size()
    return max(1, int(OVERHEAD * width * size))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
