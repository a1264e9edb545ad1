"""The retriever: literal formula, causality, what it reads of the request, and its training sequences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from recllm.crm.retriever import SECONDS, Rotation, rotate
from recllm.crm.sequences import Sequences
from tests.crm.contract import ModelContract

READS = ("recent_item", "recent_rating", "recent_elapsed")


class TestRetriever(ModelContract):
    variant = "retriever"
    reads = READS


class TestRetrieverHstu(ModelContract):
    variant = "retriever-hstu"
    reads = READS


class TestRetrieverText(ModelContract):
    variant = "retriever-text"
    reads = ("recent_dense", "recent_rating", "recent_elapsed")

    @pytest.fixture
    def make_model(self, make_model):
        """With random texts, of all items but the last five."""

        def make(*arguments, **settings):
            model = make_model(*arguments, **settings)
            generator = torch.Generator().manual_seed(5)
            texts = torch.randn(40, 6, generator=generator)
            model.set_texts(texts, torch.arange(40) < 35)
            return model

        return make

    def test_an_item_without_an_event_has_the_unknown_one_s_vector_and_its_text(self, make_model):
        model = make_model(self.variant).eval()
        vectors = model.item_vectors(torch.tensor([3, 37]))
        texts = model.text(model.texts[[3, 37]])
        torch.testing.assert_close(vectors[0], model.item.weight[3] + texts[0])
        torch.testing.assert_close(vectors[1], model.item.weight[1] + texts[1])


def literal_angle(model, place, second):
    """Angle of each pair of columns of a head: the first half of the pairs by place, the others by time."""
    pairs = model.config.hidden // model.config.heads // 2
    by_place = pairs - pairs // 2
    angles = []
    for pair in range(pairs):
        low, high, index, count = 4.0, 1024.0, pair, by_place
        value = place
        if pair >= by_place:
            low, high, index, count = 60.0, 4 * 365 * 86400.0, pair - by_place, pairs - by_place
            value = second
        period = low * (high / low) ** (index / (count - 1)) if count > 1 else low
        angles.append(2 * math.pi * value / period)
    return angles


def turned(vector, angles):
    """A head's columns turned in pairs."""
    out = torch.empty_like(vector)
    for pair, angle in enumerate(angles):
        x, y = vector[2 * pair], vector[2 * pair + 1]
        out[2 * pair] = x * math.cos(angle) - y * math.sin(angle)
        out[2 * pair + 1] = x * math.sin(angle) + y * math.cos(angle)
    return out


def literal_attention(model, query, key, value, seconds, hstu):
    """Attention over one history [T, width], position by position."""
    heads = model.config.heads
    width = query.shape[1] // heads
    found = torch.zeros_like(query)
    for t in range(len(query)):
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            asks = turned(query[t, part], literal_angle(model, t, seconds[t + 1]))
            scores = []
            for s in range(t + 1):
                lies = turned(key[s, part], literal_angle(model, s, seconds[s]))
                scores.append((asks @ lies).item())
            if hstu:
                weights = [score / (1 + math.exp(-score)) / (t + 1) for score in scores]
            else:
                raised = [math.exp(score / math.sqrt(width)) for score in scores]
                weights = [score / sum(raised) for score in raised]
            for s, weight in enumerate(weights):
                found[t, part] += weight * value[s, part]
    return found


def literal_states(model, items, ratings, seconds):
    """The file's formula on one history without padding."""
    silu = torch.nn.functional.silu
    gaps = [1 + int(math.log2(1 + later - first)) for first, later in itertools.pairwise(seconds)]
    tokens = model.item.weight[items] + model.rating.weight[ratings] + model.gap.weight[gaps]
    for block in model.blocks:
        if model.config.block == "hstu":
            gate, value, query, key = silu(block.parts(block.norm(tokens))).chunk(4, dim=1)
            found = literal_attention(model, query, key, value, seconds, hstu=True)
            tokens = tokens + block.join(block.attended_norm(found) * gate)
            continue
        query, key, value = block.query_key_value(block.norm(tokens)).chunk(3, dim=1)
        found = block.join(literal_attention(model, query, key, value, seconds, hstu=False))
        tokens = tokens + torch.sigmoid(block.attention_gate(tokens)) * found
        gate, up = block.up(block.feed_norm(tokens)).chunk(2, dim=1)
        tokens = tokens + torch.sigmoid(block.feed_gate(tokens)) * block.down(silu(gate) * up)
    return model.norm(tokens)


