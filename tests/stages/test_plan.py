import re
from pathlib import Path

import pytest

from recllm.config.request import parse
from recllm.errors import ConfigError
from recllm.pipeline.graph import Plan
from recllm.pipeline.manifest import Manifest
from stages import plan
from tests.stages.plans import finish, needed, of_stage, states

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
    assert parents == {"log": "log", "stage1": "stage1/din"}
    assert nodes["evaluate/deepfm,din"].file.systems == {
        "crms": {"deepfm": "stage1/deepfm", "din": "stage1/din"}
    }
    with_sim = needed("evaluate", "SYSTEM=none", "CRM=din sim")
    assert with_sim["evaluate/din,sim"].parents["neighbors"].folder == "neighbors/both"
    with pytest.raises(ConfigError, match="SYSTEM=none leaves stage2 nothing to do"):
        parse(["stage2", "SYSTEM=none"])


def test_before_work_begins_no_more_is_read_than_the_log_and_its_tables(root, monkeypatch, capsys):
    words = ["stage3", "SYSTEM=lora s-dpo"]
    assert plan.main(["write", *words]) == 0
    finish(Plan(parse(words)))
    read = []
    of_folder = Manifest.read.__func__

    def reads(cls, folder):
        read.append(str(folder.relative_to(root)))
        return of_folder(cls, folder)

    monkeypatch.setattr(Manifest, "read", classmethod(reads))
    plan.check_texts(Plan(parse(words)))
    assert read == ["tables", "log"]


def test_a_goal_needs_its_ancestors_only(root):
    assert set(needed("prepare")) == {"tables", "log"}
    assert set(needed("stage1", "CRM=sim")) == {
        "tables", "log", "lm/tiny/text", "neighbors/both", "stage1/sim",
    }  # fmt: skip


@pytest.mark.parametrize("words", [["CRM=din"], ["CRM=sim", "stage1.crm.retrieval=hard"]])
def test_a_crm_that_reads_no_neighbors_needs_no_lm(root, words):
    alone = {"tables", "log", f"stage1/{words[0].removeprefix('CRM=')}"}
    nodes = needed("stage1", *words)
    assert {folder.partition("+")[0] for folder in nodes} == alone
    # So all LMs, and experiments that leave stage 1 alone, share it.
    assert needed("stage1", *words, "LM=org/name-7b", "EXPERIMENT=quick").keys() == nodes.keys()


def test_what_a_crm_reads_is_in_its_folders_name(root):
    hard = ["CRM=sim", "stage1.crm.retrieval=hard"]
    assert set(needed("stage2", *hard)["stage1/sim+retrieval-hard"].parents) == {"log"}
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


def test_who_asks_for_one_system_gets_one(root):
    nodes = needed("evaluate", "SYSTEM=lora", "CRM=din")
    assert of_stage(nodes, "stage2") == {"stage2/lora+din"}
    (evaluation,) = of_stage(nodes, "evaluate")
    assert "stage2" not in nodes[evaluation].parents
    both = needed("evaluate", "SYSTEM=lora reclora", "CRM=din")
    assert of_stage(both, "stage2") == {"stage2/lora+din", "stage2/reclora+din"}
    (evaluation,) = of_stage(both, "evaluate")
    assert both[evaluation].parents["stage2"].folder == "stage2/reclora+din"
    # What stage 3 aligns is made for it, and two towers alone stand beside the usual LM.
    aligned = needed("evaluate", "SYSTEM=lora s-dpo", "CRM=din")
    assert "stage2/reclora+din" in aligned
    towers = needed("evaluate", "SYSTEM=ctr-bert", "CRM=din")
    assert of_stage(towers, "stage2") == {"stage2/ctr-bert", "stage2/reclora+din"}


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
    heldout, saw_all = (
        "stage1/sim+heldout-0.2+recent-9+subsample-0.2+s2",
        "stage1/sim+recent-9+subsample-0.2+s2",
    )
    others = {"stage1/din+recent-9+s2", "stage1/ranker+recent-9+s2"}
    assert of_stage(nodes, "stage1") == {heldout, saw_all, *others}
    held, gate = nodes[heldout], nodes[saw_all]
    assert held.config["stage1"].pop("hold_out") == "0.2"
    assert gate.config["stage1"].pop("hold_out") == "none"
    assert held.config == gate.config
    assert held.parents == gate.parents
    assert nodes["stage2/reclora-in-sample+recent-9+subsample-0.2+s2"].parents["stage1"] is gate
    assert nodes["stage2/reclora+recent-9+subsample-0.2+s2"].parents["stage1"] is held
    evaluate = next(node for folder, node in nodes.items() if folder.startswith("evaluate/"))
    assert evaluate.parents["stage1"] is gate
    assert evaluate.systems["crms"]["sim-heldout"] is held


