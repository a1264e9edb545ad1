"""What Make is told: rules, the cores that stages share, what is done and what is stale."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from recllm.config.request import parse
from recllm.pipeline.graph import Plan
from recllm.pipeline.stage_file import StageFile
from stages import plan
from tests.stages.plans import configs, finish, needed, of_stage, rules, states

REPOSITORY = Path(__file__).parents[2]


def test_execution_keys_and_raw_reach_no_configuration(root, tmp_path):
    assert plan.main(["write", "stage3"]) == 0
    before = configs(root)
    digests = {folder: StageFile.read(root / folder).sha256 for folder in before}
    keys = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.threads=1", f"RAW={tmp_path}"]
    assert plan.main(["write", "stage3", *keys]) == 0
    assert configs(root) == before
    assert not any("trainer" in text or str(tmp_path) in text for text in before.values())
    assert {folder: StageFile.read(root / folder).sha256 for folder in before} == digests
    text = rules(root).read_text()
    assert "EXECUTION := trainer.devices=2 trainer.strategy=ddp trainer.threads=1\n" in text
    assert [line for line in text.splitlines() if "raw=" in line] == [
        f"\t@$(PYTHON) -m stages {root / 'tables'} $(EXECUTION) raw={tmp_path}"
    ]


def test_a_raw_path_may_have_blanks_and_dollars(root, tmp_path):
    raw = tmp_path / "my $raw files"
    raw.mkdir()
    assert plan.main(["write", "prepare", f"RAW={raw}"]) == 0
    command = ["make", "-n", "-f", str(rules(root)), "PYTHON=python", "prepare"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    words = shlex.split(next(line for line in out.splitlines() if "/tables " in line))
    assert words[-1] == f"raw={raw}"


def test_commands_side_by_side_follow_each_its_own_rules(root, capsys):
    found = []
    for crm in ("din", "sim", "din"):
        assert plan.main(["write", "stage1", f"CRM={crm}"]) == 0
        found.append(Path(capsys.readouterr().out.strip()))
    assert found[0] == found[2] != found[1]
    assert "stage1/din" in found[0].read_text()
    assert "stage1/din" not in found[1].read_text()


@pytest.mark.parametrize("goal", ["stage2", "stage3"])
def test_rules_run_parents_first(root, goal):
    assert plan.main(["write", goal]) == 0
    nodes = Plan(parse([goal])).needed()
    command = ["make", "-n", "-f", str(rules(root)), "PYTHON=python", goal]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    order = [
        line.split()[3] for line in lines if line.startswith("python -m") and "stages.report" not in line
    ]
    assert sorted(order) == sorted(str(root / node.folder) for node in nodes)  # each once
    for node in nodes:
        for parent in node.parents.values():
            assert order.index(str(root / parent.folder)) < order.index(str(root / node.folder))


def test_stages_that_may_run_side_by_side_share_the_cores(root):
    assert plan.main(["write", "stage2"]) == 0
    text = rules(root).read_text()
    recipes = [line.split() for line in text.splitlines() if line.startswith("\t@") and "report" not in line]
    shared = {line[-2].removeprefix(f"{root}/"): line[0] == "@$(SHARE)" for line in recipes}
    whole = {folder for folder, share in shared.items() if not share}
    # The others wait for these: SIM and its like for the LM's second phase, though they do not need it.
    assert whole == {"tables", "log", "lm/tiny/text", "neighbors/both", "lm/tiny/prompts"}
    assert shared.keys() == needed("stage2").keys()
    assert plan.main(["write", "stage1", "stage3"]) == 0
    assert f"\t@$(PYTHON) -m stages {root}/evaluate/" in rules(root).read_text()  # waits for all others
    assert plan.main(["write", "stage1", "CRM=sim"]) == 0
    assert "$(SHARE)" not in rules(root).read_text()  # a chain


def test_nothing_runs_beside_an_lm_in_training(root):
    assert plan.main(["write", "stage1", "stage3"]) == 0
    text = rules(root).read_text()
    first, second = (root / f"lm/tiny/{phase}/manifest.json" for phase in ("text", "prompts"))
    heads = {line.partition(":")[0]: line for line in text.splitlines() if line.startswith(f"{root}/")}
    # DIN needs neither phase, SIM needs the first one's vectors; both wait for what they do not need, too.
    assert heads[f"{root}/stage1/din/manifest.json"].endswith(f"{root}/log/manifest.json | {first} {second}")
    assert heads[f"{root}/stage1/sim/manifest.json"].endswith(f"/neighbors/both/manifest.json | {second}")
    assert "|" not in heads[f"{root}/neighbors/both/manifest.json"]  # it leads to the second phase
    assert f"$(SHARE) $(PYTHON) -m stages {root}/lm/" not in text
    assert plan.main(["write", "stage1", "CRM=din"]) == 0
    assert "|" not in rules(root).read_text()  # no LM, no waiting


def test_a_stage_on_several_devices_runs_alone(root):
    assert plan.main(["write", "stage1"]) == 0
    assert ".NOTPARALLEL" not in rules(root).read_text()
    assert plan.main(["write", "stage1", "trainer.devices=2"]) == 0
    assert ".NOTPARALLEL:\n" in rules(root).read_text()


def test_a_second_make_has_nothing_to_do_and_a_changed_key_only_what_it_reaches(root):
    assert plan.main(["write", "stage2"]) == 0
    finish(Plan(parse(["stage2"])))

    def to_do(*words):
        assert plan.main(["write", "stage2", *words]) == 0
        command = ["make", "-n", "-f", str(rules(root)), "PYTHON=python", "stage2"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        return [
            str(Path(line.split()[3]).relative_to(root)) for line in lines if line.startswith("python -m")
        ]

    assert to_do() == []
    assert to_do("trainer.devices=2") == []
    assert to_do("stage2.fit.lr=0.5") == [
        "stage2/lora+stage2.fit.lr-0.5",
        "stage2/reclora+stage2.fit.lr-0.5",
    ]


def test_states(root):
    assert set(states("stage2").values()) == {"missing"}
    assert plan.main(["write", "stage2"]) == 0
    finish(Plan(parse(["stage2"])))
    assert set(states("stage2").values()) == {"done"}
    # What was made with another configuration is stale, and all below it.
    path = root / "neighbors/both/manifest.json"
    manifest = path.read_text()
    path.write_text(re.sub(r'("config_sha256": ")\w', r"\1-", manifest))
    changed = states("stage2")
    stale = {folder for folder, state in changed.items() if state == "stale"}
    assert stale == {
        "neighbors/both", "lm/tiny/prompts", "stage1/sim", "stage1/sim+heldout-0.1",
        "stage2/lora", "stage2/reclora",
    }  # fmt: skip
    path.write_text(manifest)
    # A manifest gone and a checkpoint left: the stage was interrupted, its children are stale.
    (root / "stage1/sim/manifest.json").unlink()
    (root / "stage1/sim/checkpoints").mkdir()
    (root / "stage1/sim/checkpoints/last.ckpt").write_bytes(b"")
    got = states("stage2")
    assert got["stage1/sim"] == "interrupted"
    assert got["stage2/lora"] == "stale"
    assert got["log"] == "done"


def test_status_prints_every_folder_and_writes_nothing(root, capsys):
    assert plan.main(["status", "stage2"]) == 0
    text = capsys.readouterr().out
    for folder in needed("stage2"):
        assert folder in text
    assert not root.parent.exists()


def test_the_makefile_turns_its_variables_into_these_words(root):
    words = ["make", "-n", "stage2", "PYTHON=python", "CRM=sim din", "SEED=0 1", "ARGS=stage2.fit.lr=1"]
    environment = {**os.environ, "MAKEFLAGS": ""}
    out = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=REPOSITORY).stdout
    line = next(line for line in out.splitlines() if "stages.plan write" in line)
    for word in ("stage2", 'CRM="sim din"', 'SEED="0 1"', "stage2.fit.lr=1", 'DATASET="demo"'):
        assert word in line


def test_a_study_depends_on_what_its_crm_reads_and_is_never_up_to_date(root):
    assert set(needed("tune", "CRM=din")) == {"tables", "log", "tune/din"}
    nodes = needed("tune", "CRM=din sim", "SEED=1")
    assert of_stage(nodes, "tune") == {"tune/din+s1", "tune/sim+s1"}
    assert nodes["tune/sim+s1"].parents["neighbors"].folder == "neighbors/both"
    assert "tune" in nodes["tune/din+s1"].config
    assert not of_stage(needed("stage1"), "tune")
    written = plan.write(Plan(parse(["tune", "CRM=din"]))).read_text()
    folder = root / "tune" / "din"
    assert f".PHONY: {folder}\n" in written
    assert f"\n{folder}: {folder / 'config.yaml'} {root / 'log' / 'manifest.json'}\n" in written
