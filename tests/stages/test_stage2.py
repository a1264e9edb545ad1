"""Which gates stage 2 takes, what a step is made of, and when AdaLoRA prunes."""

from types import SimpleNamespace

import lightning
import pytest
import torch

from recllm.config.schema import TrainerConfig
from recllm.config.stages import FitConfig, Stage2Config
from recllm.errors import StageError
from recllm.lm import adalora
from recllm.systems.crm import Crm
from recllm.training.callbacks import ends_step
from stages.stage2 import TuneModule, check_out_of_fold, rows_of_step


def crm(hold_out):
    stage1 = SimpleNamespace(hold_out=hold_out)
    return Crm(None, None, SimpleNamespace(config=SimpleNamespace(stage1=stage1)))


def run(representation):
    stage2 = SimpleNamespace(representation=representation)
    return SimpleNamespace(config=SimpleNamespace(stage2=stage2, subsample="uniform300"))


def test_an_out_of_fold_gate_has_seen_no_tuning_row(demo_log):
    check_out_of_fold(run("out_of_fold"), demo_log, crm("uniform300"))
    check_out_of_fold(run("out_of_fold"), demo_log, crm("uniform301"))
    wanted = r"trained on 1 of 300 tuning rows \(stage1.hold_out=uniform299\)"
    with pytest.raises(StageError, match=wanted):
        check_out_of_fold(run("out_of_fold"), demo_log, crm("uniform299"))
    with pytest.raises(StageError, match="trained on 300 of 300"):
        check_out_of_fold(run("out_of_fold"), demo_log, crm("none"))
    check_out_of_fold(run("crm"), demo_log, crm("none"))


@pytest.mark.parametrize(
    ("size", "share", "devices", "wanted"),
    [
        (10, 0.2, 2, (8, 2)),
        (10, 0.0, 2, (10, 0)),
        (8, 0.2, 4, "make 6 answers and 2 titles a step for 4 devices"),  # two devices would have no title
        (8, 0.8, 4, "make 2 answers and 6 titles a step for 4 devices"),
    ],
)
def test_every_device_gets_some_of_each_kind(size, share, devices, wanted):
    stage2 = Stage2Config(title_share=share, fit=FitConfig(batch_size=size))
    of = SimpleNamespace(config=SimpleNamespace(stage2=stage2, trainer=TrainerConfig(devices=devices)))
    if isinstance(wanted, tuple):
        assert rows_of_step(of) == wanted
    else:
        with pytest.raises(StageError, match=wanted):
            rows_of_step(of)


@pytest.mark.parametrize("parts", [1, 3])
def test_adalora_prunes_once_a_step_and_before_anything_saves_the_weights(monkeypatch, tmp_path, parts):
    happened = []

    class Module(TuneModule):
        def __init__(self):
            lightning.LightningModule.__init__(self)
            self.adalora, self.model = True, torch.nn.Linear(2, 1)

        def training_step(self, batch, index):
            return self.model(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        configure_model = on_fit_start = lambda self: None
        on_train_batch_start = on_before_optimizer_step = on_save_checkpoint = lambda self, *_: None

    class Saves(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if ends_step(trainer, index):
                happened.append(("saved", trainer.global_step))

    def allocate(model, step):
        # Importances are made of this step's gradients, all its parts together.
        torch.testing.assert_close(model.weight.grad, torch.ones(1, 2))
        happened.append(("pruned", step))

    monkeypatch.setattr(adalora, "allocate", allocate)
    trainer = lightning.Trainer(
        max_steps=2, accumulate_grad_batches=parts, accelerator="cpu", logger=False,
        enable_checkpointing=False, callbacks=[Saves()],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(4 * parts, 2)))
    assert happened == [("pruned", 1), ("saved", 1), ("pruned", 2), ("saved", 2)]


def test_every_part_of_a_step_gets_some_of_each_kind():
    stage2 = Stage2Config(title_share=0.2, fit=FitConfig(batch_size=20))

    def of(parts, devices):
        trainer = TrainerConfig(devices=devices, accumulate=parts)
        return SimpleNamespace(config=SimpleNamespace(stage2=stage2, trainer=trainer))

    assert rows_of_step(of(4, 1)) == rows_of_step(of(2, 2)) == (16, 4)
    with pytest.raises(StageError, match=r"4 titles a step for 2 devices in 3 parts \(trainer\.accumulate\)"):
        rows_of_step(of(3, 2))
