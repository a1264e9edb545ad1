"""A step that memory does not do for is done again with less; from there on the training is one with less."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from recllm.errors import StageError
from recllm.lm.adapters import add_adapter
from recllm.lm.config import AdapterConfig
from recllm.lm.logprobs import answer_logits, answer_loss
from recllm.lm.tasks import YesNoPrompts
from recllm.training.adapter_module import AdapterModule
from recllm.training.loaders import Loaders, Stream
from recllm.training.micro_batches import TokenBudget
from recllm.training.optimizer import optimizer
from tests.children import environment
from tests.training import test_fit as whole
from tests.training.test_micro_batches import Adapted

REPOSITORY = Path(__file__).parents[2]
LENGTHS = 1 + np.arange(whole.ROWS) % 7


class Bounded(Adapted):
    """A frozen base and a small part that trains, with dropout; memory does for so many tokens and no more.

    `fits`: step -> tokens. `late`: what fails is the backward pass.
    """

    def __init__(self, fits=lambda step: 10**9, late=False, dropout=0.3):
        super().__init__()
        self.fits, self.late, self.dropout = fits, late, dropout
        self.failed = []

    def loss(self, batch):
        tokens = int(batch["length"].max()) * len(batch["length"])
        is_enough = tokens <= self.fits(self.global_step)
        hidden = nn.functional.dropout(self.model["base"](batch["x"]), self.dropout)
        if not is_enough and not self.late:
            self._fail(tokens)
        out = self.model["adapter"](hidden).sum(-1)
        if not is_enough:
            out.register_hook(lambda _: self._fail(tokens))
        mean = ((out - batch["y"]) ** 2).mean()
        return {
            "loss": mean * batch["loss_scale"],
            "data": mean.detach(),
            "weights": {"data": batch["loss_scale"]},
        }

    def _fail(self, tokens):
        self.failed.append((self.global_step, tokens))
        raise torch.OutOfMemoryError(f"tried to allocate {tokens} tokens")


def loaders(tokens, budget):
    """`tokens`: step -> most tokens of a forward."""
    x, y = whole.data()
    stream = Stream(whole.ROWS, whole.FIT.batch_size, 0)

    def rows(indices):
        return {"x": x[indices], "y": y[indices], "length": torch.from_numpy(LENGTHS[indices])}

    def batch(step, rank, world):
        indices = stream.indices(step, rank, world)
        parts = stream.micro_batches(step, rank, world, tokens(step), LENGTHS)
        return [rows(indices[part]) | {"loss_scale": scale} for part, scale in parts]

    return Loaders(train=batch, steps=whole.STEPS, valid=[(rows, whole.ROWS)], valid_batch=16, budget=budget)


@pytest.fixture
def train(make_stage, monkeypatch):
    def one(name, module, made, parts=1):
        monkeypatch.setattr(whole, "loaders", lambda: made)
        run = whole.train(make_stage(f"stage2/{name}"), module, True, accumulate=parts)
        return whole.ended(run, module)

    return one


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_from_the_step_that_failed_on_it_is_the_training_with_less(train, capsys, late, parts):
    """8 rows of up to 7 tokens are 56; from the 10th step on memory does for 20 only, from the 18th for 9.

    Of two parts the first one may have been done before the second one fails: what it draws is then that of
    a batch that was not cut, so nothing is drawn there.
    """
    dropout = 0.3 if parts == 1 else 0.0

    def fits(step):
        return 10**9 if step < 9 else 20 if step < 17 else 9

    def tokens(step):
        # Halves of 56, until a step is cut more often and its forwards fit.
        return 0 if step < 9 else 14 if step < 17 else 7

    wanted = train("known", Bounded(dropout=dropout), loaders(tokens, None), parts)
    budget = TokenBudget(0, 56)
    module = Bounded(fits, late, dropout)
    got = train("found", module, loaders(lambda step: budget.tokens, budget), parts)
    assert {step for step, _ in module.failed} == {9, 17}
    assert budget.tokens == 7
    if parts == 1:
        assert whole.same(got["weights"], wanted["weights"])
        assert got["curve"] == wanted["curve"]
    for name, value in wanted["weights"].items():
        torch.testing.assert_close(got["weights"][name], value, rtol=1e-5, atol=1e-7, msg=name)
    said = capsys.readouterr().out
    assert (
        "out of memory in step 10, which is done again: from here on a forward has 14 tokens at most" in said
    )
    assert (
        "out of memory in step 18, which is done again: from here on a forward has 7 tokens at most" in said
    )


def test_what_has_nothing_to_cut_says_so(train):
    module = Bounded(lambda step: 10**9 if step < 5 else 0)
    with pytest.raises(
        StageError, match=r"^out of memory in step 6 with one row a forward[^\n]*; wanted [^\n]*$"
    ):
        train("none", module, loaders(lambda step: 1, TokenBudget(1, 56)))


def test_another_error_is_not_taken_for_it(train):
    module = Bounded()
    module.loss = lambda batch: torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(RuntimeError, match="size"):
        train("other", module, loaders(lambda step: 0, TokenBudget(0, 56)))


PROGRAM = """
import sys
from pathlib import Path
import torch
from recllm import processes
from recllm.console import is_first_process
from recllm.training.fit import fit
from tests.training import test_fit as whole
from tests.training.test_micro_batches import Adapted
from tests.training import test_out_of_memory as short

