"""Steps cut by tokens: who goes with whom, how many, and that a training in micro-batches is the training."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from recllm.config.trainer import TrainerConfig
from recllm.training import micro_batches
from recllm.training.adapter_module import AdapterModule
from recllm.training.loaders import Loaders, Stream
from recllm.training.micro_batch_module import summed
from recllm.training.micro_batches import TokenBudget, cut, cut_alike, token_budget, token_bytes
from recllm.training.optimizer import optimizer
from tests.training import test_fit as whole

LENGTHS = np.array([7, 3, 5, 9, 4])


def test_rows_of_like_length_go_together_and_none_is_too_wide():
    # Sorted: 3 4 5 7 9 (rows 1 4 2 0 3). 3 rows of up to 5 are 15 tokens; 7 and 9 would be 18.
    assert [part.tolist() for part in cut(LENGTHS, 15)] == [[1, 4, 2], [0], [3]]
    assert [part.tolist() for part in cut(LENGTHS, 18)] == [[1, 4, 2], [0, 3]]
    assert [part.tolist() for part in cut(LENGTHS, 1)] == [[1], [4], [2], [0], [3]]


def test_what_need_not_be_cut_keeps_its_order():
    assert [part.tolist() for part in cut(LENGTHS, 0)] == [[0, 1, 2, 3, 4]]
    assert [part.tolist() for part in cut(LENGTHS, 45)] == [[0, 1, 2, 3, 4]]


def test_all_processes_have_as_many_forwards():
    ranks = [LENGTHS, np.array([1, 1, 1, 1, 1])]
    assert [len(cut(one, 15)) for one in ranks] == [3, 1]
    assert [len(cut_alike(ranks, rank, 15)) for rank in (0, 1)] == [3, 3]
    parts = cut_alike(ranks, 1, 15)
    assert sorted(np.concatenate(parts).tolist()) == [0, 1, 2, 3, 4]
    # A process with fewer rows than the other has forwards bounds the number.
    assert [len(cut_alike([LENGTHS, LENGTHS[:2]], rank, 1)) for rank in (0, 1)] == [2, 2]


def test_shares_of_the_loss_add_up_to_the_processes_share():
    stream = Stream(20, 5, 0)
    lengths = np.arange(20)
    for step in range(3):
        for rank in (0, 1):
            parts = stream.micro_batches(step, rank, 2, 20, lengths)
            assert sum(scale for _, scale in parts) == pytest.approx(stream.loss_scale(rank, 2))
            count = len(stream.indices(step, rank, 2))
            assert sorted(np.concatenate([places for places, _ in parts])) == list(range(count))


def test_the_budget_is_what_memory_allows(monkeypatch, capsys):
    model = nn.Sequential(nn.Embedding(100, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    assert token_bytes(model) == int(1.5 * (4 + 6 + 6 + 2) * 4)
    monkeypatch.setattr(micro_batches, "free_memory", lambda device: 108 * 2 * 50)
    config = TrainerConfig(accelerator="cpu")
    assert token_budget(model, config, np.array([10, 5]), 5) == TokenBudget(0, 50)  # all fit
    assert not capsys.readouterr().out
    assert token_budget(model, config, np.array([10, 5]), 6) == TokenBudget(50, 60)
    assert "a step of up to 60 tokens is cut into forwards of 50 at most" in capsys.readouterr().out
    monkeypatch.setattr(micro_batches, "free_memory", lambda device: 1e12)  # a CPU needs 2 GB of it at most
    assert token_budget(model, config, np.array([20_000_000]), 1).tokens == int(2e9 / 108)
    monkeypatch.setattr(micro_batches, "free_memory", lambda device: 108 * 2 * 50)
    shared = TrainerConfig(accelerator="cpu", accumulate=2)
    assert token_budget(model, shared, np.array([10, 5]), 6) == TokenBudget(0, 30)  # 3 rows a part
    machines = TrainerConfig(accelerator="cpu", num_nodes=2)
    assert token_budget(model, machines, np.array([10, 5]), 6) == TokenBudget(0, 30)
    stated = TrainerConfig(accelerator="cpu", tokens_per_forward=7)
    assert token_budget(model, stated, np.array([10, 5]), 6) == TokenBudget(7, 60)


def test_figures_of_micro_batches_are_those_of_the_step():
    outputs = [
        {"loss": torch.tensor(1.0), "answer": torch.tensor(2.0), "weights": {"answer": 0.25}},
        {"loss": torch.tensor(0.5), "answer": torch.tensor(4.0), "weights": {"answer": 0.75}},
        {"loss": torch.tensor(3.0), "title": torch.tensor(5.0), "weights": {"title": 1.0}},
    ]
    step = summed(outputs)
    assert step["loss"].item() == 4.5
    assert step["answer"].item() == 0.25 * 2 + 0.75 * 4
    assert step["title"].item() == 5
    assert step["weights"] == {"answer": 1.0, "title": 1.0}


# ---- the whole of `fit`


class Adapted(AdapterModule):
    """A frozen base and a small part that trains, on micro-batches; it sees NaN where gradients are lost."""

    def __init__(self, kill_at=None):
        torch.manual_seed(2)
        super().__init__(nn.ModuleDict({"base": nn.Linear(6, 6), "adapter": nn.Linear(6, 3)}))
        self.model["base"].requires_grad_(False)
        self.kill_at = kill_at

    def loss(self, batch):
        if self.kill_at == (self.global_step, batch["place"]):
            raise whole.Killed
        out = self.model["adapter"](self.model["base"](batch["x"])).sum(-1)
        mean = ((out - batch["y"]) ** 2).mean()
        scale = batch["loss_scale"]
        return {"loss": mean * scale, "data": mean.detach(), "weights": {"data": scale}}

    def validation_step(self, batch, index):
        out = self.model["adapter"](self.model["base"](batch["x"])).sum(-1)
        score = -((out - batch["y"]) ** 2).mean()
        self.log("valid/auc", score, batch_size=len(out))
        self.log("valid/hr@1", -score, batch_size=len(out))

    def configure_optimizers(self):
        return optimizer(self, whole.FIT, whole.STEPS)


def micro_batched(tokens):
    """Loaders whose steps are cut into forwards of so many tokens; rows have 1 to 7."""
    x, y = whole.data()
    stream = Stream(whole.ROWS, whole.FIT.batch_size, 0)
    lengths = 1 + np.arange(whole.ROWS) % 7

    def rows(indices):
        return {"x": x[indices], "y": y[indices]}

    def batch(step, rank, world):
        indices = stream.indices(step, rank, world)
        micro = stream.micro_batches(step, rank, world, tokens, lengths)
        return [
            rows(indices[part]) | {"loss_scale": scale, "place": place}
            for place, (part, scale) in enumerate(micro)
        ]

    return Loaders(train=batch, steps=whole.STEPS, valid=[(rows, whole.ROWS)], valid_batch=16)


@pytest.fixture
def train(make_stage, monkeypatch):
    """`train(name, module, tokens, parts)`: a whole training in micro-batches."""

    def one(name, module, tokens, parts=1):
        monkeypatch.setattr(whole, "loaders", lambda: micro_batched(tokens))
        run = whole.train(make_stage(f"stage2/{name}"), module, True, accumulate=parts)
        return whole.ended(run, module)

    return one


@pytest.mark.parametrize(("tokens", "parts"), [(1, 1), (12, 1), (12, 3)])
def test_a_training_in_micro_batches_is_the_training(train, tokens, parts):
    wanted = train("whole", Adapted(), 0)
    got = train("cut", Adapted(), tokens, parts)
    for name, value in wanted["weights"].items():
        torch.testing.assert_close(got["weights"][name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert got["curve"].count("\n") == wanted["curve"].count("\n")


def test_killed_between_micro_batches_it_ends_the_same_to_the_bit(make_stage, train):
    wanted = train("whole", Adapted(), 12)
    with pytest.raises(whole.Killed):
        train("killed", Adapted((15, 1)), 12)
    got = train("killed", Adapted(), 12)
    assert all(torch.equal(got["weights"][name], value) for name, value in wanted["weights"].items())
    assert got["curve"] == wanted["curve"]


def test_gradients_of_a_step_do_not_reach_the_next(monkeypatch):
    module = Adapted()
    module._trainer = SimpleNamespace(
        accumulate_grad_batches=1,
        received_sigterm=False,
        world_size=1,
        strategy=SimpleNamespace(backward=lambda loss, _: loss.backward()),
        global_step=0,
    )
    module.optimizers = lambda **_: torch.optim.SGD(module.parameters(), 0.1)
    x, y = whole.data()
    batch = [
        {"x": x[:2], "y": y[:2], "loss_scale": 0.5, "place": 0},
        {"x": x[2:4], "y": y[2:4], "loss_scale": 0.5, "place": 1},
    ]
    found = []
    for _ in range(2):
        module.training_step(batch, 0)["loss"].backward()
        module.optimizer_zero_grad(0, 0, module.optimizers())  # as Lightning does, behind the forward
        found.append(module.model["adapter"].weight.grad.clone())
    assert torch.equal(*found)
