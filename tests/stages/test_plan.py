import re
from pathlib import Path

import pytest

from recllm.config.request import parse
from recllm.errors import ConfigError
from recllm.pipeline.finished import read_config
from recllm.pipeline.graph import Plan
from stages import plan
from tests.stages.plans import configs, finish, needed, of_stage, states

REPOSITORY = Path(__file__).parents[2]


def test_the_plain_command(root):
    nodes = needed("stage3")
    assert set(nodes) == {
        "tables", "log", "lm/tiny/text", "neighbors/both", "lm/tiny/prompts",
        "stage1/din", "stage1/sim", "stage1/ranker", "stage1/sim+heldout-0.1",
        "stage2/lora", "stage2/reclora",
        "stage3/sft-continued", "stage3/dpo", "stage3/s-dpo", "evaluate/all",
    }  # fmt: skip
    assert nodes["stage2/lora"].parents["stage1"].folder == "stage1/sim"
    assert nodes["stage2/reclora"].parents["stage1"].folder == "stage1/sim+heldout-0.1"
    assert nodes["stage3/s-dpo"].parents["stage2"].folder == "stage2/reclora"
    assert next(iter(nodes)) == "tables"
    assert nodes["stage2/reclora"].config["stage2"]["adapter"]["kind"] == "reclora"
    assert nodes["stage2/lora"].config["stage2"]["adapter"]["kind"] == "lora"


def test_crms_are_evaluated_without_an_lm(root):
    nodes = needed("evaluate", "SYSTEM=none", "CRM=deepfm din", "SEED=0 1")
    assert set(nodes) == {
        "tables", "log", "stage1/deepfm", "stage1/din", "evaluate/deepfm,din",
        "stage1/deepfm+s1", "stage1/din+s1", "evaluate/deepfm,din+s1",
    }  # fmt: skip
    parents = {role: node.folder for role, node in nodes["evaluate/deepfm,din"].parents.items()}
    crms = {"crm:deepfm": "stage1/deepfm", "crm:din": "stage1/din"}
    assert parents == {"log": "log", "stage1": "stage1/din", **crms}
    with_sim = needed("evaluate", "SYSTEM=none", "CRM=din sim")
    assert with_sim["evaluate/din,sim"].parents["neighbors"].folder == "neighbors/both"
    with pytest.raises(ConfigError, match="SYSTEM=none leaves stage2 nothing to do"):
        parse(["stage2", "SYSTEM=none"])


def test_a_goal_needs_its_ancestors_only(root):
    assert set(needed("prepare")) == {"tables", "log"}
    assert set(needed("stage1", "CRM=sim")) == {
        "tables", "log", "lm/tiny/text", "neighbors/both", "stage1/sim",
    }  # fmt: skip


@pytest.mark.parametrize("words", [["CRM=din"], ["CRM=sim", "stage1.crm.retrieval=hard"]])
def test_a_crm_that_reads_no_neighbors_needs_no_lm(root, words):
    alone = {"tables", "log", f"stage1/{words[0].removeprefix('CRM=')}"}
    assert set(needed("stage1", *words)) == alone
    # So all LMs, and experiments that leave stage 1 alone, share it.
    assert set(needed("stage1", *words, "LM=org/name-7b", "EXPERIMENT=quick")) == alone


def test_a_finished_crm_keeps_the_parents_that_it_was_made_with(root):
    hard = ["CRM=sim", "stage1.crm.retrieval=hard"]
    assert plan.main(["write", "stage1", *hard]) == 0
    finish(Plan(parse(["stage1", *hard])))
    nodes = needed("stage2", "CRM=sim")
    assert set(nodes["stage1/sim"].parents) == {"log"}
    assert states("stage2", "CRM=sim")["stage1/sim"] == "done"
    assert set(needed("stage1", "CRM=sim")["stage1/sim"].parents) == {"log", "neighbors"}


