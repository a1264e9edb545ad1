"""Load a frozen causal language model and its tokenizer, from a hub id or a folder."""

from __future__ import annotations

import difflib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from recllm.lm.config import LmConfig
from recllm.lm.hub import loading_error, locate, text_config
from recllm.lm.logprobs import answer_logits

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Values of `lm.model.dtype`, as transformers takes them."""
LOADING_ERRORS = (OSError, ImportError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)
"""What transformers raises where files are not there, broken, or of another form than it knows."""
NOT_CHOOSING = ("token_id", "_version", "use_cache")
"""How names of generation settings end that have no part in which token comes next."""
LARGEST_LEAK = 0.05
"""A token's logits change with the padding before it by this at most, as a fraction of the change with the
token itself: rounding of experts that other rows share, in 16 bit."""
LEAST_CHANGE = 1e-4
"""Of an LM that reads ahead, the first token's logits change with the last token by this at least, as a
fraction of the change of the last token's own."""


def load_lm(
    config: LmConfig, path: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The LM in eval mode with frozen weights, and its fast tokenizer.

    Every weight of the LM is the files' own. What a folder says about sampling is left out, and rows are
    padded by a token that the LM has.

    Args:
        config: Which one.
        path: Folder that is loaded in place of `config.path`.

    Raises:
        ValueError: A key has a value that does not exist, weights or tokenizer cannot be had, they do not fit
            `config.json`, or the tokenizer has more tokens than the LM.
    """
    model, tokenizer, _ = _load(config, path)
    return model, tokenizer


def load_checked_lm(
    config: LmConfig, path: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """As `load_lm`, and looks whether the LM is one: finite, reads from left to right, and no padding.

    Args:
        config: Which one.
        path: Folder that is loaded in place of `config.path`.

    Returns:
        The LM, its tokenizer, and what of its files is not used, one line each.

    Raises:
        ValueError: As `load_lm`, or it is no causal LM.
    """
    model, tokenizer, notes = _load(config, path)
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise ValueError(
                f"lm.model.path {config.path!r}: weight {name!r} ({weight.dtype}) holds values that are not "
                "finite; wanted numbers: export it again, or set lm.model.dtype=float32"
            )
    if _reads_ahead(model):
        raise ValueError(
            f"lm.model.path {config.path!r} ({type(model).__name__}) reads tokens that come later; wanted an "
            "LM that reads from left to right only: choose another LM"
        )
    if _reads_padding(model):
        raise ValueError(
            f"lm.model.path {config.path!r} ({type(model).__name__}) reads padding, where attention_mask "
            "is 0; wanted an LM whose answers do not depend on the rest of a batch: choose another LM"
        )
    return model, tokenizer, notes


def _load(
    config: LmConfig, path: str | Path | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """As `load_lm`, with what of the files is not used, one line each."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # a stage prints a few lines, a bar for every file would hide them

    if config.dtype not in DTYPES:
        raise ValueError(f"lm.model.dtype is {config.dtype!r}, want one of {', '.join(DTYPES)}")
    quantization = _quantization(config)
    tokenizer, _ = load_tokenizer(config, path)
    source, options = locate(config, path)
    if os.path.exists(os.path.join(source, "adapter_config.json")):
        raise _adapter_error(source)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of weights that do not fit; the lines below say it
    try:
        # Weights of another shape are told by name below; by themselves they are an error without one.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=DTYPES[config.dtype],
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **options,
            **quantization,
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"lm.model.path {source!r} holds pickled objects that are no weights, which could run anything "
            "and are not loaded; wanted safetensors: export it again (save_pretrained)"
        ) from error
    except LOADING_ERRORS as error:
        raise loading_error(config, source, error) from error
    finally:
        logging.set_verbosity(level)
    model, report = loaded
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _adapter_error(source)
    check_weights(model, report, source)
    notes = _unused_weights(report, config)
    fit_tokenizer(tokenizer, int(model.get_input_embeddings().weight.shape[0]), source)
    notes += _unused_settings(model.generation_config, config)
    given = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=given.bos_token_id, eos_token_id=given.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    switch_off_dropout(model)
    return model.requires_grad_(False).eval(), tokenizer, notes


