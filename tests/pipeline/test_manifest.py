import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from recllm.errors import StageError
from recllm.files import digest, write_json
from recllm.pipeline import manifest
from recllm.pipeline.manifest import Manifest, describe_outputs

DESIGNED = (
    "stage dataset choice parents config_sha256 outputs metrics seed versions commit started finished".split()
)


def finished(root: Path, folder: str, text: str = "weights", parents=None, config: str = "c0", **changes):
    """A finished stage with one output file."""
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / "out.bin").write_text(text)
    made = Manifest(
        stage=folder.partition("/")[0],
        dataset="demo",
        choice=folder.partition("/")[2] or folder,
        parents=parents or {},
        config_sha256=config,
        outputs=describe_outputs(path, [path / "out.bin"]),
        metrics={"auc": 0.5},
        seed=0,
        started="2024-01-01T00:00:00+00:00",
        finished="2024-01-01T00:00:01+00:00",
        seconds=1.0,
        commit="abc",
        hardware="h",
    )
    made = dataclasses.replace(made, **changes)
    made.write(path)
    return made


def test_write_json_replaces_the_file_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "value.json"
    write_json(path, {"a": "é"})
    assert json.loads(path.read_text()) == {"a": "é"}
    assert "é" in path.read_text()
    assert [file.name for file in path.parent.iterdir()] == ["value.json"]

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", dies)  # killed after writing, before the rename
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": "é"}


def test_a_manifest_comes_back_and_has_the_designed_keys(tmp_path):
    made = finished(tmp_path, "stage1/sim")
    assert Manifest.read(tmp_path / "stage1/sim") == made
    assert set(DESIGNED) <= set(json.loads((tmp_path / "stage1/sim/manifest.json").read_text()))
    with pytest.raises(StageError, match="not finished"):
        Manifest.read(tmp_path / "stage1")


def test_outputs_are_described_by_content(tmp_path):
    (tmp_path / "export" / "deep").mkdir(parents=True)
    (tmp_path / "export" / "deep" / "b").write_bytes(b"12345")
    (tmp_path / "export" / "a").write_bytes(b"")
    (tmp_path / "m.json").write_bytes(b"{}")
    got = describe_outputs(tmp_path, [tmp_path / "m.json", tmp_path / "export"])
    assert [output["path"] for output in got] == ["export/a", "export/deep/b", "m.json"]
    assert [output["bytes"] for output in got] == [0, 5, 2]
    assert got[1]["sha256"] == hashlib.sha256(b"12345").hexdigest()


def test_identity_follows_outputs_and_configuration_not_time(tmp_path):
    made = finished(tmp_path / "a", "x")
    later = finished(
        tmp_path / "b", "x", started="2030", finished="2031", seconds=9.0, commit="def", hardware="g"
    )
    assert later.identity == made.identity
    assert dataclasses.replace(made, outputs=made.outputs[::-1]).identity == made.identity
    assert finished(tmp_path / "c", "x", text="Weights").identity != made.identity
    assert finished(tmp_path / "d", "x", config="c1").identity != made.identity


def test_digest_ignores_the_order_of_keys_only():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": [1, 2]}) != digest({"a": [2, 1]})
    assert digest({"a": 1}) != digest({"a": 1.5})


@pytest.mark.parametrize("harm", ["truncate", "remove"])
def test_a_truncated_or_missing_output_is_found(tmp_path, harm):
    made = finished(tmp_path, "neighbors/both")
    folder = tmp_path / "neighbors/both"
    assert made.missing_output(folder) is None
    file = folder / "out.bin"
    file.write_text("w") if harm == "truncate" else file.unlink()
    assert made.missing_output(folder) == "out.bin"


def test_commit_is_unknown_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "repository", lambda: tmp_path)
    assert manifest.commit() == "unknown"