def test_a_folder_says_everything_that_is_not_the_default(root):
    nodes = needed("stage3", "SYSTEM=reclora s-dpo", "CRM=din", "EXPERIMENT=quick", "SEED=2")
    assert of_stage(nodes, "stage2") == {"stage2/reclora+din+quick+s2"}
    assert of_stage(nodes, "stage3") == {"stage3/s-dpo+din+quick+s2"}
    # The experiment changes the subsample, which the LM's text reads, and so all that stands on it.
    assert "lm/tiny+quick/text" in nodes
    assert "neighbors/both+quick" in nodes
    assert of_stage(nodes, "stage1") >= {"stage1/din+s2"}
    assert {"log", "tables"} <= set(nodes)


def test_the_seed_reaches_stages_1_to_3_and_not_the_data(root):
    nodes = needed("stage3", "SEED=0 3")
    assert of_stage(nodes, "stage2") == {
        "stage2/lora",
        "stage2/reclora",
        "stage2/lora+s3",
        "stage2/reclora+s3",
    }
    assert "stage1/sim+s3" in nodes
    assert nodes["stage2/lora+s3"].parents["stage1"].folder == "stage1/sim+s3"
    assert nodes["stage2/lora+s3"].config["seed"] == 3
    assert [folder for folder in nodes if folder.startswith(("log", "lm/", "neighbors"))] == [
        "log", "lm/tiny/text", "neighbors/both", "lm/tiny/prompts",
    ]  # fmt: skip


def test_lists_of_crms_and_systems(root):
    nodes = needed("stage2", "CRM=sim din", "SYSTEM=reclora lora")
    # Stage 2 needs the gate, the CRM named last, and for RecLoRA one that never saw the subsample.
    assert of_stage(nodes, "stage1") == {"stage1/din", "stage1/din+heldout-0.1"}
    assert of_stage(nodes, "stage2") == {"stage2/reclora+din", "stage2/lora+din"}
    assert of_stage(needed("stage1", "CRM=sim din"), "stage1") == {"stage1/sim", "stage1/din"}


def test_an_out_of_fold_gate_is_trained_without_the_subsample_and_else_as_the_gate(root):
    nodes = needed("stage3", "SYSTEM=reclora-in-sample reclora", "SEED=2", "subsample=0.2", "stage1.recent=9")
    assert of_stage(nodes, "stage1") == {
        "stage1/din+s2", "stage1/sim+s2", "stage1/ranker+s2", "stage1/sim+heldout-0.2+s2",
    }  # fmt: skip
    held, gate = nodes["stage1/sim+heldout-0.2+s2"], nodes["stage1/sim+s2"]
    assert held.config["stage1"].pop("hold_out") == "0.2"
    assert gate.config["stage1"].pop("hold_out") == "none"
    assert held.config == gate.config
    assert held.parents == gate.parents
    assert nodes["stage2/reclora-in-sample+s2"].parents["stage1"] is gate
    assert nodes["stage2/reclora+s2"].parents["stage1"] is held
    evaluate = next(node for folder, node in nodes.items() if folder.startswith("evaluate/"))
    assert evaluate.parents["stage1"] is gate
    assert evaluate.parents["crm:sim-heldout"] is held


def test_stage_3_reads_the_crm_that_its_start_was_gated_by(root):
    nodes = needed("stage3", "SYSTEM=s-dpo")
    assert nodes["stage3/s-dpo"].parents["stage1"].folder == "stage1/sim+heldout-0.1"
    assert "stage1/sim" in nodes  # the table shows it beside


def test_another_start_of_stage_3_has_folders_and_a_variant_of_its_own(root):
    nodes = needed("stage3", "SYSTEM=lora s-dpo", "stage3.start=lora")
    assert nodes["stage3/s-dpo+lora"].parents["stage2"].folder == "stage2/lora"
    (evaluate,) = (node for node in nodes.values() if node.stage == "evaluate")
    assert evaluate.content["variant"] == "lora"
    assert evaluate.parents["stage2"].folder == "stage2/lora"
    (usual,) = (node for node in needed("stage3", "SYSTEM=lora s-dpo").values() if node.stage == "evaluate")
    assert "variant" not in usual.content
    assert usual.folder != evaluate.folder


def test_a_ranker_gates_as_any_crm_does(root):
    nodes = needed("stage3", "CRM=ranker", "SYSTEM=reclora s-dpo-item")
    held = nodes["stage2/reclora+ranker"].parents["stage1"]
    assert held.folder == "stage1/ranker+heldout-0.1"
    assert held.config["stage1"]["objective"] == "rank"
    assert nodes["stage3/s-dpo-item+ranker"].config["stage3"]["gate"] == "item"
    assert "stage1/sim" not in nodes


