"""How stages are computed: devices, strategy, logs."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from recllm.errors import check, check_choices


@dataclass(frozen=True)
class TrainerConfig:
    """How, not what: nothing here makes a finished stage stale."""

    accelerator: str = "auto"
    """Lightning's accelerator: auto, cpu, gpu ..."""
    devices: int = 1
    """Processes or GPUs of one training, or of an evaluation, on each machine."""
    num_nodes: int = 1
    """Machines that share the work. On each the stage's command is started, by torchrun or with NODE_RANK,
    MASTER_ADDR and MASTER_PORT in the environment; all see the same artifacts."""
    strategy: str = "auto"
    """Lightning's strategy: auto, ddp ...; or `sharded`: ddp, and each process holds its share only of the
    weights of a frozen LM's layers (FSDP2)."""
    threads: int = 0
    """CPU threads of a process (0: torch's default)."""
    attention: Literal["sdpa", "flex"] = "sdpa"
    """`sdpa` (PyTorch's, any device) or `flex` (FlexAttention: compiled, skips what is masked; GPU only)."""
    accumulate: int = 1
    """Parts of a step's batch that are computed one after another (gradient accumulation): memory for one
    part, and the step of the whole batch."""
    tokens_per_forward: int = 0
    """Most tokens of one forward of an LM that trains, padding included: a step's batch is cut into
    micro-batches of like length, whose gradients add up to those of the whole (0: half of the free memory
    decides, and of a CPU 2 GB at most; a batch that fits is not cut)."""
    recompute: bool = False
    """Whether an LM's layers keep no activations and compute them anew in the backward (gradient
    checkpointing): less memory, a third more time."""
    checkpoint_every: int = 50
    """Optimizer steps between two writes of last.ckpt, from which a killed stage resumes."""
    checkpoint_minutes: float = 5.0
    """Most minutes between two such writes, where steps are long."""
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
        check_choices("trainer", self)
        check(self.devices >= 1, "trainer.devices", self.devices, "at least 1")
        check(self.num_nodes >= 1, "trainer.num_nodes", self.num_nodes, "at least 1 machine")
        check(self.accumulate >= 1, "trainer.accumulate", self.accumulate, "at least 1 part")
        tokens = self.tokens_per_forward
        check(tokens >= 0, "trainer.tokens_per_forward", tokens, "tokens, or 0 for as many as fit")
        every = self.checkpoint_every
        check(every >= 1, "trainer.checkpoint_every", every, "at least 1 step")
        minutes = self.checkpoint_minutes
        check(minutes > 0, "trainer.checkpoint_minutes", minutes, "more than 0")
        usable = not self.wandb or importlib.util.find_spec("wandb") is not None
        check(usable, "trainer.wandb", self.wandb, "false, or the library: pip install wandb")

    @property
    def processes(self) -> int:
        """How many share a step, over all machines."""
        return self.devices * self.num_nodes