def test_stage_3_reads_the_crm_that_its_start_was_gated_by(root):
    nodes = needed("stage3", "SYSTEM=s-dpo")
    assert nodes["stage3/s-dpo"].parents["stage1"].folder == "stage1/sim+heldout-0.1"
    assert "stage1/sim" in nodes  # the table shows it beside


def test_another_start_of_stage_3_has_folders_and_a_variant_of_its_own(root):
    nodes = needed("stage3", "SYSTEM=lora s-dpo", "stage3.start=lora")
    assert nodes["stage3/s-dpo+lora"].parents["stage2"].folder == "stage2/lora"
    (evaluate,) = (node for node in nodes.values() if node.stage.name == "evaluate")
    assert evaluate.file.variant == "lora"
    assert evaluate.parents["stage2"].folder == "stage2/lora"
    (usual,) = (
        node for node in needed("stage3", "SYSTEM=lora s-dpo").values() if node.stage.name == "evaluate"
    )
    assert usual.file.variant is None
    assert usual.folder != evaluate.folder


def test_a_ranker_gates_as_any_crm_does(root):
    nodes = needed("stage3", "CRM=ranker", "SYSTEM=reclora s-dpo-item")
    held = nodes["stage2/reclora+ranker"].parents["stage1"]
    assert held.folder == "stage1/ranker+heldout-0.1"
    assert held.config["stage1"]["objective"] == "rank"
    assert nodes["stage3/s-dpo-item+ranker"].config["stage3"]["gate"] == "item"
    assert "stage1/sim" not in nodes


def test_two_subsamples_share_no_folder_but_those_that_neither_reaches(root):
    few, many = (needed("stage2", "SYSTEM=reclora", f"subsample={rows}") for rows in ("0.1", "0.2"))
    assert "stage2/reclora" in few  # 0.1 is the default
    assert few.keys() & many.keys() == {"tables", "log"}
    assert "stage1/sim+heldout-0.2+subsample-0.2" in many


def test_crms_that_all_leave_rows_out_need_no_other_gate(root):
    nodes = needed("stage2", "SYSTEM=reclora", "stage1.hold_out=0.2")
    assert of_stage(nodes, "stage1") == {"stage1/sim+hold_out-0.2"}
    assert nodes["stage1/sim+hold_out-0.2"].config["stage1"]["hold_out"] == "0.2"


@pytest.mark.parametrize("left_out", ["0.05", "uniform70000", "last70000"])
def test_an_out_of_fold_gate_is_trained_where_what_all_leave_out_need_not_hold_the_subsample(root, left_out):
    nodes = needed("stage2", "SYSTEM=reclora", f"stage1.hold_out={left_out}")  # the subsample is 0.1
    gate = nodes[next(folder for folder in nodes if folder.startswith("stage2/"))].parents["stage1"]
    assert gate.config["stage1"]["hold_out"] == "0.1"
    assert gate.folder.startswith("stage1/sim+heldout-0.1")


def test_every_system_is_tuned_on_the_same_lm_whatever_its_prompts_show(root):
    systems = sorted(file.stem for file in (REPOSITORY / "conf" / "stage2").glob("*.yaml"))
    assert len(systems) > 15
    nodes = needed("stage2", f"SYSTEM={' '.join(systems)}")
    assert of_stage(nodes, "stage2") == {f"stage2/{name}" for name in systems}
    assert of_stage(nodes, "lm") == {"lm/tiny/text", "lm/tiny/prompts"}
    assert {node.parents["lm"].folder for node in nodes.values() if node.stage.name == "stage2"} == {
        "lm/tiny/prompts"
    }
    shown = {name: nodes[f"stage2/{name}"].config["prompt"]["retrieved"] for name in systems}
    assert [name for name in systems if not shown[name]] == ["ctr-bert", "ctr-bert-minilm", "tallrec"]
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
    assert node.module == "stages.towers"
    both = needed("stage2", "SYSTEM=ctr-bert ctr-bert-minilm")
    assert both["stage2/ctr-bert"].parents["encoder"].folder == "encoder"
    assert both["stage2/ctr-bert-minilm"].parents["encoder"].folder == "encoder+ctr-bert-minilm"
    nodes = needed("stage3", "SYSTEM=ctr-bert lora")
    evaluate = next(node for folder, node in nodes.items() if folder.startswith("evaluate/"))
    assert evaluate.systems["towers"]["ctr-bert"].folder == "stage2/ctr-bert"
    assert "ctr-bert" not in evaluate.systems["tuned"]


