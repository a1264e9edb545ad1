"""A linear layer with N_m meta-LoRAs."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.reclora.config import RecLoraConfig
from recllm.reclora.init import singular_start
from recllm.reclora.mixture import MISSING, OpenGates, mix


class RecLoraLinear(nn.Module, BaseTunerLayer):
    """`nn.Linear` W plus a gated mixture of meta-LoRAs.

    The A_k lie stacked in `reclora_A` `[metas * r, d_in]` and the B_k side by side in `reclora_B`
    `[d_out, metas * r]`, one entry per adapter. Where an adapter starts from singular vectors, `reclora_A0`
    and `reclora_B0` hold that start, whose mixture is subtracted.

    Args:
        base_layer: The frozen layer (a quantized subclass of `nn.Linear` too).
        open_gates: Holder of the weights of the forward in progress, shared by all layers of the model.
        adapter_name: Name of the first adapter.
        config: Its configuration.
    """

    adapter_layer_names = ("reclora_A", "reclora_B")
    other_param_names = ("reclora_A0", "reclora_B0", "gate_index", "configs")

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
        self.reclora_A0 = BufferDict(persistent=True)
        self.reclora_B0 = BufferDict(persistent=True)
        self.gate_index: dict[str, int] = {}
        self.configs: dict[str, RecLoraConfig] = {}
        self.open_gates = open_gates
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
        a, b = torch.empty(rank, self.in_features), torch.zeros(self.out_features, rank)
        if config.init == "gaussian":
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        else:
            if config.init_weights:
                a, b = singular_start(self.base_layer, config)
            else:
                a, b = a.fill_(torch.nan), b.fill_(torch.nan)
            self.reclora_A0[adapter_name], self.reclora_B0[adapter_name] = a.clone(), b.clone()
        self.reclora_A[adapter_name], self.reclora_B[adapter_name] = nn.Parameter(a), nn.Parameter(b)
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
        base = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return base
        result = base
        for name in self.active_adapters:
            if name not in self.reclora_A:  # another adapter may target other modules
                continue
            a, b, config = self.reclora_A[name], self.reclora_B[name], self.configs[name]
            own = self._cast_input_dtype(x, a.dtype)
            weights = None
            if config.gated:
                if self.open_gates.current is None:
                    raise ValueError(MISSING)
                weights = self.open_gates.current.of(name, self.gate_index[name], x)
            result = result + F.linear(mix(F.linear(own, a), weights, config), b)
            if name in self.reclora_A0:
                # Apart from the above, not joined with it in one product: where A and B are still the start,
                # the same sums cancel to the bit; and A0 and B0 get no gradient that nobody wants.
                start = mix(F.linear(own, self.reclora_A0[name]), weights, config)
                result = result - F.linear(start, self.reclora_B0[name])
        return result.to(base.dtype)

    def __repr__(self) -> str:
        """Marks the layer in a printed model."""
        return "reclora." + super().__repr__()