def _adapter_error(source: str) -> ValueError:
    """The line about a folder that holds an adapter, which transformers would put on another LM unasked."""
    return ValueError(
        f"lm.model.path {source!r} holds an adapter (adapter_config.json), wanted an LM: merge the two "
        "(peft's merge_and_unload) and save_pretrained the result elsewhere"
    )


def check_weights(model: PreTrainedModel, report: Mapping[str, Any], source: str) -> None:
    """Refuses an LM of which a weight is not that of the files.

    Args:
        model: As it was loaded.
        report: transformers' account: `missing_keys` were drawn at random, `mismatched_keys` (name, shape in
            the files, shape in the LM) too, `unexpected_keys` were left out.
        source: Hub id or folder.

    Raises:
        ValueError: A weight is missing, of another shape, or left out though the LM has its layer.
    """
    mismatched = {name: (list(stored), list(wanted)) for name, stored, wanted in report["mismatched_keys"]}
    lost = set(report["missing_keys"]) - mismatched.keys()
    unexpected = sorted(report["unexpected_keys"])
    names = list(model.state_dict())
    if lost:
        first = next((name for name in names if name in lost), min(lost))
        instead = difflib.get_close_matches(first, unexpected, n=1, cutoff=0)
        raise ValueError(
            f"lm.model.path {source!r} lacks {len(lost):,} of {len(names):,} weights of "
            f"{type(model).__name__}, first {first!r}, in its place "
            f"{f'stands {instead[0]!r}' if instead else 'stands nothing'}: save the whole LM anew "
            "(save_pretrained) with the names and the config.json that belong to it"
        )
    if mismatched:
        first = next((name for name in names if name in mismatched), min(mismatched))
        stored, wanted = mismatched[first]
        raise ValueError(
            f"lm.model.path {source!r} has {len(mismatched):,} weights of another shape than config.json "
            f"says, first {first!r} {stored}, wanted {wanted}: give it the config.json that belongs "
            "to the weights"
        )
    modules = dict(model.named_modules())
    left_out = [name for name in unexpected if _has_place(name, modules)]
    if left_out:
        raise ValueError(
            f"lm.model.path {source!r} has {len(left_out):,} weights for which {type(model).__name__} has "
            f"the layers but not the place, first {left_out[0]!r}; wanted all of them in use: give it the "
            "config.json that belongs to the weights"
        )


def _has_place(name: str, modules: Mapping[str, torch.nn.Module]) -> bool:
    """Whether a weight that the LM does not take belongs to its layers: to one that it has, or to one more.

    A bias beside a matrix that is used, and layers beyond the last, change what the LM says; a head for
    values, or a buffer that is computed anew, does not.
    """
    parent = name.rpartition(".")[0]
    if parent in modules and next(modules[parent].parameters(recurse=False), None) is not None:
        return True
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit() and isinstance(modules.get(".".join(parts[:place])), torch.nn.ModuleList):
            return ".".join(parts[: place + 1]) not in modules
    return False


def _unused_weights(report: Mapping[str, Any], config: LmConfig) -> list[str]:
    """A line about weights that the files have and the LM has no use for; none: no line."""
    unexpected = sorted(report["unexpected_keys"])
    if not unexpected:
        return []
    return [f"{len(unexpected):,} weights of {config.path} are not used, first {unexpected[0]!r}"]