@pytest.mark.parametrize(
    ("key", "reached"),
    [
        ("stage2.fit.lr=0.1", {"stage2/ctr-bert", "stage2/reclora"}),
        ("stage2.title_share=0.1", {"stage2/reclora"}),
        ("stage2.adapter.r=4", {"stage2/reclora"}),
        ("towers.pooling=first", {"stage2/ctr-bert"}),
        ("encoder.path=org/bert", {"encoder", "stage2/ctr-bert"}),
        (
            "lm.tiny.hidden=64",
            {
                "lm/tiny/text",
                "lm/tiny/prompts",
                "neighbors/both",
                "stage2/reclora",
                "stage1/sim+heldout-0.1",
            },
        ),
        ("stage2.fit.lr=0.002", {"stage2/ctr-bert"}),  # the default of all others
        ("trainer.devices=2", set()),  # how, not what
    ],
)
def test_what_a_key_reaches_and_what_stands_on_it_lies_in_folders_of_its_own(root, key, reached):
    words = ["stage2", "SYSTEM=ctr-bert"]
    plain, other = needed(*words), needed(*words, key)
    assert plain.keys() - other.keys() == reached
    assert len(other) == len(plain)
    for folder in plain.keys() & other.keys():
        assert plain[folder].file == other[folder].file


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


def test_a_value_is_in_the_name_of_what_it_reaches_and_of_what_stands_on_that(root):
    nodes = needed("stage2", "stage2.fit.lr=0.123")
    assert of_stage(nodes, "stage2") == {
        "stage2/lora+stage2.fit.lr-0.123",
        "stage2/reclora+stage2.fit.lr-0.123",
    }
    assert {"lm/tiny/prompts", "stage1/sim+heldout-0.1"} <= nodes.keys()
    nodes = needed("stage2", "prompt.history=7")
    assert {"lm/tiny+history-7/text", "neighbors/both+history-7", "stage2/lora+history-7"} <= nodes.keys()
    nodes = needed("stage2", "prepare.min_history=3", "SYSTEM=lora", "SEED=1")
    assert {"log+min_history-3", "stage2/lora+min_history-3+s1"} <= nodes.keys()


def test_the_same_words_give_the_same_folders_however_they_are_written(root):
    words = ["stage2", "stage2.fit.lr=1e-3", "prompt.history=7"]
    assert needed(*words).keys() == needed("stage2", "prompt.history=7", "stage2.fit.lr=0.001").keys()
    # Nothing is remembered of an earlier command.
    assert plan.main(["write", *words]) == 0
    finish(Plan(parse(words)))
    assert "stage2/lora" in needed("stage2")
    assert states(*words)["stage2/lora+history-7+stage2.fit.lr-0.001"] == "done"
    assert states("stage2")["stage2/lora"] == "missing"


def test_many_keys_and_long_values_are_a_digest_in_a_name(root):
    keys = ["stage2.fit.lr=0.5", "stage2.adapter.r=4", "stage2.fit.clip=2.0", "stage2.fit.warmup=0.1"]
    (lora,) = (
        folder for folder in needed("stage2", "SYSTEM=lora", *keys) if folder.startswith("stage2/lora")
    )
    assert re.fullmatch(r"stage2/lora\+args-[0-9a-f]{8}", lora)
    (other,) = (
        folder
        for folder in needed("stage2", "SYSTEM=lora", *keys[:3], "stage2.fit.warmup=0.2")
        if folder.startswith("stage2/lora")
    )
    assert re.fullmatch(r"stage2/lora\+args-[0-9a-f]{8}", other)
    assert other != lora
    text = needed("stage2", "SYSTEM=lora", "wording.question=Is this a film that the user will like?")
    assert any(re.fullmatch(r"stage2/lora\+question-[0-9a-f]{8}", folder) for folder in text)


