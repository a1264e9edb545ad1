"""Starts the processes of a stage before they train: what is scored first is dealt over all of them."""

from __future__ import annotations

import atexit
import os

import torch

from recllm import processes
from recllm.config.trainer import TrainerConfig
from recllm.errors import StageError

DEALING = ("auto", "ddp", "sharded")
"""Strategies of several processes that all run the whole program."""


def start_processes(config: TrainerConfig) -> None:
    """Start the other processes of this machine, or meet those that something else has started.

    Each runs the command of this one, from its beginning to here. Nothing is done for a single process, nor
    a second time, nor for strategies that start processes in ways of their own.

    Args:
        config: accelerator, devices, nodes, strategy.

    Raises:
        StageError: there are several machines, and nothing says where they meet.
    """
    if config.processes == 1 or config.strategy not in DEALING:
        return
    if not torch.distributed.is_initialized():
        from lightning.fabric import Fabric  # seconds that a single process need not wait
        from lightning.fabric.strategies import DDPStrategy

        _check_meeting(config)
        strategy = DDPStrategy(process_group_backend=backend(config))
        fabric = Fabric(
            accelerator=config.accelerator,
            strategy=strategy,
            devices=config.devices,
            num_nodes=config.num_nodes,
        )
        fabric.launch()
        atexit.register(_leave_group)
    processes.join()


def _leave_group() -> None:
    """Before the interpreter ends: threads of gloo that outlive it would abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_meeting(config: TrainerConfig) -> None:
    """Refuse several machines of which this one does not know where they meet."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    needed = ("MASTER_ADDR", "MASTER_PORT")
    if config.num_nodes == 1 or SLURMEnvironment.detect() or all(name in os.environ for name in needed):
        return
    raise StageError(
        f"trainer.num_nodes={config.num_nodes} without MASTER_ADDR and MASTER_PORT, where the machines meet; "
        "wanted the stage started on each by torchrun, or with them and NODE_RANK in the environment"
    )


def backend(config: TrainerConfig) -> str | None:
    """What processes exchange tensors by: gloo on CPUs, else what torch takes for the accelerator."""
    on_cpu = config.accelerator == "cpu" or not torch.cuda.is_available()
    return "gloo" if on_cpu else None
