"""`make onnx`: the files of a finished CRM, and what is said where that cannot be."""

import importlib.util
import json

import pytest

from recllm.crm import onnx as crm_onnx
from stages import onnx
from tests.systems.finished_demo import CRMS_ALONE, FinishedDemo

MISSING = [name for name in crm_onnx.PACKAGES if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"the extra onnx is not installed ({', '.join(MISSING)})")
def test_a_finished_crm_s_files_are_written_and_compared(root, demo_log, demo_config, tiny_lm, capsys):
    FinishedDemo(root, demo_log, demo_config, tiny_lm, CRMS_ALONE)
    assert onnx.main(["CRM=din"]) == 0
    out = root / "onnx" / "din"
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == str(out / "onnx.json")
    assert [line.partition(": ")[2].split(":")[0] for line in lines] == ["logit", "representation"]
    described = json.loads((out / "onnx.json").read_text())
    assert described["crm"] == "din"
    assert sorted(path.name for path in out.iterdir()) == ["crm.onnx", "onnx.json"]
    assert "recent_interval" in described["files"]["crm.onnx"]["inputs"]


def test_what_cannot_be_done_is_one_line(root, monkeypatch, capsys):
    monkeypatch.setattr(crm_onnx, "PACKAGES", ("no_such_package",))
    assert onnx.main(["check"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ONNX export needs no_such_package")
    assert error.count("\n") == 1
    monkeypatch.setattr(crm_onnx, "PACKAGES", ())
    assert onnx.main(["check"]) == 0
    assert onnx.main(["CRM=nobody"]) == 2
    assert "CRM=nobody is not known" in capsys.readouterr().err
