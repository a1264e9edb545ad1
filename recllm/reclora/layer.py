"""A linear layer with N_m meta-LoRAs."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.reclora.config import RecLoraConfig
from recllm.reclora.gate import OpenGates


class RecLoraLinear(nn.Module, BaseTunerLayer):
    """`nn.Linear` W plus a gated mixture of meta-LoRAs.

    The A_k lie stacked in `reclora_A` `[num_meta * r, d_in]` and the B_k side by side in `reclora_B`
    `[d_out, num_meta * r]`, one entry per adapter, so that sum_k alpha_k B_k A_k x is one wide LoRA: to the
    rank space by A, times a weight per direction, back by B. No loop over k, and no weights per sample.

    Args:
        base_layer: The frozen layer (a quantized subclass of `nn.Linear` too).
        open_gates: Holder of the weights of the forward in progress, shared by all layers of the model.
        adapter_name: Name of the first adapter.
        config: Its configuration.
    """

    adapter_layer_names = ("reclora_A", "reclora_B")
    other_param_names = ("gate_index",)

    def __init__(
        self, base_layer: nn.Linear, open_gates: OpenGates, adapter_name: str, config: RecLoraConfig
    ) -> None:
        """Wraps the layer and adds the first adapter's weights."""
        super().__init__()
        self.base_layer = base_layer
        self.in_features = base_layer.in_features
        self.out_features = base_layer.out_features
        self.reclora_A = nn.ParameterDict()
        self.reclora_B = nn.ParameterDict()
        self.gate_index: dict[str, int] = {}
        self.open_gates = open_gates
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: RecLoraConfig) -> None:
        """Adds the weights of an adapter: A_k drawn independently, B zero.

        Kaiming-uniform with a = sqrt(5) as in LoRA; its bound depends on the fan-in d_in only, so one draw
        of the stack is the N_m separate draws.
        """
        rank = config.num_meta * config.r
        self.reclora_A[adapter_name] = nn.Parameter(torch.empty(rank, self.in_features))
        self.reclora_B[adapter_name] = nn.Parameter(torch.zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.reclora_A[adapter_name], a=math.sqrt(5))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns W x + s sum_k alpha_k B_k A_k x for the active adapters.

        Args:
            x: `[batch, seq, d_in]`.
            args: Passed on to the base layer.
            kwargs: Passed on to the base layer.

        Returns:
            `[batch, seq, d_out]` in the dtype of the base layer's output.

        Raises:
            ValueError: If an adapter is active and the forward was given no representation.
        """
        base = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return base
        result = base
        for name in self.active_adapters:
            if name not in self.reclora_A:  # another adapter may target other modules
                continue
            if self.open_gates.current is None:
                raise ValueError(
                    "RecLoRA is active but got no representation; call model(..., representation=R) "
                    "or use `with model.disable_adapter():`"
                )
            a, b = self.reclora_A[name], self.reclora_B[name]
            hidden = F.linear(self._cast_input_dtype(x, a.dtype), a)
            weights = self.open_gates.current.of(name, self.gate_index[name], x)
            result = result + F.linear(hidden * weights.to(hidden.dtype), b)
        return result.to(base.dtype)

    def __repr__(self) -> str:
        """Marks the layer in a printed model."""
        return "reclora." + super().__repr__()
