"""What a cascade is made of."""

import pytest

from recllm.config.request import parse
from recllm.errors import ConfigError
from recllm.pipeline.graph import Plan
from tests.stages.plans import needed, of_stage


def parents(nodes, folder):
    return {str(role): node.folder for role, node in nodes[folder].parents.items()}


def test_the_plain_command(root):
    nodes = needed("cascade")
    assert parents(nodes, "cascade/reclora") == {
        "log": "log",
        "neighbors": "neighbors/both",
        "lm": "lm/tiny/prompts",
        "stage1": "stage1/sim",
        "retriever": "stage1/retriever",
        "system": "stage2/reclora",
    }
    # Nothing is trained that it does not read.
    assert of_stage(nodes, "stage1") == {"stage1/sim", "stage1/retriever", "stage1/sim+heldout-0.1"}
    assert of_stage(nodes, "stage2") == {"stage2/reclora"}
    assert not of_stage(nodes, "evaluate")


def test_an_aligned_system_brings_its_start(root):
    nodes = needed("cascade", "SYSTEM=s-dpo", "CRM=din")
    assert parents(nodes, "cascade/s-dpo+din")["system"] == "stage3/s-dpo+din"
    assert of_stage(nodes, "stage2") == {"stage2/reclora+din"}


def test_steps_may_be_left_out(root):
    nodes = needed("cascade", "SYSTEM=none", "CRM=din", "cascade.first=popularity")
    assert set(nodes) == {"tables", "log", "stage1/din", "cascade/din+first-popularity"}
    nodes = needed("cascade", "SYSTEM=none", "CRM=sim")
    assert set(parents(nodes, "cascade/sim")) == {"log", "neighbors", "stage1", "retriever"}


def test_what_a_cascade_cannot_be(root):
    with pytest.raises(ConfigError, match="SYSTEM=ctr-bert has two towers"):
        Plan(parse(["cascade", "SYSTEM=ctr-bert"]))
    with pytest.raises(ConfigError, match=r"cascade.ranked=50 .* wanted at most cascade.retrieved=20"):
        Plan(parse(["cascade", "cascade.retrieved=20"]))
