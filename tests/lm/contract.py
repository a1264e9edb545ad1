"""What holds of every adapter: test classes that each kind inherits.

A new kind gets a class in `test_adapters.py` that says how it is configured and inherits the rest:

    class TestMine(AdapterContract):
        config = small(kind="mine")
"""

import copy

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import functional as F

from recllm.lm import adalora
from recllm.lm.adapters import AdapterInputs, adapter_inputs, add_adapter, load_adapter, save_adapter
from recllm.lm.config import AdapterConfig
from recllm.reclora import AdapterCard

BATCH, LENGTH, WIDTH, STEPS = 4, 6, 5, 10
CARD = AdapterCard(base="tiny", data="the demo", metrics={"valid/auc": 0.75})
ADAPTER_WEIGHTS = ("lora_", "vera_", "reclora_")
"""What the name of a weight that may train holds, with PEFT's prefix of its method."""


def small(**fields):
    """An adapter's configuration, of rank 2 and scale 2."""
    return AdapterConfig(r=2, lora_alpha=4, **fields)


def batch():
    """Token ids `[4, 6]` and representations `[4, 5]`."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 40, (BATCH, LENGTH), generator=generator)
    return ids, torch.randn(BATCH, WIDTH, generator=generator)


def logits(model, reads, ids=None, representation=None, **inputs):
    """Logits of a batch, by default of `batch()`; with its representation where the adapter reads one."""
    ids = batch()[0] if ids is None else ids
    if reads:
        inputs["representation"] = batch()[1] if representation is None else representation
    return model(ids, **inputs).logits


def train(model, reads, steps, first=0, lr=0.5):
    """SGD as Lightning orders it: gradients live until the next step's."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(model, reads)[:, -1], batch()[0][:, 0])
        if adalora.is_adalora(model):
            loss = loss + adalora.penalty(model)
        loss.backward()
        optimizer.step()
        if adalora.is_adalora(model):
            adalora.allocate(model, step + 1)


