"""The RecLoRA tuner: puts the layers in, owns gates and soft prompts, brings them the representation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn

from recllm.reclora.config import RecLoraConfig
from recllm.reclora.heads import Gate, Head, SoftPrompt
from recllm.reclora.layer import RecLoraLinear
from recllm.reclora.mixture import MISSING, CurrentGates, GateState, weigh
from recllm.reclora.prompt import prepend_tokens, remove_tokens


def _backbones(model: nn.Module) -> list[nn.Module]:
    """What is under an LM's head, from outside in; the LM may call one of them alone (OPT: the inner)."""
    lm: Any = model
    decoder = lm.get_decoder() if hasattr(lm, "get_decoder") else lm
    inner = {id(module): module for module in (getattr(model, "base_model", model), decoder)}
    inner.pop(id(model), None)
    if not inner and _has_head(model):  # Llama-4 says that it is its own
        inner = {id(child): child for child in model.children() if _takes_embeds(child)}
    return list(inner.values()) or [model]


def _has_head(model: nn.Module) -> bool:
    """Whether it makes logits of hidden states."""
    return getattr(model, "get_output_embeddings", lambda: None)() is not None


def _takes_embeds(module: nn.Module) -> bool:
    """Whether its forward reads embeddings in place of token ids."""
    return "inputs_embeds" in inspect.signature(module.forward).parameters


def _check_embeds(model: nn.Module, tokens: int) -> None:
    """Refuses an LM that cannot read virtual tokens.

    Args:
        model: The LM.
        tokens: Virtual tokens of a soft prompt.

    Raises:
        ValueError: What is under its head takes no `inputs_embeds`, or its layers read the tokens' ids too.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for module in _backbones(model):
        reason = ""
        if not _takes_embeds(module):
            reason = "takes no inputs_embeds"
        elif getattr(config, "hidden_size_per_layer_input", 0):
            reason = "reads token ids in every layer (hidden_size_per_layer_input)"
        if reason:
            raise ValueError(
                f"soft_prompt={tokens}: {type(module).__name__} {reason}, wanted an LM that reads virtual "
                "tokens: set soft_prompt=0, or choose another LM"
            )


class GatedCheckpoint:
    """A gradient-checkpointing function that recomputes a layer with the weights of its own forward.

    The recomputation happens in the backward, when the forward is over and its weights are gone, or another
    forward's are current; so they are kept with the checkpoint, as the layer's other inputs are.

    Args:
        checkpoint: The function that transformers installed (`torch.utils.checkpoint.checkpoint` with its
            options).
        current_gates: The model's holder.
    """

    def __init__(self, checkpoint: Callable[..., Any], current_gates: CurrentGates) -> None:
        """Keeps both."""
        self.checkpoint = checkpoint
        self.current_gates = current_gates

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoints `function(*args)`.

        Raises:
            ValueError: With reentrant checkpointing, whose backward would walk the shared gate's graph once
                a layer.
        """
        state = self.current_gates.state
        had_grad = torch.is_grad_enabled()

        def run(*run_args: Any, **run_kwargs: Any) -> Any:
            if state is not None and had_grad and not torch.is_grad_enabled():
                raise ValueError(
                    "RecLoRA needs non-reentrant gradient checkpointing, got use_reentrant=True; call "
                    "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
                )
            with self.current_gates.use(state):
                return function(*run_args, **run_kwargs)

        return self.checkpoint(run, *args, **kwargs)


