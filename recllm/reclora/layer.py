"""A linear layer with N_m meta-LoRAs."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.reclora.config import RecLoraConfig
from recllm.reclora.init import singular_start
from recllm.reclora.mixture import MISSING, CurrentGates, mix, plain_lora, uniform_weights


class RecLoraLinear(nn.Module, BaseTunerLayer):
    """`nn.Linear` W plus a gated mixture of meta-LoRAs.

    The A_k lie stacked in `reclora_A` `[metas * r, d_in]` and the B_k side by side in `reclora_B`
    `[d_out, metas * r]`, one entry per adapter. Where an adapter starts from singular vectors, `reclora_A0`
    and `reclora_B0` hold that start, whose mixture is subtracted.

    Args:
        base_layer: The frozen layer (a quantized subclass of `nn.Linear` too).
        current_gates: Holder of the gates of the forward in progress, shared by all layers of the model.
        adapter_name: Name of the first adapter.
        config: Its configuration.
    """

    adapter_layer_names = ("reclora_A", "reclora_B")
    other_param_names = ("reclora_A0", "reclora_B0", "gate_index", "configs")

    def __init__(
        self, base_layer: nn.Linear, current_gates: CurrentGates, adapter_name: str, config: RecLoraConfig
    ) -> None:
        """Wraps the layer and adds the first adapter's weights."""
        super().__init__()
        self.base_layer = base_layer
        self.in_features = base_layer.in_features
        self.out_features = base_layer.out_features
        self.reclora_A = nn.ParameterDict()
        self.reclora_B = nn.ParameterDict()
        self.reclora_A0 = BufferDict(persistent=True)
        self.reclora_B0 = BufferDict(persistent=True)
        self.gate_index: dict[str, int] = {}
        self.configs: dict[str, RecLoraConfig] = {}
        self.current_gates = current_gates
        self.merged_adapters = []  # PEFT's default is one list for all layers
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: RecLoraConfig) -> None:
        """Adds the weights of an adapter.

        `gaussian`: A_k drawn independently, B zero. Kaiming-uniform with a = sqrt(5) as in LoRA; its bound
        depends on the fan-in d_in only, so one draw of the stack is the N_m separate draws. Otherwise
        singular vectors of W, as `singular_start` deals them out.

        Raises:
            ValueError: If W has fewer singular values than the adapter takes.
        """
        rank = config.metas * config.r
        self.configs[adapter_name] = config
        a = torch.empty(rank, self.in_features)
        b = torch.zeros(self.out_features, rank)
        if config.init == "gaussian":
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        elif config.init_weights:
            a, b = singular_start(self.base_layer, config)
        else:
            a.fill_(torch.nan)
            b.fill_(torch.nan)
        if config.init != "gaussian":
            self.reclora_A0[adapter_name] = a.clone()
            self.reclora_B0[adapter_name] = b.clone()
        self.reclora_A[adapter_name] = nn.Parameter(a)
        self.reclora_B[adapter_name] = nn.Parameter(b)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns W x + mix(A, B) x - mix(A0, B0) x for the active adapters.

        Args:
            x: `[batch, seq, d_in]`.
            args: Passed on to the base layer.
            kwargs: Passed on to the base layer.

        Returns:
            `[batch, seq, d_out]` in the dtype of the base layer's output.

        Raises:
            ValueError: If an adapter with a gate is active and the forward was given no representation.
        """
        if self.merged and self.disable_adapters:
            self.unmerge()
        base = self.base_layer(x, *args, **kwargs)
        if self.merged or self.disable_adapters:
            return base
        result = base
        for name in self.active_adapters:
            if name in self.reclora_A:  # another adapter may target other modules
                result = result + self._update(name, x)
        return result.to(base.dtype)

    def _update(self, name: str, x: Tensor) -> Tensor:
        """What one adapter adds to W x, `[batch, seq, d_out]` in the adapter's dtype; `x` as in `forward`."""
        config = self.configs[name]
        weights = None
        if config.gated:
            if self.current_gates.state is None:
                raise ValueError(MISSING)
            weights = self.current_gates.state.layer_weights(name, self.gate_index[name], x)
        x = self._cast_input_dtype(x, self.reclora_A[name].dtype)
        update = F.linear(mix(F.linear(x, self.reclora_A[name]), weights, config), self.reclora_B[name])
        if name not in self.reclora_A0:
            return update
        # Apart from the above, not joined with it in one product: where A and B are still the start, the same
        # sums cancel to the bit; and A0 and B0 get no gradient that nobody wants.
        start = F.linear(mix(F.linear(x, self.reclora_A0[name]), weights, config), self.reclora_B0[name])
        return update - start

    def plain_lora(self, adapter_name: str, weights: Tensor) -> tuple[Tensor, Tensor]:
        """A `[rank, d_in]` and B `[d_out, rank]` of the plain LoRA, of scale 1, that it is for one gate.

        Args:
            adapter_name: The adapter.
            weights: What `weigh` or `uniform_weights` returned, without batch and segment axes.
        """
        config = self.configs[adapter_name]
        a, b = plain_lora(self.reclora_A[adapter_name], self.reclora_B[adapter_name], weights, config)
        if adapter_name not in self.reclora_A0:
            return a, b
        a0, b0 = plain_lora(self.reclora_A0[adapter_name], self.reclora_B0[adapter_name], weights, config)
        return torch.cat([a, a0]), torch.cat([b, -b0], 1)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The update `[d_out, d_in]` of an adapter without a gate.

        Raises:
            ValueError: If the update differs from row to row.
        """
        config = self.configs[adapter_name]
        if config.reads_representation:
            raise ValueError(
                f"adapter {adapter_name!r} reads a representation: its update differs from row to row and "
                "cannot be merged; recllm.reclora.export_user(model, representation, directory) writes one "
                "user's as a plain LoRA"
            )
        a, b = self.plain_lora(adapter_name, uniform_weights(config, self.reclora_B[adapter_name]))
        return b @ a

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the update of adapters without a gate to W, which must not be quantized. Arguments as in PEFT.

        Raises:
            ValueError: If an adapter has a gate, W is quantized, or (`safe_merge`) the sum is not finite.
        """
        deltas = {}  # all of them before any is added, so that an error leaves W as it was
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.reclora_A:
                deltas[name] = self.get_delta_weight(name)
        for name, delta in deltas.items():
            weight = self.base_layer.weight
            if not weight.is_floating_point() or weight.shape != delta.shape:
                raise ValueError(
                    f"adapter {name!r} cannot be merged into quantized weights; "
                    "recllm.reclora.export_user(model, None, directory) writes it as a plain LoRA"
                )
            merged = weight.data + delta.to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"adapter {name!r} merged gives weights that are not finite")
            weight.data = merged
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes merged updates off W again, up to rounding."""
        while self.merged_adapters:
            weight = self.base_layer.weight
            weight.data = weight.data - self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype)

    def __repr__(self) -> str:
        """Marks the layer in a printed model."""
        return "reclora." + super().__repr__()
