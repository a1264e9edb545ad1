"""`make config`: every key with its value, its meaning and where the value comes from."""

import pytest

from recllm.config.merge import LEAVES, origins
from stages.config import main


@pytest.fixture
def shown(tmp_path, monkeypatch, capsys):
    """`shown(*words)` -> exit status, and the lines of both outputs."""
    monkeypatch.setenv("RECLLM_ARTIFACTS", str(tmp_path))

    def run(*words):
        status = main(["show", *words])
        output = capsys.readouterr()
        return status, (output.out + output.err).splitlines()

    return run


def row(lines, key):
    """The words of the first line of a key's row."""
    (line,) = (line for line in lines if line.startswith(f"{key} "))
    return line.split()


def test_the_last_layer_that_states_a_key_is_its_origin():
    layers = [("one", {"stage2": {"fit": {"lr": 1, "epochs": 1}}}), ("two", {"stage2": {"fit": {"lr": 2}}})]
    origin = origins(layers)
    assert (origin["stage2.fit.lr"], origin["stage2.fit.epochs"], origin["seed"]) == ("two", "one", "default")
    assert set(origin) == set(LEAVES)


def test_values_and_where_they_come_from(shown):
    words = ("CRM=sim", "SYSTEM=reclora", "SEED=3", "stage2.fit.lr=0.125")
    status, lines = shown(*words)
    assert status == 0
    assert max(map(len, lines)) <= 120
    for key, value, origin in (
        ("stage2.fit.lr", "0.125", "ARGS"),
        ("stage2.fit.epochs", "3.0", "conf/dataset/demo.yaml"),
        ("stage2.gate_first", "3.0", "conf/lm/tiny.yaml"),
        ("stage2.representation", "out_of_fold", "conf/stage2/reclora.yaml"),
        ("stage1.retrieved", "30", "conf/stage1/sim.yaml"),
        ("stage2.fit.clip", "1.0", "default"),
        ("seed", "3", "SEED=3"),
    ):
        cells = row(lines, key)
        assert (cells[1], cells[-1]) == (value, origin)
    for key in LEAVES:
        row(lines, key)


def test_keys_that_begin_so(shown):
    status, lines = shown("KEY=stage2.fit.v")
    assert status == 0
    keys = [line.split()[0] for line in lines if line.startswith("stage2.")]
    assert keys == ["stage2.fit.validations", "stage2.fit.valid_rows"]
    assert "Without SYSTEM= no file of conf/stage2 or conf/stage3 is in it." in lines


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["KEY=stage2.fit.lrr"], "the nearest is stage2.fit.lr"),
        (["CRM=din sim"], "CRM='din sim' names 2; wanted one"),
        (["SYSTEM=lora s-dpo"], "SYSTEM='lora s-dpo' names 2; wanted one"),
        (["SYSTEM=reclorra"], "SYSTEM=reclorra is not known"),
        (["stage2.fit.precision=fp8"], "stage2.fit.precision=fp8: Invalid value 'fp8', expected one of"),
    ],
)
def test_what_cannot_be_shown_is_one_line(shown, words, wanted):
    status, lines = shown(*words)
    assert status == 2
    (line,) = lines
    assert wanted in line