def test_two_values_share_no_folder_and_no_line_of_the_table(root):
    nodes = needed("evaluate", "SYSTEM=lora", "stage2.adapter.r=4")
    (evaluate,) = (node for node in nodes.values() if node.stage.name == "evaluate")
    assert evaluate.file.variant == "r-4"
    # How much is measured is a row's own: its row set, candidates and number of rows say it.
    nodes = needed("evaluate", "SYSTEM=lora", "evaluate.ctr_rows=first100")
    (evaluate,) = (node for node in nodes.values() if node.stage.name == "evaluate")
    assert evaluate.folder.endswith("+ctr_rows-first100")
    assert evaluate.file.variant is None


def test_the_lms_second_phase_is_trained_anew_without_the_first(root):
    plain = needed("stage2")
    other = needed("stage2", "lm.training.timeline_share=0.5")
    assert plain.keys() - other.keys() == {"lm/tiny/prompts", "stage2/lora", "stage2/reclora"}
    first = needed("stage2", "lm.training.text_tokens=100")
    assert plain.keys() - first.keys() >= {"lm/tiny/text", "neighbors/both"}


def test_another_subsample_leaves_an_lm_that_is_not_trained_here_as_it_is(root, tmp_path):
    (tmp_path / "model").mkdir()
    words = ["report", f"LM={tmp_path / 'model'}", "SYSTEM=reclora"]
    plain, other = needed(*words), needed(*words, "subsample=uniform500")
    changed = {folder.partition("+")[0] for folder in plain.keys() - other.keys()}
    assert changed == {"stage1/sim", "stage2/reclora", "evaluate/din,sim,reclora"}
    (made_anew,) = (folder for folder in plain.keys() - other.keys() if folder.startswith("stage1/"))
    assert "+heldout-0.1" in made_anew  # the CRM that saw all rows stays, and so do neighbors and LM


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
    name = "stage1/sim+recent-9+stage1.fit.batch_size-8"
    changed = needed("stage1", "stage1.recent=9", "stage1.fit.batch_size=8")[name].config["stage1"]
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


