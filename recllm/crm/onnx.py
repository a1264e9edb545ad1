"""CRMs as ONNX files, for servers without PyTorch: for any batch, and histories of any length.

`export_onnx` writes `crm.onnx`, and of a retriever `user.onnx` and `item.onnx`, its two towers; then
`onnx.json`, which says of each file what goes in (name, dtype, shape, meaning) and what comes out.
`check_onnx` compares the files with the model on batches of `recllm.crm.inputs.CrmInputs`.

It needs the packages of the extra `onnx`; nothing else of this project does.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recllm.crm.caser import Caser
from recllm.crm.config import CrmConfig, Fields
from recllm.crm.gru4rec import GRU4Rec
from recllm.crm.layers import POSITIONS, Model
from recllm.crm.retriever import Retriever
from recllm.crm.sim import SIM
from recllm.eventlog.statistics import LEVELS, STATISTICS
from recllm.files import publish, write_json

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
DESCRIPTION = "onnx.json"
TOLERANCE = 1e-4
"""Most that an output may differ from the model's, as a share of its largest value if that is above 1."""
LARGEST = 1.9e9
"""Bytes of weights that one ONNX file holds; protobuf ends at 2 GiB."""


@dataclass(frozen=True)
class Column:
    """An input or output of a graph.

    Attributes:
        dtype: of the tensor.
        shape: sizes, or names of those that may vary: `batch`, `recent`, `retrieved`.
        meaning: in words.
    """

    dtype: torch.dtype
    shape: tuple[int | str, ...]
    meaning: str

    def described(self) -> dict[str, Any]:
        """What `onnx.json` says of it."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"dtype": dtype, "shape": list(self.shape), "meaning": self.meaning}


@dataclass(frozen=True)
class Graph:
    """One ONNX file.

    Attributes:
        module: takes a batch, `inputs` by name, and returns the outputs.
        inputs: what a batch may hold; what the module does not read is left out of the file.
        outputs: by name.
        least: least sizes of the dimensions that may vary, by name; 1 where it says nothing.
        most: largest sizes, by name; unbounded where it says nothing.
    """

    module: nn.Module
    inputs: dict[str, Column]
    outputs: dict[str, Column]
    least: dict[str, int]
    most: dict[str, int]


def check_packages() -> None:
    """Refuses to begin without the extra's packages.

    Raises:
        ValueError: one is missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"ONNX export needs {', '.join(PACKAGES)}, and {', '.join(missing)} is not installed; run "
            '`.venv/bin/python -m pip install -c constraints.txt -e ".[onnx]"`'
        )


def columns(fields: Fields, config: CrmConfig) -> dict[str, Column]:
    """All that a batch of `CrmInputs` may hold and a CRM may read, in its dtypes."""
    item = len(fields.item_sizes)
    unknown = "0: none, 1: unknown"
    found = {
        "user": Column(
            torch.int32,
            ("batch", len(fields.user_sizes)),
            f"ids of the user's fields, the user's own first ({unknown}); row of the log's user_fields",
        ),
        "item": Column(
            torch.int32,
            ("batch", item),
            f"ids of the target's fields, the item's own first ({unknown}); row of the log's item_fields",
        ),
        "dense": Column(torch.int32, ("batch",), "the target's dense id, its row in the log's items.parquet"),
        "statistics": Column(
            torch.int32,
            ("batch", len(STATISTICS)),
            f"codes 0 to {LEVELS - 1} of running statistics before the sample: {', '.join(STATISTICS)}",
        ),
    }
    for kind, events in (("recent", "the latest events"), ("retrieved", "the events found for the target")):
        grid = ("batch", kind)
        found |= {
            f"{kind}_item": Column(torch.int32, (*grid, item), f"ids of the item's fields of {events}"),
            f"{kind}_rating": Column(
                torch.int32, grid, f"rating codes of {events}, 1 to {fields.rating_levels}; 0: no rating"
            ),
            f"{kind}_interval": Column(
                torch.int32,
                grid,
                f"1 + floor(log2(1 + seconds before the sample)) of {events}, 31 at most; 0 without times",
            ),
            f"{kind}_elapsed": Column(torch.int64, grid, f"seconds between {events} and the sample"),
            f"{kind}_dense": Column(torch.int32, grid, f"dense item ids of {events}"),
            f"{kind}_mask": Column(
                torch.bool, grid, f"true where there is one of {events}, in time order; false is padding"
            ),
        }
    found["retrieved_rank"] = Column(
        torch.int32,
        ("batch", "retrieved"),
        "1 for the event nearest to the target, 2 for the next; 0: padding",
    )
    return found