def _unused_settings(generation: Any, config: LmConfig) -> list[str]:
    """A line about what `generation_config.json` says beside token ids; nothing: no line."""
    settings = []
    for name, value in sorted(generation.to_diff_dict().items()):
        chooses = not name.startswith(("_", "output_", "return_")) and not name.endswith(NOT_CHOOSING)
        if chooses and value is not None:
            settings.append(f"{name}={value}")
    if not settings:
        return []
    return [f"generation settings of {config.path} are not used, decoding is greedy: {', '.join(settings)}"]


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int, source: str, key: str = "lm.model") -> None:
    """Sets a padding token that the LM has, where there is none or one beyond the LM's embedding.

    Args:
        tokenizer: Changed in place.
        rows: Of the LM's input embedding.
        source: Hub id or folder.
        key: Section of the configuration that errors name.

    Raises:
        ValueError: Tokens that texts are made of lie beyond the embedding.
    """
    added = set(tokenizer.get_added_vocab().values())
    needed = {id_ for id_ in tokenizer.get_vocab().values() if id_ not in added}
    needed |= {id_ for id_ in (tokenizer.bos_token_id, tokenizer.eos_token_id) if id_ is not None}
    beyond = sorted(id_ for id_ in needed if id_ >= rows)
    if beyond:
        raise ValueError(
            f"{key}.path {source!r}: {len(beyond):,} tokens of the tokenizer lie beyond the LM's embedding, "
            f"first {tokenizer.convert_ids_to_tokens(beyond[0])!r} ({beyond[0]}), wanted ids below {rows}: "
            "give it the tokenizer that belongs to the weights"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it stands, so that any will do


@torch.no_grad()
def _reads_ahead(model: Any) -> bool:
    """Whether the logits behind the first token change with the last one, by an example of two rows."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    tokens = torch.arange(1, 9).repeat(2, 1)
    tokens[1, -1] = 10
    logits = model(input_ids=(tokens % rows).to(model.device), use_cache=False).logits.float()
    change = (logits[0] - logits[1]).norm(dim=-1)
    return bool(change[0] > LEAST_CHANGE * change[-1])


def _reads_padding(model: Any) -> bool:
    """Whether the logits behind a token change with what stands at the padding before it, by an example."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    tokens = torch.arange(1, 9).repeat(3, 1)
    tokens[1, :-1] += 10
    tokens[2, -1] = 20
    mask = torch.zeros_like(tokens)
    mask[:, -1] = 1
    batch = {"input_ids": tokens % rows, "attention_mask": mask, "position_ids": torch.zeros_like(tokens)}
    logits = answer_logits(model, {name: value.to(model.device) for name, value in batch.items()}).float()
    change = (logits[0] - logits[1:]).norm(dim=-1)
    return bool(change[0] > LARGEST_LEAK * change[1])


def load_tokenizer(
    config: LmConfig, path: str | Path | None = None, key: str = "lm.model"
) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """An LM's fast tokenizer, and the LM's shape as transformers knows it; no weights are read.

    Args:
        config: Which one.
        path: Folder that is loaded in place of `config.path`.
        key: Section of the configuration that errors name.

    Raises:
        ValueError: The LM is not named, or its tokenizer cannot be had.
    """
    from transformers import AutoConfig, AutoTokenizer

    source, options = locate(config, path, key)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
        shape = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    except LOADING_ERRORS as error:
        raise loading_error(config, source, error, key) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"{key}.path {source!r} has no fast tokenizer: add a tokenizer.json, or choose another one"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, shape


def context_length(config: LmConfig, shape: PretrainedConfig) -> int:
    """Most tokens of prompt and answer together.

    Args:
        config: Its `context` bounds what the LM allows.
        shape: The LM's own configuration (`model.config`).

    Raises:
        ValueError: `lm.model.context` is more than the LM's positions.
    """
    most = getattr(text_config(shape), "max_position_embeddings", None)
    if config.context is None:
        if most is None:
            raise ValueError(f"LM {config.name!r} states no longest input: set lm.model.context (tokens)")
        return int(most)
    if most is not None and config.context > most:
        raise ValueError(
            f"lm.model.context is {config.context}, LM {config.name!r} has {most} positions: lower it"
        )
    return config.context


def switch_off_dropout(model: PreTrainedModel) -> None:
    """Set every dropout to 0: under train(), as an adapter needs it, an LM answers as under eval()."""
    attributes = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in attributes:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _quantization(config: LmConfig) -> dict[str, Any]:
    """What `from_pretrained` takes for `lm.model.quantization`; a ValueError where it cannot be had here."""
    if config.quantization == "none":
        return {}
    if config.quantization not in ("4bit", "8bit"):
        raise ValueError(f"lm.model.quantization is {config.quantization!r}, want none, 4bit or 8bit")
    if not torch.cuda.is_available():
        raise ValueError(
            f"lm.model.quantization is {config.quantization!r}, which needs a GPU: set it to none"
        )
    from transformers import BitsAndBytesConfig

    if config.quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": nf4}
