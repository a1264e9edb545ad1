"""Sharding: of the frozen weights of an LM's layers each process holds its own part only (FSDP2)."""

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
    layer_types: set[str] = set()
    for part in lm.modules():
        layer_types.update(getattr(part, "_no_split_modules", None) or ())
    layers = [part for part in lm.modules() if type(part).__name__ in layer_types]
    if not layers:
        raise ValueError(
            f"trainer.strategy=sharded: {type(lm).__name__} names no layers (_no_split_modules); wanted "
            "trainer.strategy=ddp"
        )
    num_processes = torch.distributed.get_world_size()
    mesh = init_device_mesh(device.type, (num_processes,))
    num_weights = sum(value.numel() for value in lm.parameters())
    for layer in layers:
        trainable = {value for value in layer.parameters() if value.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trainable)
    sharded = {name: value for name, value in module.named_parameters() if isinstance(value, DTensor)}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(sharded))
    local = num_weights - sum(value.numel() - value.to_local().numel() for value in sharded.values())
    return (
        f"{len(layers)} layers sharded over {num_processes} processes: {local:,} of {num_weights:,} weights "
        "lie here"
    )