class AdapterContract:
    """What holds of any adapter that `add_adapter` makes, in the tiny LM.

    Attributes:
        config: What is tested.
        inputs: What it reads besides the prompt.
        start_tolerance: By how much its logits may differ from the LM's at the start.
        lr: Of the SGD that trains it, large enough that ten steps matter.
    """

    config: AdapterConfig
    inputs = AdapterInputs(None, 0)
    start_tolerance = 0.0
    lr = 0.5

    @property
    def reads(self):
        return self.inputs.representation_kind is not None

    def fresh(self, lm, seed=0):
        representation = batch()[1] if self.reads else None
        return add_adapter(copy.deepcopy(lm.model), self.config, representation, seed, steps=STEPS)

    @pytest.fixture(scope="class")
    def trained(self, tiny_lm):
        """The adapter after some large steps; tests that change it take a copy."""
        model = self.fresh(tiny_lm)
        train(model, self.reads, STEPS, lr=self.lr)
        return model.eval()

    def test_configuration_says_what_it_reads(self):
        assert self.config.representation_kind == self.inputs.representation_kind

    def test_it_starts_at_the_lm(self, tiny_lm):
        expected = tiny_lm.model(batch()[0]).logits
        start = logits(self.fresh(tiny_lm), self.reads)
        tolerance = self.start_tolerance
        torch.testing.assert_close(start, expected, rtol=tolerance, atol=tolerance)

    def test_the_seed_alone_makes_the_start(self, tiny_lm):
        torch.manual_seed(123)
        one = self.fresh(tiny_lm, seed=7).state_dict()
        torch.manual_seed(456)
        other = self.fresh(tiny_lm, seed=7).state_dict()
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]), name

    def test_training_moves_the_adapter_and_nothing_else(self, tiny_lm):
        model = self.fresh(tiny_lm)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trainable
        for name in trainable:
            assert any(part in name for part in ADAPTER_WEIGHTS), name
        assert any("reclora_gate" in name for name in trainable) == self.config.gated
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, self.reads, 3, lr=self.lr)
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved
        assert moved <= trainable
        for parameter in model.parameters():
            assert parameter.grad is None or parameter.requires_grad

    def test_training_changes_the_output(self, tiny_lm, trained):
        assert (logits(trained, self.reads) - tiny_lm.model(batch()[0]).logits).abs().max() > 1e-5

    def test_switched_off_it_is_the_lm(self, tiny_lm, trained):
        before = logits(trained, self.reads)
        with trained.disable_adapter():
            assert torch.equal(logits(trained, self.reads), tiny_lm.model(batch()[0]).logits)
        assert torch.equal(logits(trained, self.reads), before)

    def test_taken_off_it_leaves_the_lm(self, tiny_lm, trained):
        lm = copy.deepcopy(trained).unload()
        assert not any(isinstance(module, BaseTunerLayer) for module in lm.modules())
        assert torch.equal(lm(batch()[0]).logits, tiny_lm.model(batch()[0]).logits)

    def test_saved_and_loaded_it_is_the_same(self, tiny_lm, trained, tmp_path):
        save_adapter(copy.deepcopy(trained), tmp_path, CARD)
        page = (tmp_path / "README.md").read_text()
        for line in ("| base model | tiny |", "| data | the demo |", "| valid/auc | 0.7500 |"):
            assert line in page.splitlines()
        assert adapter_inputs(tmp_path) == self.inputs
        loaded = load_adapter(copy.deepcopy(tiny_lm.model), tmp_path).eval()
        assert torch.equal(logits(loaded, self.reads), logits(trained, self.reads))
        assert not any(p.requires_grad for p in loaded.parameters())
        names = {name for name, p in trained.named_parameters() if p.requires_grad}
        again = load_adapter(copy.deepcopy(tiny_lm.model), tmp_path, trainable=True)
        assert {name for name, p in again.named_parameters() if p.requires_grad} == names

    def test_the_same_adapter_gives_the_same_files(self, trained, tmp_path):
        for name in ("one", "other"):
            save_adapter(copy.deepcopy(trained), tmp_path / name, CARD)
        for file in (tmp_path / "one").iterdir():
            assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()

    def test_neither_padding_nor_the_rest_of_the_batch_matters(self, trained):
        model = copy.deepcopy(trained).double()
        ids, representation = batch()
        expected = logits(model, self.reads)
        for row in range(BATCH):
            one = slice(row, row + 1)
            alone = logits(model, self.reads, ids[one], representation[one])
            torch.testing.assert_close(alone, expected[one], rtol=1e-6, atol=1e-6)
        count = 3
        mask = F.pad(torch.ones_like(ids), (count, 0))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        left = F.pad(ids, (count, 0), value=1)
        padded = logits(model, self.reads, left, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(padded[:, count:], expected, rtol=1e-6, atol=1e-6)
        unmasked = logits(model, self.reads, left, position_ids=positions)
        assert (unmasked[:, count:] - expected).abs().max() > 1e-4  # so the mask does something
        mask = F.pad(torch.ones_like(ids), (0, count))
        padded = logits(model, self.reads, F.pad(ids, (0, count), value=1), attention_mask=mask)
        torch.testing.assert_close(padded[:, :LENGTH], expected, rtol=1e-6, atol=1e-6)

    def test_merged_it_is_the_same(self, trained):
        model = copy.deepcopy(trained)
        expected = logits(model, self.reads)
        model.merge_adapter()
        torch.testing.assert_close(logits(model, self.reads), expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model, self.reads), expected, rtol=1e-4, atol=1e-5)
        lm = model.merge_and_unload()
        assert not any(isinstance(module, BaseTunerLayer) for module in lm.modules())
        torch.testing.assert_close(lm(batch()[0]).logits, expected, rtol=1e-4, atol=1e-5)


class PersonalizedContract(AdapterContract):
    """What holds besides of an adapter that reads a representation; its update differs from row to row."""

    config: AdapterConfig
    inputs = AdapterInputs("target", 0)

    def test_merged_it_is_the_same(self, trained):
        """It cannot be: merging is refused, and changes nothing."""
        model = copy.deepcopy(trained)
        expected = logits(model, True)
        with pytest.raises(ValueError, match="cannot be merged") as error:
            model.merge_and_unload()
        assert "\n" not in str(error.value)
        assert torch.equal(logits(model, True), expected)

    def test_at_the_start_the_representation_does_not_matter(self, tiny_lm):
        ids, representation = batch()
        model = self.fresh(tiny_lm)
        assert torch.equal(logits(model, True, ids, representation.roll(1, 0)), logits(model, True))

    def test_after_training_each_row_is_adapted_by_its_own_representation(self, trained):
        ids, representation = batch()
        expected = logits(trained, True)
        shuffled = logits(trained, True, ids, representation.roll(1, 0))
        assert (shuffled - expected).abs().amax((1, 2)).min() > 1e-6
        together = logits(trained, True, ids.roll(1, 0), representation.roll(1, 0))
        torch.testing.assert_close(together, expected.roll(1, 0), rtol=1e-4, atol=1e-5)

    def test_without_a_representation_it_is_an_error(self, trained):
        with pytest.raises(ValueError, match="no representation") as error:
            trained(batch()[0])
        assert "\n" not in str(error.value)


class SoftPromptContract(PersonalizedContract):
    """What holds besides of an adapter with a soft prompt."""

    config: AdapterConfig

    def test_it_starts_at_the_lm(self, tiny_lm):
        """It does not: its virtual tokens are ordinary ones, which the LM's prompt has not."""
        start = logits(self.fresh(tiny_lm), True)
        assert (start - tiny_lm.model(batch()[0]).logits).abs().max() > 1e-3
