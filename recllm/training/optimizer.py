"""AdamW for every module, and by rows for big embedding tables: a step touches what its batch looked up.

A dense step reads and writes a whole table and its two moments, whatever the batch: 6 million rows of 16
floats are 1.5 GB a step. Here the gradient of a table is its looked-up rows (`nn.Embedding(sparse=True)`),
which alone are clipped and stepped, so that neither time nor memory of a step grows with the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from recllm.config.stages import FitConfig


def merged(grad: Tensor) -> Tensor:
    """A sparse gradient with every row once, ascending: what `coalesce` returns, in less than half the time.

    Args:
        grad: sparse COO [rows, d], one sparse dimension.
    """
    if grad.is_coalesced():
        return grad
    indices, values = grad._indices()[0], grad._values()
    if len(grad) <= torch.iinfo(torch.int32).max:
        indices = indices.int()  # sorts faster
    rows, place = torch.unique(indices, return_inverse=True)
    sums = values.new_zeros(len(rows), *values.shape[1:]).index_add_(0, place, values)
    whole = torch.sparse_coo_tensor(rows.long()[None], sums, grad.shape, check_invariants=False)
    return whole._coalesced_(True)


@torch.no_grad()
def clip_norm(parameters: Iterable[Tensor], largest: float) -> Tensor:
    """Scales all gradients, dense and row-sparse, so that their L2 norm together is at most `largest`.

    `torch.nn.utils.clip_grad_norm_` takes no sparse ones. Row-sparse gradients are merged on the way.

    Returns:
        The norm before, a scalar.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    parts = []
    for parameter in with_gradient:
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            parameter.grad = merged(parameter.grad)
        parts.append(parameter.grad._values() if parameter.grad.is_sparse else parameter.grad)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in parts]))
    torch._foreach_mul_(parts, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


class RowAdamW(torch.optim.AdamW):
    """AdamW that updates, of a table with a row-sparse gradient, the rows that the gradient names.

    Moments and weight decay of a row move in the steps that touch it, and stand still in the others ("lazy
    Adam", as `torch.optim.SparseAdam`, which knows no weight decay and no dense gradients beside); bias
    correction counts all steps. Everything with a dense gradient goes through `torch.optim.AdamW`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; arguments as those of `torch.optim.AdamW.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sparse = [
            (group, parameter, parameter.grad)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and parameter.grad.is_sparse
        ]
        for _, parameter, _ in sparse:
            parameter.grad = None  # hidden from the dense step
        super().step()
        for group, parameter, grad in sparse:
            parameter.grad = grad
            self._step_rows(group, parameter, merged(grad))
        return loss

    def _step_rows(self, group: dict[str, Any], table: Tensor, grad: Tensor) -> None:
        state = self.state[table]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
        state["step"] += 1
        rows, slope = grad._indices()[0], grad._values()
        rate, (first, second), step = float(group["lr"]), group["betas"], float(state["step"])
        mean = state["exp_avg"].index_select(0, rows).lerp_(slope, 1 - first)
        square = (
            state["exp_avg_sq"].index_select(0, rows).mul_(second).addcmul_(slope, slope, value=1 - second)
        )
        state["exp_avg"].index_copy_(0, rows, mean)
        state["exp_avg_sq"].index_copy_(0, rows, square)
        spread = square.div_(1 - second**step).sqrt_().add_(group["eps"])
        value = table.index_select(0, rows).mul_(1 - rate * group["weight_decay"])
        table.index_copy_(0, rows, value.addcdiv_(mean, spread, value=-rate / (1 - first**step)))


def rise_and_fall(step: int, steps: int, warmup: float) -> float:
    """The learning rate of a step, as a share of its peak: it rises over the warm-up, and falls to 0."""
    rise = max(1, round(warmup * steps))
    return min((step + 1) / rise, max(0.0, (steps - step) / max(1, steps - rise)))


def optimizer(
    module: torch.nn.Module, fit: FitConfig, steps: int, newest_steps: int = 0, newest_lr: float = 1.0
) -> dict[str, Any]:
    """AdamW on everything that trains; the learning rate rises over the warm-up and falls linearly to 0.

    Biases, norms and other vectors get no weight decay. Tables with row-sparse gradients get `RowAdamW`.

    Args:
        module: what trains.
        fit: peak learning rate, warm-up, weight decay.
        steps: of the training.
        newest_steps: of them so many at the end, in which the rate rises and falls once more.
        newest_lr: its peak there, as a multiple of the one before.
    """
    trainable = {name: value for name, value in module.named_parameters() if value.requires_grad}
    vectors = {
        name: value
        for name, value in trainable.items()  # gates of several modules stack theirs into one tensor
        if value.ndim <= 1 or name.rpartition(".")[2].startswith(("bias", "norm"))
    }
    sparse = any(isinstance(part, torch.nn.Embedding) and part.sparse for part in module.modules())
    kind = RowAdamW if sparse else torch.optim.AdamW
    groups = [
        {
            "params": [value for name, value in trainable.items() if name not in vectors],
            "weight_decay": fit.weight_decay,
        },
        {"params": list(vectors.values()), "weight_decay": 0.0},
    ]
    # Under mixed precision Lightning clips gradients only for optimizers that are not fused.
    fused = fit.precision.endswith("true")
    adam = kind([group for group in groups if group["params"]], lr=fit.lr, fused=fused)
    first = steps - newest_steps

    def rate(step: int) -> float:
        if step < first or not newest_steps:
            return rise_and_fall(step, first, fit.warmup)
        return newest_lr * rise_and_fall(step - first, newest_steps, fit.warmup)

    schedule = torch.optim.lr_scheduler.LambdaLR(adam, rate)
    return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
