"""Starts by singular vectors: which triplets of W a layer's meta-LoRAs take, and a cache for them on disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recllm.reclora.config import RecLoraConfig

FLOOR = 1e-3
"""Least singular value of a start, as a share of the median of all: A and B of a zero would never move."""


def singular_start(layer: nn.Module, config: RecLoraConfig) -> tuple[Tensor, Tensor]:
    """A0 and B0 from singular triplets of a layer's weight.

    With W = U S V^T, a triplet (u, S, v) becomes the row sqrt(S / s) v^T of A and the column u sqrt(S / s) of
    B, s = lora_alpha / r, so that s B A is the triplets' part of W: `pissa` takes the largest (PiSSA, arXiv
    2404.02948, equations 2 to 4), `milora` the smallest (MiLoRA, arXiv 2406.09044, equations 3 to 5),
    `random-svd` any. They are dealt out like cards, the j-th to meta-LoRA j mod N_m, so that the meta-LoRAs
    are orthogonal to each other and alike in size.

    Differs: the papers subtract s B A from W; here the layer subtracts the mixture of A0 and B0, so that W
    stays as it is and quantized weights will do. With N_m = 1 both are the same function.

    Args:
        layer: The frozen linear layer; a quantized weight is read dequantized.
        config: Kind of start, number of meta-LoRAs, rank, scale, cache.

    Returns:
        `[metas * r, d_in]` and `[d_out, metas * r]`, float32 (float64 of a float64 layer), on its device.

    Raises:
        ValueError: If W has fewer singular values than metas * r, or more than half of them are zero.
    """
    with torch.no_grad():
        parameter = layer.weight
        weight = dequantize_module_weight(layer).detach()
        layer.weight = parameter  # on a CPU, PEFT puts an 8-bit weight in its place that has lost its scales
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        count = config.metas * config.r
        if count > min(weight.shape):
            raise ValueError(
                f"init={config.init!r} takes num_meta * r = {config.metas} * {config.r} = {count} singular "
                f"vectors, a target module of shape {list(weight.shape)} has {min(weight.shape)}; lower "
                "num_meta or r, or set init='gaussian'"
            )
        u, s, v = (part.to(weight.device) for part in _triplets(weight.to(wide), count, config))
        root = (s * config.r / config.lora_alpha).sqrt()
        order = torch.arange(count).view(config.r, config.metas).T.flatten()
        return (root[:, None] * v)[order].contiguous(), (u * root)[:, order].contiguous()


def _triplets(weight: Tensor, count: int, config: RecLoraConfig) -> tuple[Tensor, Tensor, Tensor]:
    """`count` triplets U `[d_out, count]`, S `[count]`, V `[count, d_in]`, computed once a weight."""
    if config.svd_cache is None:
        return _decompose(weight, count, config.init)
    data = weight.cpu().contiguous()
    digest = hashlib.sha256(f"{config.init} {count} {FLOOR} {data.dtype} {list(data.shape)}".encode())
    digest.update(data.numpy().data)
    path = Path(config.svd_cache) / f"{digest.hexdigest()[:32]}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        u, s, v = (part.cpu().contiguous() for part in _decompose(weight, count, config.init))
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"u": u, "s": s, "v": v}, temporary)
        temporary.replace(path)
    triplets = load_file(path)
    return triplets["u"], triplets["s"], triplets["v"]


def _decompose(weight: Tensor, count: int, init: str) -> tuple[Tensor, Tensor, Tensor]:
    """The triplets that a start takes of a weight `[d_out, d_in]`, as `_triplets` returns them."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    median = s.median()
    if not median > s[0] * max(weight.shape) * torch.finfo(s.dtype).eps:  # zero but for rounding
        raise ValueError(
            f"init={init!r}: more than half of the singular values of a target module of shape "
            f"{list(weight.shape)} are zero; set init='gaussian'"
        )
    if init == "pissa":
        index = torch.arange(count)
    elif init == "milora":
        index = torch.arange(len(s) - count, len(s))
    else:
        # A draw of its own: the same triplets whether they are cached or not, in every process.
        index = torch.randperm(len(s), generator=torch.Generator().manual_seed(0))[:count]
    index = index.to(s.device)
    return u[:, index], s[index].clamp_min(FLOOR * median), v[index]
