"""ONNX files against the models, on rows of the demo's log."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from recllm import crm
from recllm.crm import onnx
from recllm.crm.inputs import CrmInputs, table_sizes
from recllm.crm.onnx import check_onnx, export_onnx
from recllm.eventlog.statistics import Statistics
from recllm.retrieval.category import SameCategory
from tests.crm.contract import VARIANTS, config

MISSING = [name for name in onnx.PACKAGES if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(
    bool(MISSING), reason=f"the extra onnx is not installed ({', '.join(MISSING)})"
)
FAST = ("gru4rec", "retriever")
"""Models that are exported in the fast tests: an export takes seconds, most of them the exporter's."""
ALL = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]


@pytest.fixture(scope="module")
def rows(demo_log):
    """Rows without a history, with a short one, and with a long one."""
    start, end = demo_log.history(np.arange(demo_log.n_events))
    short = np.flatnonzero(end - start < 4)[:20]
    return np.concatenate([short, demo_log.rows("test", "last20")])


def make(variant, log):
    """A CRM with random weights, and of a retriever with text also random texts."""
    torch.manual_seed(0)
    model = crm.build(table_sizes(log), config(variant, embedding_std=1.0, statistics=True)).eval()
    if model.config.text_dim:
        items = model.fields.item_sizes[0]
        model.set_texts(torch.randn(items, model.config.text_dim), torch.arange(items) % 3 > 0)
    return model


def inputs(log, recent):
    """Batches with everything that a CRM may read."""
    return CrmInputs(log, recent, 9, searcher=SameCategory(log), statistics=Statistics(log))


@needs_onnx
@pytest.mark.parametrize("variant", ALL)
def test_the_files_give_the_model_s_numbers_for_any_batch_and_history(variant, demo_log, rows, tmp_path):
    model = make(variant, demo_log)
    described = json.loads(export_onnx(model, tmp_path).read_text())["files"]
    assert set(described) == (
        {"crm.onnx", "user.onnx", "item.onnx"} if variant.startswith("retriever") else {"crm.onnx"}
    )
    least = described["crm.onnx"]["sizes"].get("recent", {"least": 1})["least"]
    batches = [inputs(demo_log, 30)(rows), inputs(demo_log, 30)(rows[-1:]), inputs(demo_log, least)(rows)]
    differences = check_onnx(model, tmp_path, batches)
    assert max(differences.values()) <= 1e-4
    logit, _ = model(batches[0])
    assert logit.std() > 1e-3  # or else nothing would have been compared

    if variant == "retriever":
        check_description(described, batches[0])
        items = onnxruntime_session(tmp_path / "item.onnx").run(
            None, {"item": np.arange(len(model.item.weight))}
        )
        torch.testing.assert_close(torch.from_numpy(items[0]), model.item_vectors())


def onnxruntime_session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(path)


def check_description(described, batch):
    """What is read is named, in the batch's own dtypes, and no more."""
    user = described["user.onnx"]
    assert set(user["inputs"]) == {f"recent_{name}" for name in ("item", "rating", "elapsed", "mask")}
    for name, column in user["inputs"].items():
        assert str(batch[name].dtype) == f"torch.{column['dtype']}", name
        assert column["shape"][:2] == ["batch", "recent"]
        assert column["meaning"]
    assert user["sizes"] == {"batch": {"least": 1, "most": None}, "recent": {"least": 1, "most": None}}
    assert described["item.onnx"]["inputs"]["item"]["dtype"] == "int64"


@needs_onnx
def test_a_model_of_other_weights_is_told_from_its_file(demo_log, rows, tmp_path):
    model = make("deepfm", demo_log)
    export_onnx(model, tmp_path)
    with torch.no_grad():
        model.tower.logit.bias += 0.01
    with pytest.raises(ValueError, match=r"crm.onnx: logit differs by 0\.01 from the model; wanted 0\.0001"):
        check_onnx(model, tmp_path, [inputs(demo_log, 5)(rows)])


def test_missing_packages_are_one_line_with_the_command(monkeypatch, demo_log, tmp_path):
    monkeypatch.setattr(onnx, "PACKAGES", ("numpy", "no_such_package"))
    with pytest.raises(ValueError, match=r"no_such_package is not installed; run .*pip install") as caught:
        export_onnx(make("deepfm", demo_log), tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_model_that_trains_is_refused(monkeypatch, demo_log, tmp_path):
    monkeypatch.setattr(onnx, "PACKAGES", ())
    with pytest.raises(ValueError, match=r"training mode; wanted model\.eval"):
        export_onnx(make("deepfm", demo_log).train(), tmp_path)
