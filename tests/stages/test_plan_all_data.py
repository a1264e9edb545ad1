"""What `ALL_DATA=1` trains once more, and what tells it how long."""

import subprocess

import pytest

from recllm.config.request import parse
from recllm.errors import ConfigError
from recllm.pipeline.graph import Plan
from recllm.pipeline.stages import REPEATED
from stages import plan
from tests.stages.plans import needed, of_stage, rules


def parents(nodes, folder):
    return {str(role): node.folder for role, node in nodes[folder].parents.items()}


def test_everything_that_is_trained_is_trained_once_more(root):
    plain = needed("cascade", "SYSTEM=s-dpo")
    nodes = needed("cascade", "SYSTEM=s-dpo", "ALL_DATA=1")
    again = {
        "log+all-data", "lm/tiny+all-data/text", "neighbors/both+all-data", "lm/tiny+all-data/prompts",
        "stage1/sim+all-data", "stage1/sim+heldout-0.1+all-data", "stage1/retriever+all-data",
        "stage2/reclora+all-data", "stage3/s-dpo+all-data", "cascade/s-dpo+all-data",
    }  # fmt: skip
    assert set(nodes) == {*plain, *again}
    # The plain ones are what they are without.
    for folder, node in plain.items():
        assert nodes[folder].file == node.file
    assert parents(nodes, "log+all-data") == {"log": "log"}
    assert parents(nodes, "cascade/s-dpo+all-data") == {
        "log": "log+all-data",
        "neighbors": "neighbors/both+all-data",
        "lm": "lm/tiny+all-data/prompts",
        "stage1": "stage1/sim+all-data",
        "retriever": "stage1/retriever+all-data",
        "system": "stage3/s-dpo+all-data",
        "chosen": "cascade/s-dpo",
    }
    assert parents(nodes, "stage2/reclora+all-data") == {
        "log": "log+all-data",
        "neighbors": "neighbors/both+all-data",
        "lm": "lm/tiny+all-data/prompts",
        "stage1": "stage1/sim+heldout-0.1+all-data",
        "chosen": "stage2/reclora",
    }
    assert parents(nodes, "lm/tiny+all-data/text") == {"log": "log+all-data"}


@pytest.mark.parametrize(
    "words", [["LM=org/name-7b"], ["SYSTEM=none", "CRM=din", "SEED=1 2"], ["stage1.fit.lr=0.1"]]
)
def test_each_has_its_like_as_a_parent(root, words):
    nodes = needed("cascade", "ALL_DATA=1", *words)
    whole = [node for node in nodes.values() if "+all-data" in node.folder]
    repeated = [node for node in whole if node.stage.name in REPEATED]
    assert repeated
    for node in repeated:
        assert parents(nodes, node.folder)["chosen"] == node.folder.replace("+all-data", "")
        assert node.config == nodes[node.folder.replace("+all-data", "")].config
        # Nothing of it is made from the log that holds samples out.
        others = {name for role, name in parents(nodes, node.folder).items() if role != "chosen"}
        assert all("+all-data" in name for name in others)


def test_its_rules_are_no_circle_and_come_behind_the_rest(root):
    assert plan.main(["write", "cascade", "ALL_DATA=1"]) == 0
    command = ["make", "-n", "-f", str(rules(root)), "PYTHON=python", "SHARE=", "cascade"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "Circular" not in done.stdout + done.stderr
    folders = [line.split()[3] for line in done.stdout.splitlines() if "-m stages " in line]
    last_plain = max(place for place, folder in enumerate(folders) if folder.endswith("lm/tiny/prompts"))
    assert all(last_plain < place for place, folder in enumerate(folders) if "stage1/sim+all" in folder)


def test_only_its_cascades_are_a_goal(root):
    whole = Plan(parse(["cascade", "ALL_DATA=1"]))
    assert [node.folder for node in whole.goals["cascade"]] == ["cascade/reclora+all-data"]
    assert not of_stage({node.folder: node for node in whole.needed()}, "evaluate")
    assert not whole.goals["evaluate"] or all("all-data" not in n.folder for n in whole.goals["evaluate"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["evaluate", "ALL_DATA=1"], "ALL_DATA=1 trains on the test split, too, so that evaluate would"),
        (["ALL_DATA=1"], "so that report would measure nothing"),
        (["cascade", "ALL_DATA=yes"], "ALL_DATA=yes; wanted 1"),
    ],
)
def test_nothing_is_measured_by_it(words, line):
    with pytest.raises(ConfigError, match=line):
        parse(words)