class RecLoraModel(BaseTuner):
    """The tuner that `get_peft_model` puts between a `PeftModel` and the LM.

    The LM, and the backbone under its head, take three more forward arguments:
        representation: `[batch, dim]`, one a row; or `[batch, segments, dim]` together with `segments`.
        segments: `[batch, seq]` int64 for rows that pack several samples: token t of row b is gated by
            `representation[b, segments[b, t]]`. Padding may name any segment.
        scored: (rows, positions), int64 `[M]` each, where a caller hands the LM head the hidden states
            `[M, 1, width]` of these tokens alone: a head that is a target module has to know whose they are.

    They are taken off before the LM sees them. `generate(..., representation=R)` takes `[batch, dim]`, and
    repeats it for beams and returned sequences as it does the other inputs.
    """

    prefix = "reclora_"
    tuner_layer_cls = RecLoraLinear
    uses_shared_state = True  # the gates lie on the tuner: injecting layers alone is not enough
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's name; the config has its own default

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self.reclora_gate = nn.ModuleDict()
        self.reclora_prompt = nn.ModuleDict()
        self._current_gates = CurrentGates()
        self._enabled = True

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
        if peft_config.soft_prompt:
            _check_embeds(self.model, peft_config.soft_prompt)
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
            layer = RecLoraLinear(target, self._current_gates, adapter_name, peft_config)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # a further adapter trains only once it is set active
            if target is getattr(self.model, "get_output_embeddings", lambda: None)():
                layer.register_forward_pre_hook(self._enter_head)
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
        """Adds an adapter: its layers (PEFT), then its gate and soft prompt. Arguments as in PEFT."""
        trainable = {
            parameter: parameter.requires_grad for head in self._heads() for parameter in head.parameters()
        }
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        config = self._config(adapter_name)
        layers = [layer for _, layer in self.layers(adapter_name)]
        for index, layer in enumerate(layers):
            layer.gate_index[adapter_name] = index if config.gate == "module" else 0
        weight = layers[0].reclora_A[adapter_name]
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            if config.gated:
                self.reclora_gate[adapter_name] = Gate(len(layers) if config.gate == "module" else 1, config)
            if config.soft_prompt:
                table = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
                self.reclora_prompt[adapter_name] = SoftPrompt(config, table)
        for head in self._heads(adapter_name):
            head.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            head.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)
        for parameter, flag in trainable.items():  # adding an adapter must not freeze the others' heads
            parameter.requires_grad = flag

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        # Hooks, because PEFT calls the LM itself, past the tuner. On what is under its head too, for callers
        # that apply the head to a few positions only.
        backbones = _backbones(model)
        self._handles = []
        for module in backbones:
            self._handles.append(module.register_forward_hook(self._remove_prompt))
        self._handles.append(model.register_forward_hook(self._check_prompt))
        for module in {id(m): m for m in (model, *backbones)}.values():
            self._handles.append(module.register_forward_pre_hook(self._set_gates, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._clear_gates, always_call=True))
        for module in backbones:
            self._handles.append(module.register_forward_pre_hook(self._prepend_prompt, with_kwargs=True))
        if hasattr(model, "prepare_inputs_for_generation"):
            # `generate` refuses arguments that this function does not name.
            vars(model)["prepare_inputs_for_generation"] = self._prepare_inputs_for_generation
        self._checkpointed = [
            module for module in model.modules() if hasattr(module, "gradient_checkpointing")
        ]

    def _set_gates(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Takes the tuner's own arguments off a forward, and makes what they give current."""
        representation = kwargs.pop("representation", None)
        segments = kwargs.pop("segments", None)
        scored = kwargs.pop("scored", None)
        kept = kwargs.get("logits_to_keep")
        if representation is None:
            if segments is not None:
                raise ValueError(
                    "got segments without representation; pass representation [batch, segments, dim]"
                )
            return args, kwargs
        for layer in self._checkpointed:
            function = vars(layer).get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, GatedCheckpoint):
                vars(layer)["_gradient_checkpointing_func"] = GatedCheckpoint(function, self._current_gates)
        state = replace(self._gate_state(representation, segments, scored), outermost=module)
        if isinstance(kept, Tensor):
            state = replace(state, kept=kept)
        self._current_gates.state = state
        return args, kwargs

    def _gate_state(
        self,
        representation: Tensor,
        segments: Tensor | None = None,
        scored: tuple[Tensor, Tensor] | None = None,
    ) -> GateState:
        """What the active gates and soft prompts make of representations."""
        if representation.dim() != (2 if segments is None else 3):
            raise ValueError(
                f"representation has shape {list(representation.shape)} "
                f"{'without' if segments is None else 'with'} segments; "
                "wanted [batch, dim], or [batch, segments, dim] and segments [batch, seq]"
            )
        by_segment = representation[:, None] if segments is None else representation
        weights = {}
        prompts = []
        for name in self.active_adapters:
            if name in self.reclora_gate:
                weights[name] = weigh(self.reclora_gate[name](by_segment), self._config(name))
            if name in self.reclora_prompt:
                prompts.append(self.reclora_prompt[name](by_segment))
        return GateState(weights, torch.cat(prompts, 2) if prompts else None, segments, scored)

    def _clear_gates(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forgets the gates when the forward that brought them is over."""
        state = self._current_gates.state
        if state is not None and module is state.outermost:
            self._current_gates.state = None

    def _enter_head(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Brings the gates into the form that the LM head needs; no module comes behind it."""
        state = self._current_gates.state
        if state is not None:
            self._current_gates.state = state.at_head(args[0].shape[1])

    @property
    def _has_prompt(self) -> bool:
        """Whether a forward has a soft prompt."""
        return self._enabled and any(name in self.reclora_prompt for name in self.active_adapters)

    def _prepend_prompt(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Puts the soft prompts of the active adapters before the inputs of the outermost backbone."""
        if not self._has_prompt:
            return args, kwargs
        state = self._current_gates.state
        if state is None or state.prompts is None:
            raise ValueError(MISSING)
        if state.prepended is not None:
            return args, kwargs  # the backbone around this one has them
        names = list(inspect.signature(module.forward).parameters)
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        embed = self.model.get_input_embeddings()
        inputs, segments, prepended = prepend_tokens(inputs, state.prompts, state.segments, embed)
        self._current_gates.state = replace(state, segments=segments, prepended=prepended, prepending=module)
        return (), inputs

    def _remove_prompt(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Takes them off its output again."""
        state = self._current_gates.state
        if state is None or state.prepended is None or state.prepending is not module:
            return output
        return remove_tokens(output, state.prepended)

    def _check_prompt(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Refuses a forward that passed the soft prompt by.

        Raises:
            ValueError: The LM called none of the modules that were to be given it.
        """
        state = self._current_gates.state
        if self._has_prompt and (state is None or state.prepended is None):
            raise ValueError(
                f"the soft prompt was not read: {type(module).__name__} does not call "
                f"{' or '.join(type(m).__name__ for m in _backbones(module))}; wanted an LM that does, or "
                "soft_prompt=0"
            )

    def _prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        representation: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        prepare = type(self.model).prepare_inputs_for_generation
        inputs = prepare(self.model, input_ids, inputs_embeds=inputs_embeds, **kwargs)
        inputs["representation"] = representation
        return inputs

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's door for arguments of `forward` and `generate` that the LM is not given.

        Raises:
            ValueError: One that this tuner would drop, or that runs the LM without the representation.
        """
        names = kwargs.get("adapter_names")
        if names is not None:
            raise ValueError(
                f"adapter_names={list(names)} is not known to RecLoRA, whose forward has the same active "
                "adapter for all rows; call set_adapter(name) and the model once for the rows of each"
            )
        scale = kwargs.get("guidance_scale")
        if scale is None:
            scale = getattr(kwargs.get("generation_config"), "guidance_scale", None)
        reads = any(self._config(name).reads_representation for name in self.active_adapters)
        if reads and scale not in (None, 1):
            raise ValueError(
                f"guidance_scale={scale} runs the LM a second time without a representation, which RecLoRA "
                "needs; leave guidance_scale out, or use the plain LoRA of recllm.reclora.export_user"
            )
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuses what PEFT's LoRA has: gates of their own make no weighted sum of adapters one adapter.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "add_weighted_adapter is not known to RecLoRA, whose adapters are functions of a representation; "
            "activate several, whose updates add up: model.base_model.set_adapter([...])"
        )

    def _config(self, adapter_name: str) -> RecLoraConfig:
        return cast(RecLoraConfig, self.peft_config[adapter_name])

    def _heads(self, adapter_name: str | None = None) -> Iterator[Head]:
        """Gates and soft prompts, of one adapter or of all."""
        for heads in (self.reclora_gate, self.reclora_prompt):
            for name, head in heads.items():
                if adapter_name in (None, name):
                    yield cast(Head, head)

    def head_logits(self, states: Tensor, representation: Tensor) -> Tensor:
        """Logits of the LM head alone, gated as in a whole forward.

        What a model does to logits behind its head (softcapping, a scale) is not done here: such LMs are
        refused by `recllm.training.gate_first.check_logits`.

        Args:
            states: What the head reads, one position a row: `[batch, width]`.
            representation: `[batch, dim]`.

        Returns:
            `[batch, vocabulary]`.
        """
        head = self.model.get_output_embeddings()
        weight = next(head.parameters())
        if weight.is_floating_point():  # a 16-bit head takes no float32
            states = states.to(weight.dtype)
        with self._current_gates.use(self._gate_state(representation)):
            logits: Tensor = head(states[:, None])
        return logits[:, 0]

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
            the order of `layers`); rows sum to 1. The mixture `core` has matrices `[..., r, r]` in place of
            the last axis.

        Raises:
            ValueError: If the shape is wrong, the adapter unknown, or without a gate.
        """
        if representation.dim() != 2:
            raise ValueError(f"representation has shape {list(representation.shape)}, wanted [batch, dim]")
        name = self._name(adapter_name)
        if name not in self.reclora_gate:
            raise ValueError(f"adapter {name!r} has no gate (gate_input='none'), so alpha is 1 / num_meta")
        gate = cast(Gate, self.reclora_gate[name])
        alpha = gate(representation[:, None].to(gate.mean.device))[:, :, 0].transpose(0, 1)
        return alpha if self._config(name).gate == "module" else alpha[:, 0]

    @torch.no_grad()
    def mean_alpha(self, adapter_name: str | None = None) -> Tensor | None:
        """Returns the mixing weights at the mean of the representations that the adapter was tuned with.

        Args:
            adapter_name: The adapter; the active one by default.

        Returns:
            `[num_meta]`, or `[modules, num_meta]` for one gate per module; None: the adapter has no gate, or
            one that gives matrices (`core`).
        """
        name = self._name(adapter_name)
        if name not in self.reclora_gate or self._config(name).mixture == "core":
            return None
        mean = cast(Gate, self.reclora_gate[name]).mean
        return self.alpha(mean[None], name)[0]

    def set_statistics(self, mean: Tensor, covariance: Tensor, adapter_name: str | None = None) -> None:
        """Sets mean `[dim]` and covariance `[dim, dim]` by which the representation is whitened.

        They are saved with the adapter. Without them the representation goes in as it is.
        """
        for head in self._heads(self._name(adapter_name)):
            head.set_statistics(mean, covariance)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes an adapter the active one: it alone trains, or none with `inference_mode`."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for heads in (self.reclora_gate, self.reclora_prompt):
            for name, head in heads.items():
                head.requires_grad_(name in self.active_adapters and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switches the training of adapters, gates and soft prompts among them."""
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for head in self._heads(name):
                head.requires_grad_(requires_grad)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._enabled = enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter, its gate and soft prompt; where it was active, the next one trains whole."""
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        for heads in (self.reclora_gate, self.reclora_prompt):
            if adapter_name in heads:
                del heads[adapter_name]
        if was_active:  # PEFT has set A and B of the next one free
            for name in self.active_adapters:
                for head in self._heads(name):
                    head.requires_grad_(not self._config(name).inference_mode)

    def _check_merge_allowed(self) -> None:
        """Refuses to merge a layer whose weight another module has too.

        Raises:
            ValueError: A target module is tied, as an LM head to the embeddings, which would change with it.
        """
        owners: dict[int, list[str]] = {}
        for name, module in self.model.named_modules():
            for weight in module.parameters(recurse=False):
                owners.setdefault(id(weight), []).append(name)
        for name, module in self.model.named_modules():
            if isinstance(module, RecLoraLinear):
                if all(config.reads_representation for config in module.configs.values()):
                    continue  # refused by the layer, tied or not
                own = f"{name}.base_layer"
                others = [other for other in owners[id(module.base_layer.weight)] if other != own]
                if others:
                    raise ValueError(
                        f"{name!r} cannot be merged, it is tied to {others[0]!r}, which would change too: "
                        "serve it unmerged, or untie the LM first (tie_word_embeddings=False, head a copy)"
                    )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:  # PEFT's says None, wrongly
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        for handle in self._handles:
            handle.remove()
        model.__dict__.pop("prepare_inputs_for_generation", None)
        for layer in self._checkpointed:
            function = vars(layer).get("_gradient_checkpointing_func")
            if isinstance(function, GatedCheckpoint):
                vars(layer)["_gradient_checkpointing_func"] = function.checkpoint
        return model
