"""What a command loads before it does anything: seconds of everybody's time, at every start of a stage."""

import json
import subprocess
import sys

import pytest

TORCH = {"torch"}
TRAINING = {"lightning", "torchmetrics"}
LMS = {"transformers", "peft", "accelerate"}
SEARCH = {"faiss", "scipy"}
PAGES = {"matplotlib", "rich"}
COMPILER = {"torch._dynamo", "sympy"}
ALL = TORCH | TRAINING | LMS | SEARCH | PAGES | COMPILER


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("stages.__main__", ALL),  # of a stage that is done already, this is all
        ("stages.plan", ALL),
        ("stages.config", ALL),
        ("stages.prepare", ALL),
        ("stages.retrieve", TRAINING | LMS | PAGES | COMPILER),
        ("stages.report", TRAINING | LMS | SEARCH | COMPILER),
        ("stages.describe", TRAINING | LMS | SEARCH | COMPILER),
        ("stages.evaluate", TRAINING | PAGES),
        ("stages.cascade", TRAINING | PAGES),
    ],
)
def test_a_command_does_not_load_what_it_does_not_need(module, unwanted):
    code = f"import json, sys; import {module}; print(json.dumps(sorted(set(sys.modules))))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(json.loads(process.stdout)) & unwanted
