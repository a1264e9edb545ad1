"""Masking, event embeddings and the factored attention of `recllm.crm.layers`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recllm.crm.config import CrmConfig, Fields
from recllm.crm.layers import Embeddings, Events, TargetAttention, Tower

# User field 2 (size 9 of 12) and item field 1 (10 of 10) name the user and the item nearly as well as the id.
FIELDS = Fields(user_sizes=(12, 4, 9), item_sizes=(10, 10, 4), rating_levels=5, category=2)


def weight(embeddings: Embeddings, table: str) -> Tensor:
    return embeddings.get_parameter(f"{table}.weight")


def test_fields_refuse_missing_tables() -> None:
    with pytest.raises(ValueError, match="make prepare"):
        Fields((), (3,), 5, 0)
    with pytest.raises(ValueError, match="index of the 2 item fields"):
        Fields((3,), (3, 4), 5, 2)


def test_padding_rows_are_zero_and_stay_zero() -> None:
    torch.manual_seed(0)
    embeddings = Embeddings(FIELDS, CrmConfig(embedding_dim=4, mask_users=0.0, mask_items=0.0))
    batch = {"user": torch.zeros(3, 3, dtype=torch.int64), "item": torch.zeros(3, 3, dtype=torch.int64)}
    joined, query = embeddings.sample(batch)
    assert joined.shape == (3, 24)
    assert query.shape == (3, 8)
    assert not joined.any()
    assert not query.any()
    joined.sum().backward()
    grads = [parameter.grad for parameter in embeddings.parameters() if parameter.grad is not None]
    assert grads
    assert not any(grad.any() for grad in grads)


def test_events_join_item_category_rating_and_interval() -> None:
    torch.manual_seed(0)
    embeddings = Embeddings(FIELDS, CrmConfig(embedding_dim=4, event_dim=3))
    batch = {
        "recent_item": torch.tensor([[[7, 7, 3], [5, 5, 2]]]),
        "recent_rating": torch.tensor([[4, 5]]),
        "recent_interval": torch.tensor([[9, 31]]),
        "recent_mask": torch.tensor([[False, True]]),
    }
    events, mask = embeddings.events(batch, "recent")
    assert events.shape == (1, 2, 14)
    assert mask.tolist() == [[False, True]]
    assert not events[0, 0].any()  # real ids, but no event there
    assert embeddings.interval is not None
    wanted = torch.cat(
        [
            weight(embeddings, "item.0")[5],
            weight(embeddings, "item.2")[2],
            embeddings.rating.weight[5],
            embeddings.interval.weight[31],
        ]
    )
    torch.testing.assert_close(events[0, 1], wanted)


def test_without_intervals_there_is_no_interval_table() -> None:
    embeddings = Embeddings(FIELDS, CrmConfig(embedding_dim=4, event_dim=3, interval=False))
    assert embeddings.interval is None
    assert embeddings.event_dim == 4 + 4 + 3


def test_ids_are_masked_in_training_only_and_identifying_fields_together() -> None:
    torch.manual_seed(0)
    embeddings = Embeddings(FIELDS, CrmConfig())
    ids = torch.tensor([[7, 3, 8]]).repeat(20_000, 1)
    masked = embeddings._mask(ids, embeddings.user_identity, 0.25)
    assert ids.eq(torch.tensor([7, 3, 8])).all()  # the caller's batch is left alone
    assert set(map(tuple, masked.tolist())) == {(7, 3, 8), (1, 3, 1)}
    share = masked[:, 0].eq(1).float().mean().item()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 20_000) ** 0.5
    embeddings.eval()
    assert torch.equal(embeddings._mask(ids, embeddings.user_identity, 0.25), ids)


def test_l2_is_the_mean_squared_norm_of_the_identifying_rows_looked_up() -> None:
    embeddings = Embeddings(FIELDS, CrmConfig(embedding_dim=2))
    with torch.no_grad():
        for table in [*embeddings.user, *embeddings.item]:
            table.get_parameter("weight").fill_(100.0)  # rows that are not looked up must not count
        weight(embeddings, "user.0")[2:4] = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        weight(embeddings, "user.2")[5] = torch.tensor([0.0, 1.0])
        weight(embeddings, "item.0")[4] = torch.tensor([1.0, 1.0])
        weight(embeddings, "item.1")[4] = torch.tensor([2.0, 0.0])
    batch = {"user": torch.tensor([[2, 2, 5], [3, 2, 5]]), "item": torch.tensor([[4, 4, 2], [4, 4, 3]])}
    # users (5 + 9) / 2, zip 1, item 2, title 4
    assert embeddings.l2(batch).item() == pytest.approx(7 + 1 + 2 + 4)


def literal_scores(attention: TargetAttention, query: Tensor, events: Tensor, mask: Tensor) -> Tensor:
    """The paper's unit, one event at a time, on the joined vector."""
    scores = torch.zeros(mask.shape, dtype=query.dtype)
    for b in range(len(query)):
        for t in range(events.shape[1]):
            if mask[b, t]:
                e, q = events[b, t], query[b]
                hidden = attention.first(torch.cat([e, q, e[:6] - q, e[:6] * q]))
                for layer in attention.rest:
                    hidden = layer(torch.relu(hidden))
                scores[b, t] = hidden[0]
    return scores


@pytest.mark.parametrize("hidden", [[5], [7, 3]])
def test_factored_attention_equals_the_literal_one(hidden: list[int]) -> None:
    torch.manual_seed(0)
    attention = TargetAttention(6, 9, hidden).double()
    query, events = torch.randn(4, 6).double(), torch.randn(4, 8, 9).double()
    mask = torch.rand(4, 8) < 0.6
    wanted = literal_scores(attention, query, events, mask)
    torch.testing.assert_close(attention.scores(query, events, mask), wanted, rtol=1e-9, atol=1e-12)
    pooled = (wanted[:, :, None] * events).sum(1)
    torch.testing.assert_close(attention(query, Events([events], [], mask)), pooled, rtol=1e-9, atol=1e-12)


def test_factored_attention_has_the_literal_gradients() -> None:
    torch.manual_seed(1)
    attention = TargetAttention(6, 9, [5]).double()
    query, events = torch.randn(4, 6).double(), torch.randn(4, 8, 9).double()
    mask = torch.rand(4, 8) < 0.6
    weights = list(attention.parameters())
    inputs = [query.requires_grad_(), events.requires_grad_(), *weights]
    got = torch.autograd.grad(attention.scores(query, events, mask).square().sum(), inputs)
    wanted = torch.autograd.grad(literal_scores(attention, query, events, mask).square().sum(), inputs)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_attention_over_nothing_is_zero() -> None:
    attention = TargetAttention(6, 9, [5])
    events = Events([torch.randn(3, 8, 9)], [], torch.zeros(3, 8, dtype=torch.bool))
    pooled = attention(torch.randn(3, 6), events)
    assert torch.equal(pooled, torch.zeros(3, 9))


def test_empty_layer_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="attention_mlp"):
        TargetAttention(6, 9, [])
    with pytest.raises(ValueError, match=r"mlp=\[256,256,256\]"):
        Tower(6, CrmConfig(mlp=[]))


def test_the_representation_is_what_the_logit_reads() -> None:
    tower = Tower(6, CrmConfig(mlp=[8, 5])).eval()
    logit, representation = tower(torch.randn(3, 6))
    assert logit.shape == (3,)
    assert representation.shape == (3, 5)
    wanted = representation @ tower.logit.weight[0] + tower.logit.bias
    torch.testing.assert_close(logit, wanted)
