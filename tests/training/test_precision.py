"""Precisions, with the real `fit`: what is converted, and what stays as it is."""

import pytest
import torch
from torch.nn import functional as F

from recllm.config.stages import FitConfig
from recllm.training.adapter_module import AdapterModule
from recllm.training.fit import fit
from recllm.training.loaders import Loaders, Stream
from recllm.training.optimizer import optimizer
from recllm.training.precision import training_precision
from tests.reclora.gated import D, inputs, trained
from tests.training.test_fit import start

STEPS, ROWS = 4, 16


def gated_lm():
    """A gated LM in float32, whitened by narrow statistics, as a CRM's are."""
    model = trained(target_modules=["q_proj", "lm_head"]).float()
    sample = representations()
    model.base_model.set_statistics(sample.mean(0), torch.cov(sample.T))
    return model


def representations():
    generator = torch.Generator().manual_seed(3)
    return 100 + torch.randn(ROWS, D, generator=generator) * torch.tensor([30.0, 1.0, 0.1, 1e-2, 2e-3])


class Tuned(AdapterModule):
    """Tells of which types the parts are that meet in a step."""

    def __init__(self, settings):
        super().__init__(gated_lm())
        self.settings = settings
        self.seen = []
        self.alphas = []

    def logits(self, batch):
        if not self.alphas:
            with torch.no_grad():
                self.alphas.append(self.model.base_model.alpha(batch["representation"]))
        layer = self.model.base_model.layers("default")[0][1]
        gate = self.model.base_model.reclora_gate["default"]
        parts = {
            "representation": batch["representation"], "reference": batch["reference"], "gate": gate.weight_1,
            "whitening": gate.whiten, "lm": layer.base_layer.weight, "A": layer.reclora_A["default"],
        }  # fmt: skip
        self.seen.append({name: str(value.dtype).removeprefix("torch.") for name, value in parts.items()})
        return self.model(batch["input_ids"], representation=batch["representation"]).logits[:, -1].float()

    def training_step(self, batch, index):
        return {"loss": F.cross_entropy(self.logits(batch), batch["input_ids"][:, 0])}

    def validation_step(self, batch, index):
        loss = F.cross_entropy(self.logits(batch), batch["input_ids"][:, 0])
        self.log("valid/auc", -loss, batch_size=len(batch["input_ids"]))

    def configure_optimizers(self):
        return optimizer(self, self.settings, STEPS)


def loaders():
    ids, _ = inputs(batch=ROWS)
    stream = Stream(ROWS, 4, 0)

    def rows(indices):
        return {
            "input_ids": ids[indices],
            "representation": representations()[indices],
            "reference": torch.full((len(indices), 3), -123.4567),
        }

    train = lambda step, rank, world: rows(stream.indices(step, rank, world))  # noqa: E731
    return Loaders(train=train, steps=STEPS, valid=[(rows, ROWS)], valid_batch=ROWS)


@pytest.mark.parametrize(
    ("precision", "lm", "adapter"),
    [
        ("32-true", "float32", "float32"),
        ("bf16-mixed", "float32", "float32"),
        ("bf16-true", "bfloat16", "bfloat16"),
    ],
)
def test_what_a_gate_reads_and_is_stays_float32(make_stage, precision, lm, adapter):
    settings = FitConfig(batch_size=4, lr=0.05, patience=100, validations=2, precision=precision)
    module = Tuned(settings)
    before = module.model.base_model.reclora_gate["default"].weight_2.detach().clone()
    expected = module.model.base_model.alpha(representations())
    run = start(make_stage("stage2/lora"))
    try:
        fit(run, module, loaders(), settings, 2, ["valid/auc"], first=True)
    finally:
        run._lock.close()
    wanted = dict.fromkeys(("representation", "reference", "gate", "whitening"), "float32")
    assert all(seen == wanted | {"lm": lm, "A": adapter} for seen in module.seen)
    assert module.alphas[0].shape == expected.shape
    torch.testing.assert_close(module.alphas[0], expected, rtol=1e-5, atol=1e-6)
    gate = module.model.base_model.reclora_gate["default"]
    assert gate.weight_2.dtype == torch.float32
    assert (gate.weight_2 - before).abs().max() > 1e-4  # and it learns


def test_outside_of_training_it_computes_in_the_same():
    model = gated_lm()
    expected = model.base_model.alpha(representations())
    with training_precision(model, "bf16-true"):
        assert torch.equal(model.base_model.alpha(representations()), expected)
        logits = model(inputs(batch=ROWS)[0], representation=representations()).logits
    assert logits.dtype == torch.bfloat16
