"""How the public code of RecLoRA computes a training step, as `make bench-stage2` measures it beside ours.

Read in its source (not copied): a gate for every module; the gate's output makes every sample's own A and B,
of which two batched products follow; one row at a time; the CRM runs in every step; logits of all positions,
and the loss on the answer and the token after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GeneratedLora(nn.Module):
    """W x + s B(u) A(u) x, A(u) and B(u) made from the gate as `[batch, r, d_in]` and `[batch, d_out, r]`."""

    def __init__(self, base: nn.Linear, num_meta: int, r: int, dim: int, scale: float) -> None:
        """Wraps a frozen layer."""
        super().__init__()
        self.base, self.r, self.scale = base, r, scale
        self.gate = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 60), nn.ReLU(), nn.Linear(60, num_meta))
        self.a = nn.Linear(num_meta, r * base.in_features, bias=False)
        self.b = nn.Linear(num_meta, r * base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)
        self.representation: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, seq, d_in]` to `[batch, seq, d_out]`."""
        alpha = torch.softmax(self.gate(self.representation) / 5, -1)
        a = self.a(alpha).view(len(x), self.r, -1)
        b = self.b(alpha).view(len(x), -1, self.r)
        return self.base(x) + self.scale * torch.bmm(torch.bmm(x, a.transpose(1, 2)), b.transpose(1, 2))


class Anchor(nn.Module):
    """A frozen LM with `GeneratedLora` in its target modules, and the CRM that it runs in every step."""

    def __init__(self, lm: Any, crm: nn.Module, targets: tuple[str, ...], num_meta: int, r: int) -> None:
        """Puts the layers in."""
        super().__init__()
        self.lm, self.crm = lm, crm.requires_grad_(False)
        dim = crm.config.mlp[-1]  # type: ignore[union-attr,index]
        self.layers = []
        for name, module in list(lm.named_modules()):
            if name.rsplit(".", 1)[-1] in targets:
                parent, child = name.rsplit(".", 1)
                layer = GeneratedLora(module, num_meta, r, dim, 2.0)
                setattr(lm.get_submodule(parent), child, layer)
                self.layers.append(layer)

    def loss(self, ids: Tensor, mask: Tensor, crm_batch: dict[str, Tensor]) -> Tensor:
        """Mean over rows, one row at a time; gradients add up."""
        total = 0.0
        for row in range(len(ids)):
            length = int(mask[row].sum())
            _, representation = self.crm({name: value[row : row + 1] for name, value in crm_batch.items()})
            for layer in self.layers:
                layer.representation = representation
            own = ids[row : row + 1, -length:]
            logits = self.lm(own).logits.float()
            labels = torch.full_like(own, -100)
            labels[:, -2:] = own[:, -2:]
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
            (loss / len(ids)).backward()
            total += float(loss.detach()) / len(ids)
        return torch.tensor(total)