def test_a_finished_stage_2_keeps_its_out_of_fold_gate(root):
    words = ["stage2", "SYSTEM=reclora", "subsample=0.2", "stage1.fit.lr=0.5"]
    assert plan.main(["write", "stage1", *words]) == 0
    finish(Plan(parse(["stage1", *words])))
    later = states("stage3", "SYSTEM=reclora")
    assert later["stage1/sim+heldout-0.2"] == later["stage2/reclora"] == "done"


def test_crms_that_all_leave_rows_out_need_no_other_gate(root):
    nodes = needed("stage2", "SYSTEM=reclora", "stage1.hold_out=0.2")
    assert of_stage(nodes, "stage1") == {"stage1/sim"}
    assert nodes["stage1/sim"].config["stage1"]["hold_out"] == "0.2"


def test_every_system_is_tuned_on_the_same_lm_whatever_its_prompts_show(root):
    systems = sorted(file.stem for file in (REPOSITORY / "conf" / "stage2").glob("*.yaml"))
    assert len(systems) > 15
    nodes = needed("stage2", f"SYSTEM={' '.join(systems)}")
    assert of_stage(nodes, "stage2") == {f"stage2/{name}" for name in systems}
    assert of_stage(nodes, "lm") == {"lm/tiny/text", "lm/tiny/prompts"}
    assert {node.parents["lm"].folder for node in nodes.values() if node.stage == "stage2"} == {
        "lm/tiny/prompts"
    }
    shown = {name: nodes[f"stage2/{name}"].config["prompt"]["retrieved"] for name in systems}
    assert [name for name in systems if not shown[name]] == ["ctr-bert", "tallrec"]
    assert nodes["lm/tiny/prompts"].config["prompt"]["retrieved"] is True
    wide, gated = (nodes[f"stage2/{name}"].config["stage2"]["adapter"] for name in ("lora-wide", "reclora"))
    assert wide["r"] == gated["r"] * gated["num_meta"]
    assert wide["lora_alpha"] / wide["r"] == gated["lora_alpha"] / gated["r"]
    assert nodes["stage2/rella"].config["stage2"]["mixed_prompts"] is True


def test_two_towers_need_an_encoder_and_no_lm_crm_or_neighbors(root):
    nodes = needed("stage2", "SYSTEM=ctr-bert", "LM=org/name-7b", "CRM=din", "EXPERIMENT=quick", "SEED=1")
    node = nodes["stage2/ctr-bert+quick+s1"]
    assert {role: parent.folder for role, parent in node.parents.items()} == {
        "log": "log", "encoder": "encoder"
    }  # fmt: skip
    assert set(node.parents["encoder"].parents) == {"log"}
    assert node.command == "stages.towers"
    nodes = needed("stage3", "SYSTEM=ctr-bert lora")
    evaluate = next(node for folder, node in nodes.items() if folder.startswith("evaluate/"))
    assert evaluate.parents["towers:ctr-bert"].folder == "stage2/ctr-bert"
    assert "tuned:ctr-bert" not in evaluate.parents


def test_what_reaches_two_towers(root):
    assert plan.main(["write", "stage2", "SYSTEM=ctr-bert"]) == 0
    before = configs(root)
    for key, reached in (
        ("stage2.fit.lr=0.1", {"stage2/ctr-bert", "stage2/reclora"}),
        ("stage2.title_share=0.1", {"stage2/reclora"}),
        ("stage2.adapter.r=4", {"stage2/reclora"}),
        ("towers.pooling=first", {"stage2/ctr-bert"}),
        ("encoder.path=org/bert", {"encoder"}),
        ("lm.tiny.hidden=64", {"lm/tiny/text", "lm/tiny/prompts", "neighbors/both", "stage2/reclora"}),
    ):
        assert plan.main(["write", "stage2", "SYSTEM=ctr-bert", key]) == 0
        after = configs(root)
        assert {folder for folder in after if before[folder] != after[folder]} == reached
        assert plan.main(["write", "stage2", "SYSTEM=ctr-bert"]) == 0