def test_artifacts_of_an_older_layout_are_refused_and_left_alone(root, capsys):
    folder = root / "log"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("stage: log\ndataset: demo\n")
    assert plan.main(["write", "stage1"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "make clean" in line
    assert [path.name for path in root.rglob("*")] == ["log", "config.yaml"]


def test_an_evaluation_says_what_its_results_are_told_apart_by(root):
    def variant(*words):
        nodes = needed("evaluate", *words).values()
        return {node.file.variant for node in nodes if node.stage.name == "evaluate"}

    assert variant() == {None}
    assert variant("SEED=0 1") == {None}  # seeds are averaged
    assert variant("EXPERIMENT=quick", "SEED=1") == {"quick"}
    assert variant("CRM=din", "EXPERIMENT=quick") == {"din+quick"}
    assert all(node.file.variant is None for node in needed("stage2", "CRM=din").values())


@pytest.mark.parametrize("key", ["stage1.fit.lrr", "stage2.fit.lr", "stage1.fit"])
def test_what_cannot_be_searched_is_refused_before_anything_runs(root, key):
    space = f"tune.space=[{{key: {key}, low: 0.0, high: 1.0}}]"
    with pytest.raises(ValueError, match=rf"{key} \(tune\.space\)"):
        Plan(parse(["tune", space]))


def test_hard_candidates_lie_with_the_neighbors(root):
    words = ["evaluate", "SYSTEM=none", "CRM=din"]
    kinds = {
        text: next(node for node in needed(*words, text).values() if node.stage.name == "evaluate").parents
        for text in ("evaluate.candidates=[hard20]", "evaluate.candidates=[uniform20]")
    }
    assert ["neighbors" in parents for parents in kinds.values()] == [True, False]


def test_baselines_over_the_whole_catalog_need_the_log_only(root):
    nodes = needed("evaluate", "TASK=next", "CRM=none")
    assert set(nodes) == {"tables", "log", "next/baselines"}
    assert nodes["next/baselines"].module == "stages.next"
    (other,) = (
        node
        for node in needed("evaluate", "TASK=next", "CRM=none", "EXPERIMENT=leave-one-out").values()
        if node.stage.name == "next"
    )
    assert (other.folder, other.file.variant) == ("next/baselines+leave-one-out", "leave-one-out")


def test_a_retriever_recommends_without_an_lm(root):
    nodes = needed("evaluate", "TASK=next")
    assert set(nodes) == {"tables", "log", "stage1/retriever", "next/retriever"}
    nodes = needed("evaluate", "TASK=next", "CRM=retriever din", "SEED=2")
    assert nodes["next/retriever,din+s2"].file.systems == {
        "crms": {"retriever": "stage1/retriever+s2", "din": "stage1/din+s2"}
    }


def test_lms_order_anew_what_was_retrieved(root):
    nodes = needed("evaluate", "TASK=next", "CRM=retriever sim", "SYSTEM=reclora s-dpo")
    node = nodes["next/retriever,sim,reclora,s-dpo"]
    assert node.parents["stage2"].folder == "stage2/reclora"
    assert node.parents["stage1"].folder == "stage1/sim"
    assert set(node.systems["crms"]) == {"retriever", "sim", "sim-heldout"}
    assert "stage1/ranker" not in nodes
    assert "evaluate/all" not in nodes


@pytest.mark.parametrize(
    ("key", "crm", "named"),
    [
        ("stage1.next.targets=liked", "retriever", "retriever+targets-liked"),
        ("stage1.negatives=15", "ranker", "ranker+negatives-15"),
    ],
)
def test_a_key_of_one_objective_reaches_no_crm_of_another(root, key, crm, named):
    task = "next" if crm == "retriever" else ""
    words = ["evaluate", "SYSTEM=lora", f"CRM={crm} sim", f"TASK={task}"]
    plain, given = needed(*words), needed(*words, key)
    assert of_stage(given, "stage1") == {f"stage1/{named}", "stage1/sim"}
    assert of_stage(given, "stage2") == {"stage2/lora"}
    for folder in ("stage1/sim", "stage2/lora"):
        assert given[folder].file.sha256 == plain[folder].file.sha256


def test_the_newest_rows_reach_crms_of_the_label_alone(root):
    words = ["evaluate", "SYSTEM=none", "CRM=retriever ranker sim", "TASK=next"]
    plain, given = needed(*words), needed(*words, "stage1.newest.share=0.3", "stage1.cold_share=0.3")
    changed = of_stage(given, "stage1") - of_stage(plain, "stage1")
    assert changed == {"stage1/sim+cold_share-0.3+share-0.3"}


def test_an_evaluation_is_reached_by_its_own_keys_only(root):
    """What is measured over the whole catalog leaves the other evaluation as it is, and vice versa."""
    words = "evaluate.next.seen=kept", "evaluate.ctr_rows=first100"
    assert needed("evaluate", words[0]).keys() == needed("evaluate").keys()
    catalog = "TASK=next", "CRM=none"
    assert needed("evaluate", *catalog, words[1]).keys() == needed("evaluate", *catalog).keys()
    assert "next/baselines+evaluate.next.seen-kept" in needed("evaluate", *catalog, words[0])
    assert "next" not in needed("evaluate")["evaluate/all"].config["evaluate"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["TASK=ranking"], "TASK=ranking is not known; wanted next"),
        (["TASK=next", "KEY=subsample", "VALUES=0.1 0.2"], "KEY=subsample is not swept"),
        (["TASK=next", "CRM=none", "SYSTEM=lora"], "CRM=none leaves SYSTEM=lora"),
        (["CRM=none"], "CRM=none is not known"),
        (["TASK=next", "evaluate.next.targets=new"], "evaluate.next.targets"),
        (["TASK=next", "evaluate.next.baselines=[knn]"], r"evaluate.next.baselines=\['knn'\] is not usable"),
        (["TASK=next", "evaluate.next.reranked=501"], "evaluate.next.reranked=501 is not usable"),
    ],
)
def test_what_cannot_be_asked_over_the_whole_catalog_is_refused(root, words, message):
    with pytest.raises(ConfigError, match=message):
        Plan(parse(["evaluate", *words]))
