"""What a notebook gets: finished stages opened and loaded, nothing heavy imported before it is asked for."""

import json
import subprocess
import sys

import pytest
import torch

import recllm
from recllm.crm import CrmConfig, Fields, build, export, load
from recllm.errors import StageError
from recllm.pipeline.run import Run

HEAVY = ("torch", "lightning", "transformers", "peft", "polars", "numpy", "omegaconf")


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, json, recllm; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == []


def test_opening_a_stage_needs_no_torch():
    code = "import sys, recllm; recllm.Finished; print('torch' in sys.modules, 'lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]


def test_every_public_name_is_there_and_no_other():
    for name in recllm.__all__:
        assert getattr(recllm, name) is not None
        assert name in dir(recllm)
    assert recllm.losses.softmax_dpo
    assert recllm.reclora.RecLoraConfig
    with pytest.raises(AttributeError, match="no attribute 'registry'"):
        recllm.registry  # noqa: B018 - asked for on purpose


def finish(folder, make):
    """Finish a stage whose output `make(folder)` writes."""
    run = Run.start([str(folder)])
    make(folder / "export")
    run.finish([folder / "export"], {"auc": 0.5})
    run.close()


def test_a_crm_is_loaded_from_its_stage_and_from_a_copied_export(make_stage):
    torch.manual_seed(0)
    model = build(Fields((5,), (7, 3), 5, 1), CrmConfig(name="deepfm", mlp=[8, 4]))
    folder = make_stage("stage1/deepfm", {"seed": 3, "stage1": {"crm": {"name": "deepfm"}}})
    with pytest.raises(StageError, match="not finished"):
        recllm.load_crm(folder)
    finish(folder, lambda export_folder: export(model, export_folder, {}))
    stage = recllm.Finished.open(folder)
    assert (stage.name, stage.config.seed, stage.manifest.metrics) == ("stage1/deepfm", 3, {"auc": 0.5})
    for loaded in (recllm.load_crm(folder), recllm.load_crm(folder / "export"), load(stage.export)):
        assert not loaded.training
        for one, other in zip(loaded.parameters(), model.parameters(), strict=True):
            assert torch.equal(one, other)


def test_an_lm_is_loaded_from_its_stage_and_from_a_folder(make_stage, tiny_lm):
    def save(folder):
        tiny_lm.model.save_pretrained(folder)
        tiny_lm.tokenizer.save_pretrained(folder)

    folder = make_stage(
        "lm/tiny/prompts", {"lm": {"model": {"name": "tiny", "dtype": "float32"}}}, stage="lm-prompts"
    )
    finish(folder, save)
    ids = torch.tensor([[3, 5, 8, 13]])
    wanted = tiny_lm.model(ids).logits
    for source in (folder, folder / "export"):
        model, tokenizer = recllm.load_lm(source)
        assert not model.training
        assert not any(value.requires_grad for value in model.parameters())
        torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=0)
        assert len(tokenizer) == len(tiny_lm.tokenizer)