def graphs(model: Model) -> dict[str, Graph]:
    """What is written of a model, by name of the file."""
    batch = columns(model.fields, model.config)
    score = {
        "logit": Column(
            torch.float32, ("batch",), "score of the target; its sigmoid is a probability of a like"
        ),
        "representation": Column(
            torch.float32, ("batch", model.representation_dim), "what the gate of stage 2 reads"
        ),
    }
    least = {}
    most = {}
    if isinstance(model, Caser):
        least["recent"] = max(model.config.heights) + 1
        most["recent"] = POSITIONS - 1
    if isinstance(model, SIM) and model.search is not None:
        least["recent"] = max(model.config.soft_k, model.config.soft_recent) + 1
    files = {"crm.onnx": Graph(model, batch, score, least, most)}
    if isinstance(model, Retriever):
        width = ("batch", model.representation_dim)
        vector = Column(torch.float32, width, "score of an item: inner product with its vector")
        files["user.onnx"] = Graph(_UserTower(model), batch, {"user_vector": vector}, least, most)
        ids = Column(
            torch.int64,
            ("batch",),
            f"dense item ids, below {model.fields.item_sizes[0]}; all of them for an index",
        )
        files["item.onnx"] = Graph(
            _ItemTower(model),
            {"item": ids},
            {
                "item_vector": Column(
                    torch.float32, width, "its inner product with a user vector is the score"
                )
            },
            {},
            {},
        )
    return files


def export_onnx(model: Model, folder: str | Path) -> Path:
    """Writes a CRM's ONNX files and their description.

    Args:
        model: the CRM, in eval mode, on the CPU.
        folder: made if absent.

    Returns:
        The path of `onnx.json`.

    Raises:
        ValueError: a package is missing, the model trains, or its weights are more than a file holds.
    """
    check_packages()
    if model.training:
        raise ValueError("got a CRM in training mode; wanted model.eval()")
    size = sum(value.nbytes for value in model.state_dict().values())
    if size > LARGEST:
        raise ValueError(
            f"got weights of {size / 1e9:.1f} GB; an ONNX file holds {LARGEST / 1e9:.1f} GB; "
            "ARGS=stage1.crm.embedding_dim=16 trains smaller tables"
        )
    folder = Path(folder)
    files = {}
    for name, graph in graphs(model).items():
        program = _program(model, graph)
        with publish(folder / name) as path:
            program.save(path)
        inputs = [value.name for value in program.model.graph.inputs]
        varying = {size for column in inputs for size in graph.inputs[column].shape if isinstance(size, str)}
        files[name] = {
            "inputs": {column: graph.inputs[column].described() for column in inputs},
            "outputs": {column: value.described() for column, value in graph.outputs.items()},
            "sizes": {
                dimension: {"least": graph.least.get(dimension, 1), "most": graph.most.get(dimension)}
                for dimension in sorted(varying)
            },
            "opset": program.model.opset_imports[""],
        }
    description = folder / DESCRIPTION
    write_json(description, {"crm": model.config.name, "files": files})
    return description


