"""The RecLoRA tuner: puts the layers in, owns the gates, brings a forward's representation to the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn

from recllm.reclora.config import RecLoraConfig
from recllm.reclora.gate import Gate, OpenGates, RankWeights
from recllm.reclora.layer import RecLoraLinear


class GatedCheckpoint:
    """A gradient-checkpointing function that recomputes a layer with the rank weights of its own forward.

    The recomputation happens in the backward, when the forward is over and its weights are closed, or another
    forward's are open; so they are kept with the checkpoint, as the layer's other inputs are.

    Args:
        checkpoint: The function that transformers installed (`torch.utils.checkpoint.checkpoint` with its
            options).
        open_gates: The model's holder.
    """

    def __init__(self, checkpoint: Callable[..., Any], open_gates: OpenGates) -> None:
        """Keeps both."""
        self.checkpoint = checkpoint
        self.open_gates = open_gates

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoints `function(*args)`.

        Raises:
            ValueError: With reentrant checkpointing, whose backward would walk the shared gate's graph once
                a layer.
        """
        weights, grad = self.open_gates.current, torch.is_grad_enabled()

        def run(*run_args: Any, **run_kwargs: Any) -> Any:
            if weights is not None and grad and not torch.is_grad_enabled():
                raise ValueError(
                    "RecLoRA needs non-reentrant gradient checkpointing, got use_reentrant=True; call "
                    "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
                )
            with self.open_gates.opened(weights):
                return function(*run_args, **run_kwargs)

        return self.checkpoint(run, *args, **kwargs)


