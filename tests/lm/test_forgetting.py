"""What tuning changed: the text by counting its tokens, the loss by a plain loop, updates by merging them."""

import copy
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from recllm.eventlog.ids import SPLITS
from recllm.lm.adapters import add_adapter
from recllm.lm.config import AdapterConfig
from recllm.lm.forgetting import fix_gate_at_mean, held_out_text, text_loss, update_size
from recllm.reclora.mixture import weigh

STATIC = {
    "lora": {"kind": "lora"},
    "dora": {"kind": "dora"},
    "rslora": {"kind": "rslora"},
    "vera": {"kind": "vera"},
    "adalora": {"kind": "adalora"},
    "milora": {"kind": "lora", "init": "milora"},
    "pissa": {"kind": "lora", "init": "pissa"},
    "random-svd": {"kind": "lora", "init": "random-svd"},
}
GATED = {
    "gaussian": {"num_meta": 2},
    "module": {"num_meta": 2, "gate": "module"},
    "milora": {"num_meta": 2, "init": "milora"},
}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_the_text_tells_validation_events_and_no_others(demo_log, tiny_lm):
    log, pieces = demo_log, tiny_lm.pieces
    ids, weights = held_out_text(log, pieces, 3, 64, count=10**6)
    rows = np.flatnonzero(np.asarray(log.split) == SPLITS["valid"])
    assert not log.train_events()[rows].any()
    _, events = np.unique(log.user[rows], return_counts=True)
    documents = sum(math.ceil(count / 6) for count in events)  # of 6 events each, and EOS
    lengths = pieces.lengths[pieces.item[log.item[rows]]] + pieces.lengths[pieces.rating[log.rating[rows]]]
    assert weights.sum() == lengths.sum() + documents
    assert set(np.unique(weights)) == {0, 1}
    targets = np.bincount(ids[weights > 0], minlength=len(tiny_lm.tokenizer))
    wanted = np.zeros_like(targets)
    for row in rows:
        for piece in (pieces.item[log.item[row]], pieces.rating[log.rating[row]]):
            np.add.at(wanted, pieces.table[piece], 1)
    wanted[tiny_lm.tokenizer.eos_token_id] += documents
    np.testing.assert_array_equal(targets, wanted)


def test_of_much_text_the_same_blocks_are_drawn(demo_log, tiny_lm):
    first, again = (held_out_text(demo_log, tiny_lm.pieces, 3, 64, count=5) for _ in range(2))
    assert first[0].shape == first[1].shape == (5, 64)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (first[1][-1] > 0).any()  # full to its end


def test_the_loss_of_an_lm_that_knows_nothing_is_that_of_a_guess(demo_log, tiny_lm):
    model = copy.deepcopy(tiny_lm.model)
    model.get_output_embeddings().weight.zero_()
    result = text_loss(model, *held_out_text(demo_log, tiny_lm.pieces, 3, 64, count=5))
    assert result == pytest.approx(math.log(model.config.vocab_size), rel=1e-6)


def test_the_loss_is_a_mean_over_tokens_that_count(demo_log, tiny_lm):
    ids, weights = held_out_text(demo_log, tiny_lm.pieces, 3, 64, count=5)
    losses = []
    for block, counts in zip(torch.from_numpy(ids).long(), weights, strict=True):
        logps = tiny_lm.model(block[None]).logits[0].double().log_softmax(-1)
        losses += [-float(logps[t - 1, block[t]]) for t in range(1, len(block)) if counts[t]]
    for size in (2, 5):
        assert text_loss(tiny_lm.model, ids, weights, size) == pytest.approx(np.mean(losses), rel=1e-5)


def test_an_updates_size_by_hand():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.v = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    two = Two()
    two.q.weight.data = torch.tensor([[3.0, 0], [0, 4]])  # of norm 5
    two.v.weight.data = torch.tensor([[0.0, 12], [0, 0]])  # 12
    model = get_peft_model(two, LoraConfig(r=1, lora_alpha=1.5, target_modules=["q", "v"]))
    layers = model.base_model.model
    for layer, down in ((layers.q, [[0.0, 2]]), (layers.v, [[8 / 3, 0]])):
        layer.lora_A["default"].weight.data = torch.tensor(down)
        layer.lora_B["default"].weight.data = torch.tensor([[1.0], [0]])  # 1.5 B A: of norms 3 and 4
    wanted = {"update": 5 / 13, "update/q": 3 / 5, "update/v": 4 / 12}
    assert update_size(model) == pytest.approx(wanted)


