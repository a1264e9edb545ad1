"""Where an LM is found: folders and hub ids told apart, and errors of one line."""

import pytest

from recllm.lm.config import LmConfig
from recllm.lm.hub import loading_error, locate


def test_a_hub_id_has_its_revision_and_a_folder_has_none(tmp_path):
    assert locate(LmConfig(path="org/name", revision="v1"), None) == ("org/name", {"revision": "v1"})
    assert locate(LmConfig(path="org/name"), None) == ("org/name", {})
    assert locate(LmConfig(path="gpt2"), None) == ("gpt2", {})
    assert locate(LmConfig(path=str(tmp_path), revision="v1"), None) == (str(tmp_path), {})
    assert locate(LmConfig(path="org/name", revision="v1"), tmp_path) == (str(tmp_path), {})


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    assert locate(LmConfig(path="~/weights"), None) == (str(tmp_path / "weights"), {})


@pytest.mark.parametrize("path", ["/no/such/folder", "./weights", "~/weights-of-nobody", "a/b/c"])
def test_what_can_only_be_a_folder_must_be_there(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^encoder\.path is '.*', no such folder: give .* or a hub id$"):
        locate(LmConfig(path=path), None, "encoder")


def test_an_lm_that_is_not_named_is_one_line():
    with pytest.raises(ValueError, match=r"^lm\.model\.path is empty and LM 'x' is not trained yet"):
        locate(LmConfig(name="x"), None)


def test_whatever_is_wrong_is_one_line_of_some_length():
    config = LmConfig(path="org/name", revision="v1")
    error = loading_error(config, "org/name", OSError("no\n  such   model\n" + "x" * 999))
    start = "lm.model.path 'org/name' (lm.model.revision v1) cannot be loaded: no such model xxx"
    assert str(error).startswith(start)
    assert len(str(error)) < 300
    assert "\n" not in str(error)