torch.set_num_threads(1)
budget = short.TokenBudget(0, 56)
module = short.Bounded(lambda step: 9 if step >= 9 and processes.rank() == 1 else 10**9, dropout=0.0)
made = short.loaders(lambda step: budget.tokens, budget)
run = whole.start(Path(sys.argv[1]), devices=2, strategy="ddp")
fit(run, module, made, whole.FIT, whole.INTERVAL, ["valid/auc", "valid/hr@1"], first=True)
assert budget.tokens == 7
assert bool(module.failed) == (not is_first_process())
torch.save(module.state_dict(), Path(sys.argv[1]) / f"weights-{int(not is_first_process())}.pt")
"""


@pytest.mark.slow
def test_where_one_of_two_processes_fails_both_begin_anew(make_stage, train):
    wanted = train("one", Bounded(dropout=0.0), loaders(lambda step: 0, None))
    folder = make_stage("stage2/two")
    program = folder / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program), str(folder)],
        cwd=REPOSITORY,
        env=environment(PYTHONPATH=str(REPOSITORY)),
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("out of memory in step 10, which is done again") >= 1
    for rank in (0, 1):
        got = torch.load(folder / f"weights-{rank}.pt", weights_only=True)
        for name, value in wanted["weights"].items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=name)


class Filled(Bounded):
    """Every token of a forward takes 64 MiB of the GPU while it is computed."""

    def loss(self, batch):
        tokens = int(batch["length"].max()) * len(batch["length"])
        computed = super().loss(batch)
        memory = torch.zeros(tokens << 26, dtype=torch.uint8, device=self.device)
        computed["loss"] = computed["loss"] + 0 * memory[0]
        return computed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_that_is_too_small_for_a_step(make_stage, monkeypatch, capsys):
    def ended(name, budget, tokens):
        module = Filled(dropout=0.0)
        monkeypatch.setattr(whole, "loaders", lambda: loaders(tokens, budget))
        run = whole.train(make_stage(f"stage2/{name}"), module, True, accelerator="gpu")
        return whole.ended(run, module)

    wanted = ended("known", None, lambda step: 14)
    budget = TokenBudget(0, 56)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (20 << 26)) / total)
    try:
        got = ended("found", budget, lambda step: budget.tokens)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert budget.tokens == 14
    assert "which is done again: from here on a forward has 14 tokens at most" in capsys.readouterr().out
    for name, value in wanted["weights"].items():
        torch.testing.assert_close(got["weights"][name], value, rtol=1e-4, atol=1e-6, msg=name)


class BoundedLlama(LlamaForCausalLM):
    """Memory does for so many tokens of a forward; for twice as many where layers are computed anew."""

    most = 10**9

    def forward(self, input_ids=None, **options):
        recomputes = self.model.gradient_checkpointing
        if self.training and input_ids.numel() > self.most * (2 if recomputes else 1):
            raise torch.OutOfMemoryError(f"{input_ids.numel()} tokens")
        return super().forward(input_ids=input_ids, **options)


class Answers(AdapterModule):
    """An LM that learns answers."""

    def __init__(self, model, pieces):
        super().__init__(model)
        self.answers = pieces.yes_id, pieces.no_id

    def loss(self, batch):
        logits = answer_logits(self.model, batch["prompt"])
        loss = answer_loss(logits, batch["label"], *self.answers)
        return {"loss": loss * batch["loss_scale"], "weights": {}}

    def validation_step(self, batch, index):
        logits = answer_logits(self.model, batch["prompt"])
        score = -answer_loss(logits, batch["label"], *self.answers)
        self.log("valid/auc", score)
        self.log("valid/hr@1", -score)

    def configure_optimizers(self):
        return optimizer(self, whole.FIT, whole.STEPS)


def bounded_lm(tiny_lm):
    lm = copy.deepcopy(tiny_lm.model)
    lm.__class__ = BoundedLlama
    return add_adapter(lm, AdapterConfig(kind="lora", r=2), None, 0, 10)


def test_where_one_row_is_too_much_layers_are_computed_anew(train, demo_log, tiny_lm, capsys):
    rows = demo_log.rows("train", "uniform50")
    task = YesNoPrompts(tiny_lm.prompts, rows, demo_log.recent(rows, 5), None)
    lengths = task.lengths()
    stream = Stream(len(rows), whole.FIT.batch_size, 0)

    def made(budget):
        def batch(step, rank, world):
            indices = stream.indices(step, rank, world)
            parts = stream.micro_batches(step, rank, world, budget.tokens, lengths)
            return [task(indices[part]) | {"loss_scale": scale} for part, scale in parts]

        return Loaders(
            train=batch, steps=whole.STEPS, valid=[(task, len(rows))], valid_batch=16, budget=budget
        )

    widest = 8 * int(lengths.max())
    wanted = train("enough", Answers(bounded_lm(tiny_lm), tiny_lm.pieces), made(TokenBudget(0, widest)))
    module = Answers(bounded_lm(tiny_lm), tiny_lm.pieces)
    module.model.get_base_model().most = int(lengths.max()) - 1
    budget = TokenBudget(0, widest)
    got = train("short", module, made(budget))
    assert module.recomputes
    said = capsys.readouterr().out
    assert "which is done again: from here on layers are computed anew in the backward pass" in said
    for name, value in wanted["weights"].items():
        torch.testing.assert_close(got["weights"][name], value, rtol=1e-4, atol=1e-6, msg=name)