def test_an_lm_by_path_has_folders_of_its_own_and_no_second_phase(root, tmp_path):
    one, two = tmp_path / "one" / "model", tmp_path / "two" / "model"
    one.mkdir(parents=True)
    two.mkdir(parents=True)
    folders = []
    for path in (one, two):
        nodes = needed("stage2", f"LM={path}", "SYSTEM=lora")
        lms = of_stage(nodes, "lm")
        assert len(lms) == 1
        (lm,) = lms
        assert re.fullmatch(r"lm/model-[0-9a-f]{4}/text", lm)
        name = lm.split("/")[1]
        assert f"stage2/lora+{name}" in nodes
        assert f"neighbors/both+{name}" in nodes
        assert nodes[lm].config["lm"]["model"]["path"] == str(path)
        folders.append(lm)
    assert folders[0] != folders[1]
    hub = needed("stage2", "LM=org/name-7b", "SYSTEM=lora")
    assert any(folder.startswith("lm/name-7b-") for folder in hub)


@pytest.mark.parametrize(
    ("word", "known"),
    [
        ("DATASET=ml-2m", "ml-1m"),
        ("CRM=dinn", "din"),
        ("SYSTEM=reclorra", "reclora"),
        ("LM=tinny", "tiny"),
        ("EXPERIMENT=slow", "quick"),
        ("SEED=one", "SEED='0 1 2'"),
        ("RAW=/no/such/place", "RAW"),
        ("stage2.lrr=1", "stage2.fit.lr"),
        ("stage2.fit.lr=fast", "stage2.fit.lr"),
        ("stage3.fit.epochs=0", "epochs"),  # of a stage that is not even asked for
        ("stage3.start=s-dpo", "reclora"),
        ("stage3.start=ctr-bert", "has no LM to align"),
        ("stage1.hold_out=first100", "uniform<n>"),  # no prefix of the permutation
        ("stage2.representation=fold", "out_of_fold"),
        ("stage9", "key=value"),
    ],
)
def test_what_is_unknown_is_refused_before_anything_is_written(root, capsys, word, known):
    assert plan.main(["write", "stage1", "stage2", word]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert known in lines[0]
    assert not root.parent.exists()


def test_an_override_reaches_the_stages_that_read_it_and_no_others(root):
    assert plan.main(["write", "stage2"]) == 0
    before = configs(root)
    assert plan.main(["write", "stage2", "stage2.fit.lr=0.123"]) == 0
    after = configs(root)
    assert {folder for folder in after if before[folder] != after[folder]} == {
        "stage2/lora",
        "stage2/reclora",
    }
    assert "0.123" in after["stage2/lora"]
    assert plan.main(["write", "stage2", "prompt.history=7"]) == 0
    changed = {folder for folder in before if before[folder] != configs(root)[folder]}
    assert changed == {"stage2/lora", "stage2/reclora", "lm/tiny/text", "lm/tiny/prompts"}


def test_the_lms_second_phase_is_trained_anew_without_the_first(root):
    assert plan.main(["write", "stage2"]) == 0
    before = configs(root)
    assert plan.main(["write", "stage2", "lm.training.timeline_share=0.5"]) == 0
    changed = {folder for folder, text in configs(root).items() if before[folder] != text}
    assert changed == {"lm/tiny/prompts", "stage2/lora", "stage2/reclora"}
    assert plan.main(["write", "stage2", "lm.training.text_tokens=100"]) == 0
    changed = {folder for folder, text in configs(root).items() if before[folder] != text}
    assert changed >= {"lm/tiny/text", "neighbors/both"}


def test_systems_of_stage_2_alone_are_evaluated_without_alignment(root):
    alone = needed("evaluate", "SYSTEM=rella reclora")
    assert of_stage(alone, "stage3") == set()
    assert of_stage(alone, "evaluate") == {"evaluate/din,sim,rella,reclora"}
    assert of_stage(needed("stage3", "SYSTEM=rella reclora"), "stage3") != set()
    assert of_stage(needed("evaluate"), "stage3") != set()
    assert "stage1/ranker" in alone
    assert "stage1/ranker" not in needed("evaluate", "SYSTEM=rella", "evaluate.candidates=[]")


def test_precedence_of_files(root):
    assert (
        needed("stage1")["stage1/sim"].config["stage1"]["fit"]["batch_size"] == 256
    )  # demo over base's 1024
    assert needed("stage1")["stage1/sim"].config["stage1"]["recent"] == 30  # stage1/sim over base's 60
    changed = needed("stage1", "stage1.recent=9", "stage1.fit.batch_size=8")["stage1/sim"].config["stage1"]
    assert (changed["recent"], changed["fit"]["batch_size"]) == (9, 8)
    assert needed("stage2", "EXPERIMENT=quick")["stage2/lora+quick"].config["subsample"] == "uniform20000"
    # stage1/ml-1m/autoint over stage1/autoint and base, on that data set alone
    fits = {
        name: needed("stage1", f"DATASET={name}", "CRM=autoint")["stage1/autoint"].config["stage1"]["fit"]
        for name in ("demo", "ml-1m")
    }
    assert fits["demo"]["lr"] == 0.001
    assert fits["ml-1m"]["lr"] == 0.00136
    assert fits["ml-1m"]["batch_size"] == 1024


def test_a_finished_parents_override_holds_until_its_own_stage_is_asked_for(root):
    assert plan.main(["write", "stage1", "stage1.recent=9"]) == 0
    finish(Plan(parse(["stage1", "stage1.recent=9"])))
    assert plan.main(["write", "stage2"]) == 0
    assert read_config(root / "stage1/sim")["config"]["stage1"]["recent"] == 9
    assert states("stage2")["stage1/sim"] == "done"
    # A key of its own on the command line wins, the others hold.
    held = needed("stage2", "stage1.fit.lr=0.5")["stage1/sim"].config["stage1"]
    assert (held["recent"], held["fit"]["lr"]) == (9, 0.5)
    # Asked for itself, it is what the command says.
    assert plan.main(["write", "stage1"]) == 0
    assert read_config(root / "stage1/sim")["config"]["stage1"]["recent"] == 30


def test_an_unfinished_parents_override_does_not_hold(root):
    assert plan.main(["write", "stage1", "stage1.recent=9"]) == 0
    assert needed("stage2")["stage1/sim"].config["stage1"]["recent"] == 30


def test_an_evaluation_says_what_its_results_are_told_apart_by(root):
    def variant(*words):
        content = [node.content for node in needed("evaluate", *words).values() if node.stage == "evaluate"]
        return {told.get("variant") for told in content}

    assert variant() == {None}
    assert variant("SEED=0 1") == {None}  # seeds are averaged
    assert variant("EXPERIMENT=quick", "SEED=1") == {"quick"}
    assert variant("CRM=din", "EXPERIMENT=quick") == {"din+quick"}
    assert all("variant" not in node.content for node in needed("stage2", "CRM=din").values())


@pytest.mark.parametrize("key", ["stage1.fit.lrr", "stage2.fit.lr", "stage1.fit"])
def test_what_cannot_be_searched_is_refused_before_anything_runs(root, key):
    space = f"tune.space=[{{key: {key}, low: 0.0, high: 1.0}}]"
    with pytest.raises(ValueError, match=rf"{key} \(tune\.space\)"):
        Plan(parse(["tune", space]))


def test_what_is_evaluated_holds_only_for_what_was_asked(root):
    words = ["report", "SYSTEM=lora", "evaluate.candidates=[]"]
    assert plan.main(["write", *words]) == 0
    finish(Plan(parse(words)))
    node = next(node for node in needed("report", "SYSTEM=lora").values() if node.stage == "evaluate")
    assert node.config["evaluate"]["candidates"] == ["uniform20", "popular20"]
    assert "crm:ranker" in node.parents


def test_hard_candidates_lie_with_the_neighbors(root):
    words = ["evaluate", "SYSTEM=none", "CRM=din"]
    kinds = {
        text: next(node for node in needed(*words, text).values() if node.stage == "evaluate").parents
        for text in ("evaluate.candidates=[hard20]", "evaluate.candidates=[uniform20]")
    }
    assert ["neighbors" in parents for parents in kinds.values()] == [True, False]