def trained(tiny_lm, reads, **kind):
    """An adapter on a copy of the LM after some large steps, and the representations that it read."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 40, (4, 6), generator=generator)
    representation = torch.randn(4, 5, generator=generator)
    config = AdapterConfig(r=2, lora_alpha=4, target_modules=list(MODULES), **kind)
    model = add_adapter(
        copy.deepcopy(tiny_lm.model), config, representation if reads else None, seed=0, steps=10
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    extra = {"representation": representation} if reads else {}
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(ids, **extra).logits[:, -1], ids[:, 0]).backward()
        optimizer.step()
    return model.eval(), representation


@pytest.mark.parametrize("kind", STATIC)
def test_every_kinds_update_is_what_merging_it_adds(tiny_lm, kind):
    model, _ = trained(tiny_lm, False, **STATIC[kind])
    result = update_size(model)
    merged = dict(model.merge_and_unload().named_parameters())
    moved, whole = dict.fromkeys(MODULES, 0.0), dict.fromkeys(MODULES, 0.0)
    for path, weight in tiny_lm.model.named_parameters():
        if (module := path.split(".")[-2]) in MODULES:
            moved[module] += float((merged[path] - weight).double().square().sum())
            whole[module] += float(weight.double().square().sum())
    wanted = {f"update/{name}": math.sqrt(moved[name] / whole[name]) for name in MODULES}
    wanted["update"] = math.sqrt(sum(moved.values()) / sum(whole.values()))
    assert result == pytest.approx(wanted, rel=1e-3)
    assert result["update"] > 1e-5


@pytest.mark.parametrize("kind", GATED)
def test_a_gated_adapter_is_taken_at_its_mean_gate(tiny_lm, demo_log, kind):
    model, representation = trained(tiny_lm, True, kind="reclora", **GATED[kind])
    with pytest.raises(ValueError, match="differs from row to row"):
        update_size(model)
    text = held_out_text(demo_log, tiny_lm.pieces, 3, 64, count=3)
    ids, alone = torch.from_numpy(text[0]).long(), representation[:1]
    expected = model(ids, representation=alone.expand(3, -1)).logits
    tuner, squares = model.base_model, np.zeros(2)
    gates = tuner.alpha(representation)
    for place, (_, layer) in enumerate(tuner.layers("default")):
        own = gates[:, place] if GATED[kind].get("gate") else gates
        parts = [layer.plain_lora("default", weigh(alpha, layer.configs["default"])) for alpha in own]
        mean = torch.stack([b @ a for a, b in parts]).mean(0)  # product: linear in alpha
        squares += [float(mean.detach().square().sum()), float(layer.base_layer.weight.square().sum())]
    plain = fix_gate_at_mean(copy.deepcopy(model), representation)
    assert update_size(plain)["update"] == pytest.approx(math.sqrt(squares[0] / squares[1]), rel=1e-4)
    assert update_size(plain)["update"] > 1e-4
    assert text_loss(plain, *text) != pytest.approx(text_loss(tiny_lm.model, *text), abs=1e-4)
    of_one = fix_gate_at_mean(model, alone)
    torch.testing.assert_close(of_one(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["gaussian", "milora", "pissa", "random-svd"])
def test_a_start_has_forgotten_nothing_and_moved_nothing(tiny_lm, demo_log, init):
    config = AdapterConfig(kind="reclora", num_meta=2, r=2, lora_alpha=2, init=init)
    representation = torch.randn(4, 5, generator=torch.Generator().manual_seed(5))
    text = held_out_text(demo_log, tiny_lm.pieces, 3, 64, count=3)
    before = text_loss(tiny_lm.model, *text)
    model = fix_gate_at_mean(
        add_adapter(copy.deepcopy(tiny_lm.model), config, representation, seed=0), representation
    )
    assert text_loss(model, *text) == pytest.approx(before, rel=1e-6)
    assert update_size(model)["update"] < 1e-6
