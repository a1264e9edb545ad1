"""SIM: its two histories, its hard search end to end, its soft search against literal loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from recllm.crm import CrmConfig, Fields, build
from recllm.crm.inputs import CrmInputs
from recllm.crm.layers import Events
from recllm.crm.sim import SoftSearch
from recllm.crm.table import COUNTED, Table
from recllm.retrieval.category import SameCategory
from tests.crm.contract import RECENT, CrmContract, ModelContract


class TestSemanticSIM(CrmContract):
    variant = "sim"
    reads_retrieved = True


class TestSimLm(ModelContract):
    variant = "sim-lm"
    reads = (*RECENT, "recent_dense")
    reads_retrieved = True


class TestHardSIM(CrmContract):
    variant = "sim-hard"
    reads_retrieved = True


class TestSoftSIM(CrmContract):
    variant = "sim-soft"


def test_the_two_histories_have_attention_of_their_own(make_model, make_batch):
    model = make_model("sim").eval()
    batch = make_batch(16, 5, 5)
    swapped = dict(batch)
    for what in ("item", "rating", "interval", "mask"):
        swapped[f"recent_{what}"], swapped[f"retrieved_{what}"] = (
            batch[f"retrieved_{what}"],
            batch[f"recent_{what}"],
        )
    assert not torch.equal(model(batch)[0], model(swapped)[0])


@pytest.mark.parametrize("variant", ["sim", "sim-hard"])
def test_a_batch_without_retrieval_is_refused(variant, make_model, make_batch):
    model = make_model(variant)
    batch = {name: value for name, value in make_batch(4, 5).items() if not name.startswith("retrieved")}
    with pytest.raises(ValueError, match="retrieved_item"):
        model(batch)


def test_hard_sim_equals_attention_over_what_a_loop_finds(demo_log):
    """From the log to the logit: walk back through the history, take the target's category, attend."""
    log, k = demo_log, 3
    sizes = [tuple(one["size"] for one in log.meta[f"{side}_fields"]) for side in ("user", "item")]
    category = log.meta["category_field"]
    torch.manual_seed(0)
    config = CrmConfig(name="sim", retrieval="hard", embedding_dim=4, mlp=[8], attention_mlp=[4])
    model = build(Fields(*sizes, log.codes, category), config).double().eval()
    rows = np.flatnonzero(log.split >= 0)[::97][:12]
    logit, _ = model(CrmInputs(log, 2, k, searcher=SameCategory(log))(rows))
    tables, recent = model.embeddings, CrmInputs(log, 2)(rows)
    for b, row in enumerate(rows):
        mine = log.item_fields[log.item[row], category]
        history = range(int(log.offsets[log.user[row]]), row)
        found = [t for t in history if log.item_fields[log.item[t], category] == mine][-k:]
        one = {name: value[b : b + 1] for name, value in recent.items()}
        sample, query = tables.sample(one)
        long_term = torch.zeros(1, tables.retrieved_dim, dtype=torch.float64)
        for rank, t in enumerate(reversed(found), 1):
            seconds = int(log.timestamp[row] - log.timestamp[t])
            parts = [
                tables.item[0].weight[log.item_fields[log.item[t], 0]],
                tables.item[category].weight[mine],
            ]
            parts.append(tables.rating.weight[int(log.rating[t])])
            parts.append(tables.interval.weight[min(1 + int(np.log2(1.0 + seconds)), 31)])
            parts.append(tables.rank.weight[1 + int(np.log2(rank))])
            event = torch.cat(parts)[None, None]
            long_term += model.attention_retrieved(
                query, Events([event], [], torch.ones(1, 1, dtype=torch.bool))
            )
        short_term = model.attention_recent(query, tables.history(one, "recent"))
        wanted, _ = model.tower(torch.cat([sample, long_term, short_term], 1))
        torch.testing.assert_close(logit[b], wanted[0], rtol=1e-9, atol=1e-12)
    assert len(found) > 0


def test_soft_search_equals_literal_loops():
    torch.manual_seed(0)
    search = SoftSearch(3, 5, CrmConfig(name="sim", soft_k=3, attention_mlp=[5])).double()
    query = torch.randn(6, 3, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [False, True, True, True, True], [True, False] * 2 + [True]] * 2)
    mask[5] = False
    mask[4, 2:] = False
    # The first table is looked up an event; of the second, products and sums are counted by value.
    parts = [
        (Table(size, dim).double(), torch.randint(1, size, (6, 5)).masked_fill(~mask, 0))
        for size, dim in ((COUNTED * 5 + 1, 3), (4, 2))
    ]
    for table, _ in parts:
        table.weight.data[0] = 0.0
    events = torch.cat([table.weight[ids] for table, ids in parts], 2).detach()
    places, found, click = search(query, parts, mask)
    assert places.shape == found.shape == (6, 3)
    for b in range(6):
        relevance = {
            t: float((search.event(events[b, t]) * search.query(query[b])).sum().detach())
            for t in range(5)
            if mask[b, t]
        }
        best = sorted(relevance, key=lambda t: -relevance[t])[:3]
        assert places[b][found[b]].tolist() == best
        assert found[b].tolist() == [True] * len(best) + [False] * (3 - len(best))
        pooled = sum((score * events[b, t] for t, score in relevance.items()), torch.zeros(5).double())
        wanted = search.click(torch.cat([pooled, query[b]]))
        torch.testing.assert_close(click[b], wanted[0], rtol=1e-9, atol=1e-12)


def test_soft_sim_attends_to_what_it_found_and_to_the_latest(make_model, make_batch):
    """The same weights as a SIM that is handed the events that the search unit finds."""
    soft, handed = make_model("sim-soft").eval(), make_model("sim").eval()
    handed.load_state_dict({k: v for k, v in soft.state_dict().items() if not k.startswith("search.")})
    batch = make_batch(16, 7)
    _, query = soft.embeddings.sample(batch)
    places, found, _ = soft.search(query, soft.embeddings.parts(batch, "recent"), batch["recent_mask"])
    other = {name: value for name, value in batch.items() if not name.startswith("retrieved")}
    for what in ("rating", "interval"):
        other[f"retrieved_{what}"] = batch[f"recent_{what}"].gather(1, places)
    index = places[..., None].expand(-1, -1, 3)
    other["retrieved_item"] = batch["recent_item"].gather(1, index)
    other["retrieved_mask"], other["retrieved_rank"] = found, torch.arange(1, 4).expand(16, 3)
    for what in ("item", "rating", "interval", "mask"):
        other[f"recent_{what}"] = batch[f"recent_{what}"][:, -2:]
    torch.testing.assert_close(soft(batch)[0], handed(other)[0])
    assert found.all(1).any()
    assert not found.all()


def test_the_search_unit_learns_by_its_own_loss_alone(make_model, make_batch):
    model = make_model("sim-soft")
    batch = make_batch(32, 7)
    logit, _ = model(batch)
    functional.binary_cross_entropy_with_logits(logit, batch["label"]).backward()
    assert all(value.grad is None for value in model.search.parameters())
    torch.manual_seed(1)
    model(batch)
    regularizer = model.config.l2 * model.embeddings.l2(batch)
    click = model._click
    whole = model.l2(batch)
    wanted = functional.binary_cross_entropy_with_logits(click, batch["label"])
    torch.testing.assert_close(whole - regularizer, wanted)
    whole.backward()
    assert all(value.grad.any() for value in model.search.parameters())
    # It is of the latest forward pass: nothing of it is left behind.
    torch.testing.assert_close(model.l2(batch), regularizer)
    model.eval()(batch)
    torch.testing.assert_close(model.l2(batch), regularizer)