class RecLoraModel(BaseTuner):
    """The tuner that `get_peft_model` puts between a `PeftModel` and the LM.

    The LM, and the backbone under its head, take two more forward arguments:
        representation: `[batch, dim]`, one a row; or `[batch, segments, dim]` together with `segments`.
        segments: `[batch, seq]` int64 for rows that pack several samples: token t of row b is gated by
            `representation[b, segments[b, t]]`. Padding may name any segment.

    They are taken off before the LM sees them. `generate(..., representation=R)` takes `[batch, dim]`, and
    repeats it for beams and returned sequences as it does the other inputs.
    """

    prefix = "reclora_"
    tuner_layer_cls = RecLoraLinear
    uses_shared_state = True  # the gates lie on the tuner: injecting layers alone is not enough
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's name; the config has its own default

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self.reclora_gate = nn.ModuleDict()
        self._open_gates = OpenGates()
        self._opener: nn.Module | None = None

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        # PEFT itself only complains when none of the names is found. A string is a regular expression.
        targets = [] if isinstance(peft_config.target_modules, str) else peft_config.target_modules
        modules = dict(self.model.named_modules())
        for target in targets:
            if not any(name == target or name.endswith("." + target) for name in modules):
                linears = {
                    name.removesuffix(".base_layer").rsplit(".", 1)[-1]
                    for name, module in modules.items()
                    if isinstance(module, nn.Linear)
                }
                raise ValueError(
                    f"target module {target!r} is not in the model; its linear modules are: "
                    f"{', '.join(sorted(linears)) or 'none'}"
                )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, RecLoraLinear):
            target.update_layer(adapter_name, peft_config)
        elif isinstance(target, nn.Linear):
            layer = RecLoraLinear(target, self._open_gates, adapter_name, peft_config)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # a further adapter trains only once it is set active
            self._replace_module(parent, target_name, layer, target)
        else:
            raise ValueError(
                f"target module {current_key!r} is a {type(target).__name__}, RecLoRA adapts "
                "torch.nn.Linear only; name other target_modules"
            )

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Adds an adapter: its layers (PEFT), then its gate. Arguments as in PEFT."""
        trainable = {parameter: parameter.requires_grad for parameter in self.reclora_gate.parameters()}
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        config = self._config(adapter_name)
        layers = [layer for _, layer in self.layers(adapter_name)]
        for index, layer in enumerate(layers):
            layer.gate_index[adapter_name] = index if config.gate == "module" else 0
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            gate = Gate(len(layers) if config.gate == "module" else 1, config)
        weight = layers[0].reclora_A[adapter_name]
        gate.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        gate.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)
        self.reclora_gate[adapter_name] = gate
        for parameter, flag in trainable.items():  # adding an adapter must not freeze the others' gates
            parameter.requires_grad = flag

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        # Hooks, because PEFT calls the LM itself, past the tuner. On the backbone too, for callers that apply
        # the LM head to a few positions only.
        backbone = getattr(model, "base_model", model)
        self._handles = []
        for module in {id(m): m for m in (model, backbone)}.values():
            self._handles.append(module.register_forward_pre_hook(self._open, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._close, always_call=True))
        if hasattr(model, "prepare_inputs_for_generation"):
            # `generate` refuses arguments that this function does not name.
            vars(model)["prepare_inputs_for_generation"] = self._prepare_inputs_for_generation
        self._checkpointed = [
            module for module in model.modules() if hasattr(module, "gradient_checkpointing")
        ]

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        representation, segments = kwargs.pop("representation", None), kwargs.pop("segments", None)
        if representation is None:
            if segments is not None:
                raise ValueError(
                    "got segments without representation; pass representation [batch, segments, dim]"
                )
            return args, kwargs
        for layer in self._checkpointed:
            function = vars(layer).get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, GatedCheckpoint):
                vars(layer)["_gradient_checkpointing_func"] = GatedCheckpoint(function, self._open_gates)
        self._open_gates.current = RankWeights(
            {name: self._rank_weights(name, representation, segments) for name in self.active_adapters},
            segments,
        )
        self._opener = module
        return args, kwargs

    def _close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is self._opener:
            self._open_gates.current = self._opener = None

    def _rank_weights(self, adapter_name: str, representation: Tensor, segments: Tensor | None) -> Tensor:
        if representation.dim() != (2 if segments is None else 3):
            raise ValueError(
                f"representation has shape {list(representation.shape)} "
                f"{'without' if segments is None else 'with'} segments; "
                "wanted [batch, dim], or [batch, segments, dim] and segments [batch, seq]"
            )
        config = self._config(adapter_name)
        gate = self._gate(adapter_name)
        alpha = gate(representation[:, None] if segments is None else representation)
        return (alpha * config.scale).repeat_interleave(config.r, dim=-1)

    def _prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        representation: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        prepare = type(self.model).prepare_inputs_for_generation
        inputs = prepare(self.model, input_ids, inputs_embeds=inputs_embeds, **kwargs)
        return inputs | {"representation": representation}

    def _config(self, adapter_name: str) -> RecLoraConfig:
        return cast(RecLoraConfig, self.peft_config[adapter_name])

    def _gate(self, adapter_name: str) -> Gate:
        return cast(Gate, self.reclora_gate[adapter_name])

    def _name(self, adapter_name: str | None) -> str:
        """The adapter that a report is about: the named one, or the active one."""
        if adapter_name is None and len(self.active_adapters) == 1:
            return self.active_adapters[0]
        if adapter_name not in self.peft_config:
            raise ValueError(
                f"adapter {adapter_name!r} is unknown; name one of: {', '.join(sorted(self.peft_config))}"
            )
        return str(adapter_name)

    def layers(self, adapter_name: str) -> list[tuple[str, RecLoraLinear]]:
        """Returns (name in the LM, layer) of the layers that an adapter has, in the order of their gates."""
        return [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, RecLoraLinear) and adapter_name in module.reclora_A
        ]

    def alpha(self, representation: Tensor, adapter_name: str | None = None) -> Tensor:
        """Returns the mixing weights, for reports and exports.

        Args:
            representation: `[batch, dim]`.
            adapter_name: The adapter; the active one by default.

        Returns:
            `[batch, num_meta]` for a shared gate, `[batch, modules, num_meta]` for one gate per module (in
            the order of `layers`); rows sum to 1.

        Raises:
            ValueError: If the shape is wrong or the adapter unknown.
        """
        if representation.dim() != 2:
            raise ValueError(f"representation has shape {list(representation.shape)}, wanted [batch, dim]")
        name = self._name(adapter_name)
        gate = self._gate(name)
        alpha = gate(representation[:, None].to(gate.mean.device))[:, :, 0].transpose(0, 1)
        return alpha if self._config(name).gate == "module" else alpha[:, 0]

    def set_statistics(self, mean: Tensor, std: Tensor, adapter_name: str | None = None) -> None:
        """Sets mean and std `[dim]` by which the gate's input is standardized; saved with the adapter.

        Without it the representation goes in as it is (mean 0, std 1).
        """
        self._gate(self._name(adapter_name)).set_statistics(mean, std)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes an adapter the active one: it alone trains, or none with `inference_mode`."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for name, gate in self.reclora_gate.items():
            gate.requires_grad_(name in self.active_adapters and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switches the training of adapters, gates among them."""
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.reclora_gate[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter and its gate."""
        super().delete_adapter(adapter_name)
        del self.reclora_gate[adapter_name]

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "RecLoRA weights differ from row to row and cannot be merged; "
            "recllm.reclora.export_user(model, representation, directory) writes one user's as a plain LoRA"
        )

    def unload(self) -> nn.Module:
        """Returns the LM as it was before `get_peft_model`."""
        model = super().unload()
        for handle in self._handles:
            handle.remove()
        model.__dict__.pop("prepare_inputs_for_generation", None)
        for layer in self._checkpointed:
            function = vars(layer).get("_gradient_checkpointing_func")
            if isinstance(function, GatedCheckpoint):
                vars(layer)["_gradient_checkpointing_func"] = function.checkpoint
        return model
