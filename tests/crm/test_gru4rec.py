"""GRU4Rec against a literal recurrence over the events alone."""

from __future__ import annotations

import torch

from tests.crm.contract import CrmContract


class TestGRU4Rec(CrmContract):
    variant = "gru4rec"


def test_the_state_is_that_of_a_literal_recurrence(make_model, make_batch):
    model = make_model("gru4rec").double().eval()
    batch = make_batch(8, 5)
    batch["recent_mask"][2] = False
    sample, query = model.embeddings.sample(batch)
    events, mask = model.embeddings.events(batch, "recent")
    gru = model.gru
    for b in range(8):
        state = torch.zeros(12, dtype=torch.float64)
        for event in events[b][mask[b]]:
            of_event = (gru.weight_ih_l0 @ event + gru.bias_ih_l0).chunk(3)
            of_state = (gru.weight_hh_l0 @ state + gru.bias_hh_l0).chunk(3)
            reset = torch.sigmoid(of_event[0] + of_state[0])
            update = torch.sigmoid(of_event[1] + of_state[1])
            candidate = torch.tanh(of_event[2] + reset * of_state[2])
            # torch's update gate keeps the old state; the paper's takes the new one.
            state = (1 - update) * candidate + update * state
        wanted = model.head(sample[b : b + 1], query[b : b + 1], state[None])
        for got, want in zip(model(batch), wanted, strict=True):
            torch.testing.assert_close(got[b], want[0], rtol=1e-9, atol=1e-12)


def test_several_layers_stack(make_model, make_batch):
    model = make_model("gru4rec", layers=2).eval()
    assert model.gru.num_layers == 2
    batch = make_batch(16, 5)
    events, mask = model.embeddings.events(batch, "recent")
    sample, query = model.embeddings.sample(batch)
    for b in range(16):
        _, last = model.gru(events[b : b + 1, mask[b]])  # the events alone, no padding
        wanted, _ = model.head(sample[b : b + 1], query[b : b + 1], last[-1])
        torch.testing.assert_close(model(batch)[0][b], wanted[0], rtol=1e-5, atol=1e-6)