@pytest.mark.parametrize("variant", ["retriever", "retriever-hstu"])
def test_the_model_equals_its_formula(variant, make_model, make_batch):
    model = make_model(variant, embedding_std=1.0).double().eval()
    batch = make_batch(4, 5)
    logit, users = model(batch)
    for b in range(4):
        mask = batch["recent_mask"][b]
        items = batch["recent_item"][b, mask, 0]
        seconds = [-int(second) for second in batch["recent_elapsed"][b, mask]] + [0]
        states = literal_states(model, items, batch["recent_rating"][b, mask], seconds)
        # Angles are complex64: 2^-24 of a turn.
        torch.testing.assert_close(users[b], states[-1], rtol=1e-5, atol=1e-6)
        score = states[-1] @ model.item.weight[batch["item"][b, 0]]
        torch.testing.assert_close(logit[b], score, rtol=1e-5, atol=1e-5)


def test_a_rotation_tells_how_far_apart_not_where():
    rotation = Rotation(8, timed=True)
    one, other = torch.randn(2, 1, 1, 1, 8)
    near = torch.tensor([[1_000_000]])
    products = []
    for shift in (0, 977_000_000):
        asks = rotation(torch.tensor([7]), near + 3_600 + shift)
        lies = rotation(torch.tensor([4]), near + shift)
        products.append((rotate(one, asks) * rotate(other, lies)).sum())
    torch.testing.assert_close(products[1], products[0], rtol=1e-5, atol=1e-6)
    assert SECONDS[0] == 60.0


@pytest.mark.parametrize("variant", ["retriever", "retriever-hstu"])
def test_an_event_reads_nothing_behind_it_but_the_next_second(variant, make_model):
    model = make_model(variant).eval()
    items = torch.tensor([[5, 6, 7, 8]])
    ratings = torch.tensor([[1, 2, 3, 4]])
    seconds = torch.tensor([[0, 10, 200, 3_000, 40_000]])
    states = model.states(items, ratings, seconds)
    later = model.states(
        torch.tensor([[5, 6, 9, 9]]), torch.tensor([[1, 2, 1, 1]]), torch.tensor([[0, 10, 200, 201, 202]])
    )
    assert torch.equal(states[:, :2], later[:, :2])
    assert not torch.equal(states[:, 2], later[:, 2])
    asked = model.states(items, ratings, torch.tensor([[0, 10, 200, 3_000, 3_001]]))
    assert torch.equal(states[:, :3], asked[:, :3])
    assert not torch.equal(states[:, 3], asked[:, 3])


def test_without_query_time_only_the_order_counts(make_model, make_batch):
    model = make_model("retriever", query_time=False).eval()
    batch = make_batch(8, 6)
    other = {**batch, "recent_elapsed": batch["recent_elapsed"] * 3}
    assert torch.equal(model(batch)[0], model(other)[0])


class _Log:
    """As much of an event log as sequences read: users 2, 3 and 4 with 7, 1 and 3 training events."""

    def __init__(self):
        self.user = np.repeat([2, 3, 4], [8, 1, 3]).astype(np.int32)
        self.item = np.arange(10, 22, dtype=np.int32)
        self.rating = np.arange(12, dtype=np.int16)
        self.timestamp = np.arange(100, 112)
        self.item_fields = np.arange(30, dtype=np.int32)[:, None]
        self.n_events = 12

    def train_events(self):
        return np.arange(12) != 7  # user 2's last one is held out


def test_windows_find_every_training_event_but_the_first_once():
    sequences = Sequences(_Log(), 3, np.ones(12, bool))
    # User 2 reads 10 to 15 and finds 11 to 16 in windows of 3, user 3 finds nothing, user 4 finds 20 and 21.
    assert sequences.lengths.tolist() == [3, 3, 2]
    assert sequences.targets.tolist() == [3, 3, 2]
    batch = sequences(np.arange(3))
    assert batch["items"].tolist() == [[13, 14, 15], [10, 11, 12], [19, 20, 0]]
    assert batch["target"].tolist() == [[14, 15, 16], [11, 12, 13], [20, 21, 0]]
    assert batch["ratings"].tolist() == [[3, 4, 5], [0, 1, 2], [9, 10, 0]]
    assert batch["seconds"].tolist() == [[103, 104, 105, 106], [100, 101, 102, 103], [109, 110, 111, 111]]
    assert np.flatnonzero(sequences.counts()).tolist() == [11, 12, 13, 14, 15, 16, 20, 21]


def test_what_is_not_to_be_found_is_read_all_the_same():
    found = np.zeros(12, bool)
    found[[2, 11]] = True
    sequences = Sequences(_Log(), 3, found)
    batch = sequences(np.arange(len(sequences)))
    assert batch["items"].tolist() == [[10, 11, 12], [19, 20, 0]]
    assert batch["target"].tolist() == [[0, 12, 0], [0, 21, 0]]
    assert np.flatnonzero(sequences.counts()).tolist() == [12, 21]
