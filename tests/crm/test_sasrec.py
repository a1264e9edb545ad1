"""SASRec: literal attention, causality, and that reading only the last position changes nothing."""

from __future__ import annotations

import math

import torch

from recllm.crm.sasrec import Block
from tests.crm.contract import CrmContract


class TestSASRec(CrmContract):
    variant = "sasrec"


def literal_block(block, tokens):
    """One block on one history [T, width] without padding, position by position."""
    heads, width = block.heads, tokens.shape[1] // block.heads
    normed = block.norm(tokens)
    query, (key, value) = block.query(normed), block.key_value(normed).chunk(2, dim=1)
    found = torch.zeros_like(tokens)
    for t in range(len(tokens)):
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            scores = [(query[t, part] @ key[s, part]).item() / math.sqrt(width) for s in range(t + 1)]
            total = sum(math.exp(score) for score in scores)
            for s in range(t + 1):
                found[t, part] += math.exp(scores[s]) / total * value[s, part]
    tokens = tokens + found
    norm, first, _, second = block.feed_forward
    return tokens + second(torch.relu(first(norm(tokens))))


def test_the_model_equals_literal_attention_over_the_events_alone(make_model, make_batch):
    model = make_model("sasrec").double().eval()
    batch = make_batch(8, 5)
    sample, query = model.embeddings.sample(batch)
    events, mask = model.embeddings.events(batch, "recent")
    logit, representation = model(batch)
    for b in range(8):
        history = events[b][mask[b]]
        place = torch.arange(len(history) - 1, -1, -1)
        tokens = model.token(history) + model.position.weight[place]
        for block in model.blocks:
            tokens = literal_block(block, tokens)
        state = model.norm(tokens[-1:])
        wanted = model.head(sample[b : b + 1], query[b : b + 1], state)
        torch.testing.assert_close(logit[b], wanted[0][0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(representation[b], wanted[1][0], rtol=1e-9, atol=1e-12)


def test_the_last_position_alone_equals_the_last_of_all(make_model):
    model = make_model("sasrec").double().eval()
    block: Block = model.blocks[0]
    tokens = torch.randn(3, 5, 12, dtype=torch.float64)
    seen = torch.ones(5, 5, dtype=torch.bool).tril().expand(3, 1, 5, 5)
    every = block(tokens, seen, last=False)
    alone = block(tokens, seen[:, :, -1:], last=True)
    torch.testing.assert_close(alone[:, 0], every[:, -1], rtol=1e-12, atol=1e-12)
    # Causal: a later token changes no earlier position.
    later = tokens.clone()
    later[:, 3] += 1
    assert torch.equal(block(later, seen, last=False)[:, :3], every[:, :3])
    assert not torch.equal(block(later, seen, last=False)[:, 3:], every[:, 3:])


def test_events_further_back_than_the_positions_share_one(make_model, make_batch):
    model = make_model("sasrec", layers=1).eval()
    batch = make_batch(2, 300)
    batch["recent_mask"][:] = True

    def swapped(one, other):
        keys = ("recent_item", "recent_rating", "recent_interval")
        new = {key: batch[key].clone() for key in keys}
        for key in keys:
            new[key][:, [one, other]] = batch[key][:, [other, one]]
        return model({**batch, **new})[0]

    torch.testing.assert_close(swapped(0, 1), model(batch)[0], rtol=1e-6, atol=1e-7)
    assert (swapped(0, 298) - model(batch)[0]).abs().min() > 1e-6
