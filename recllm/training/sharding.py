"""Sharding: of the frozen weights of an LM's layers each process holds its share only (FSDP2)."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


class ShardedStrategy(DDPStrategy):
    """DDP of what trains, around an LM whose frozen layers are sharded.

    Lightning's own strategy for FSDP2, `ModelParallelStrategy`, shards what trains too and gathers the whole
    LM for every checkpoint. Here adapters, a few weights in a thousand, are replicated: checkpoints, exports
    and gates are what they are in one process, and the LM is in no checkpoint at all.
    """


def shard(module: nn.Module, lm: nn.Module, device: torch.device) -> str:
    """Shards the frozen weights of an LM's layers in place, over all processes.

    A layer's weights are gathered when it computes, forward and backward, and let go behind it. Embeddings,
    the LM head and whatever trains stay whole everywhere.

    Args:
        module: what DDP will wrap; it learns which weights are no matter of its own.
        lm: the LM within it, with or without adapter.
        device: of this process.

    Returns:
        What was done, for people.

    Raises:
        ValueError: the LM does not say what its layers are.
    """
    kinds = {name for part in lm.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    layers = [part for part in lm.modules() if type(part).__name__ in kinds]
    if not layers:
        raise ValueError(
            f"trainer.strategy=sharded: {type(lm).__name__} names no layers (_no_split_modules); wanted "
            "trainer.strategy=ddp"
        )
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh(device.type, (world,))
    whole = sum(value.numel() for value in lm.parameters())
    for layer in layers:
        trains = {value for value in layer.parameters() if value.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trains)
    sharded = {name: value for name, value in module.named_parameters() if isinstance(value, DTensor)}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(sharded))
    here = whole - sum(value.numel() - value.to_local().numel() for value in sharded.values())
    return f"{len(layers)} layers sharded over {world} processes: {here:,} of {whole:,} weights lie here"