def check_onnx(model: Model, folder: str | Path, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """Compares what onnxruntime makes of the files with the model.

    Args:
        model: the CRM that was exported.
        folder: what `export_onnx` wrote.
        batches: of `recllm.crm.inputs.CrmInputs`, on the CPU.

    Returns:
        The largest difference of each output over all batches, `file: output`.

    Raises:
        ValueError: an output differs by more than `TOLERANCE`, or is no number.
    """
    import onnxruntime

    differences: dict[str, float] = {}
    batches = list(batches)
    for name, graph in graphs(model).items():
        session = onnxruntime.InferenceSession(Path(folder) / name, providers=["CPUExecutionProvider"])
        read = [value.name for value in session.get_inputs()]
        for batch in batches:
            if name == "item.onnx":
                batch = {"item": batch["dense"].long()}
            with torch.inference_mode():
                wanted = graph.module(batch)
            wanted = wanted if isinstance(wanted, tuple) else (wanted,)
            got = session.run(None, {column: _array(batch[column], graph.inputs[column]) for column in read})
            for output, right, value in zip(graph.outputs, wanted, got, strict=True):
                key = f"{name}: {output}"
                off = float(np.abs(right.numpy() - value).max(initial=0.0))
                if not off <= TOLERANCE * max(1.0, float(right.abs().max())):
                    raise ValueError(
                        f"{key} differs by {off:.2g} from the model; wanted {TOLERANCE:g}; "
                        "please report it with the versions of torch, onnxscript and onnxruntime"
                    )
                differences[key] = max(differences.get(key, 0.0), off)
    return differences


def _array(values: Tensor, column: Column) -> np.ndarray:
    return values.to(column.dtype).numpy()


def _program(model: Model, graph: Graph) -> Any:
    """The ONNX program of a graph."""
    sizes = {"batch": 3, "recent": max(graph.least.get("recent", 1), 4), "retrieved": 5}
    dimensions = {
        name: torch.export.Dim(name, min=graph.least.get(name, 1), max=graph.most.get(name)) for name in sizes
    }
    batch = {}
    for name, column in graph.inputs.items():
        shape = [sizes[size] if isinstance(size, str) else size for size in column.shape]
        batch[name] = torch.ones(shape, dtype=column.dtype)
    batch = {name: batch[name] for name in _read(graph.module, batch)}
    varying = []
    for name in batch:
        named = enumerate(graph.inputs[name].shape)
        varying.append({place: dimensions[size] for place, size in named if isinstance(size, str)})
    with _gru_of_onnx(model), _quiet():
        program = torch.onnx.export(
            _Columns(graph.module, list(batch)),
            tuple(batch.values()),
            input_names=list(batch),
            output_names=list(graph.outputs),
            dynamic_shapes=(tuple(varying),),
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # dynamo=True returns one
    return program


def _read(module: nn.Module, batch: Mapping[str, Tensor]) -> list[str]:
    """The columns that a module cannot do without."""
    names = []
    for name in batch:
        others = {other: value for other, value in batch.items() if other != name}
        try:
            with torch.inference_mode():
                module(others)
        except (KeyError, ValueError):
            names.append(name)
    return names


class _Columns(nn.Module):
    """A module that takes a batch's columns one by one.

    Integers are widened: not every operator of ONNX takes int32.
    """

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module = module
        self.names = names

    def forward(self, *values: Tensor) -> Any:
        wide = [value.long() if value.dtype == torch.int32 else value for value in values]
        return self.module(dict(zip(self.names, wide, strict=True)))


class _UserTower(nn.Module):
    """A retriever's user vectors."""

    def __init__(self, model: Retriever) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.model.user_vectors(batch)


class _ItemTower(nn.Module):
    """A retriever's item vectors."""

    def __init__(self, model: Retriever) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.model.item_vectors(batch["item"])


class _OnnxGru(nn.Module):
    """ONNX's own GRU in the place of PyTorch's, which the export would unroll to one length.

    ONNX has the gates in the order z, r, h, and PyTorch r, z, n; `linear_before_reset` is PyTorch's formula.
    """

    def __init__(self, gru: nn.GRU) -> None:
        super().__init__()
        self.width = gru.hidden_size
        self.layers = gru.num_layers
        for layer in range(gru.num_layers):
            kinds = [getattr(gru, f"{name}_l{layer}").detach() for name in ("weight_ih", "weight_hh")]
            biases = [getattr(gru, f"{name}_l{layer}").detach() for name in ("bias_ih", "bias_hh")]
            weights, recurrent = (_gates_of_onnx(value)[None] for value in kinds)
            self.register_buffer(f"weights{layer}", weights)
            self.register_buffer(f"recurrent{layer}", recurrent)
            self.register_buffer(f"bias{layer}", torch.cat([_gates_of_onnx(value) for value in biases])[None])

    def forward(self, events: Tensor) -> tuple[Tensor, None]:
        states = events.transpose(0, 1)
        for layer in range(self.layers):
            length, samples = states.shape[:2]
            parameters = [getattr(self, f"{name}{layer}") for name in ("weights", "recurrent", "bias")]
            states = torch.onnx.ops.symbolic(
                "GRU",
                [states, *parameters],
                {"hidden_size": self.width, "linear_before_reset": 1},
                dtype=events.dtype,
                shape=[length, 1, samples, self.width],
            ).squeeze(1)
        return states.transpose(0, 1), None


def _gates_of_onnx(values: Tensor) -> Tensor:
    """Rows of the gates r, z, n in the order z, r, n."""
    reset, update, new = values.chunk(3)
    return torch.cat([update, reset, new])


@contextmanager
def _gru_of_onnx(model: Model) -> Iterator[None]:
    """The model with ONNX's GRU while the block runs."""
    if not isinstance(model, GRU4Rec):
        yield
        return
    gru = model.gru
    setattr(model, "gru", _OnnxGru(gru).eval())  # noqa: B010 - of another type
    try:
        yield
    finally:
        model.gru = gru


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on itself, and on packages that are not needed here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
