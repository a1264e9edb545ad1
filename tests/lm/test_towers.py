"""Two towers: padding, distinct items, what each side reads, learning, and the way to disk and back."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recllm.lm.config import TinyConfig, TowersConfig
from recllm.lm.encoder import add_mask_token, build_encoder
from recllm.lm.tasks import TowerPairs, sort_by_length
from recllm.lm.towers import TwoTowers, tower_scores
from recllm.metrics import auc
from recllm.text.collate import Ragged, pad_right
from recllm.text.prompts import Prompts

SMALL = TinyConfig(hidden=16, layers=2, heads=2, intermediate=24, context=256)


def towers_of(vocabulary_of, config=None, seed=0):
    torch.manual_seed(seed)
    model = TwoTowers(build_encoder(SMALL, vocabulary_of).base_model, config or TowersConfig(hidden=8))
    with torch.no_grad():  # as drawn, all states are nearly alike
        for value in model.encoder.parameters():
            if value.ndim > 1:
                value.mul_(10)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_lm.tokenizer.save_pretrained(folder)
    return add_mask_token(type(tiny_lm.tokenizer).from_pretrained(folder), SMALL.context)


@pytest.fixture(scope="module")
def rows(demo_log):
    return demo_log.rows("train", "uniform50")


@pytest.fixture(scope="module")
def prompts(demo_log, tiny_lm):
    return Prompts(demo_log, tiny_lm.pieces, SMALL.context)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_padding_has_no_part_in_a_vector(tokenizer, pooling):
    model = towers_of(tokenizer, TowersConfig(pooling=pooling, hidden=8))
    texts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14]]
    with torch.no_grad():
        together = model.encode(pad_right(Ragged.from_lists(texts), tokenizer.pad_token_id))
        alone = [model.encode(pad_right(Ragged.from_lists([ids]))) for ids in texts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_a_distinct_item_is_read_once_and_the_logits_are_those_of_pairs(demo_log, prompts, tokenizer, rows):
    model, pad = towers_of(tokenizer), tokenizer.pad_token_id
    history = demo_log.recent(rows, 5)
    lists = np.random.default_rng(0).choice(np.unique(demo_log.item[rows]), (50, 7)).astype(np.int32)
    read = []
    hook = model.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    own = tower_scores(model, prompts, pad, rows, history, size=16)
    assert sum(read) == len(rows) + len(np.unique(demo_log.item[rows]))
    read.clear()
    listed = tower_scores(model, prompts, pad, rows, history, lists, size=16)
    assert sum(read) == len(rows) + len(np.unique(lists))
    hook.remove()
    assert (own.shape, listed.shape) == ((50,), (50, 7))
    pairs, (ordered, _) = (
        TowerPairs(prompts, rows, history, pad),
        sort_by_length(TowerPairs(prompts, rows, history, pad)),
    )
    order = np.argsort(pairs.lengths(), kind="stable")
    batch = ordered(np.arange(50))
    assert len(batch["item"]["input_ids"]) == len(np.unique(demo_log.item[rows])) < 50
    with torch.no_grad():
        trained = model(model.encode(batch["user"]), model.encode(batch["item"])[batch["pair"]])
        np.testing.assert_allclose(trained, own[order], rtol=1e-4, atol=1e-5)
        for n in range(0, 50, 10):
            user = model.encode(pad_right(prompts.users(rows[n : n + 1], history[n : n + 1])))
            for items, wanted in ((demo_log.item[rows[n : n + 1]], own[n : n + 1]), (lists[n], listed[n])):
                one = [model(user, model.encode(pad_right(prompts.items([item])))) for item in items]
                np.testing.assert_allclose(torch.cat(one), wanted, rtol=1e-4, atol=1e-5)
    assert listed.std() > 1e-3


def test_texts_by_hand_and_a_users_text_knows_nothing_of_the_target(demo_log, tiny_lm, prompts, rows):
    pieces, decode = tiny_lm.pieces, tiny_lm.tokenizer.decode
    row = rows[demo_log.recent(rows, 3).min(1) >= 0][:1]
    history = demo_log.recent(row, 3)
    users = prompts.users(row, history)
    table = [pieces.head, pieces.profile[demo_log.user[row[0]]], pieces.intro]
    for event in history[0]:
        table += [pieces.item[demo_log.item[event]], pieces.rating[demo_log.rating[event]]]
    assert users[0].tolist() == [token for piece in [*table, pieces.eos] for token in pieces.table[piece]]
    item = demo_log.item[row[0]]
    text = decode(prompts.items([item])[0].tolist(), clean_up_tokenization_spaces=False)
    name, description = (
        decode(pieces.table[part[item]].tolist()) for part in (pieces.item, pieces.description)
    )
    assert text == f"<s>{name}{description}</s>"
    assert "Genre:" in description
    other = copy.copy(demo_log)
    other.item = np.array(demo_log.item)
    other.item[row] += 1
    again = Prompts(other, pieces, SMALL.context).users(row, other.recent(row, 3))
    np.testing.assert_array_equal(again.tokens, users.tokens)


def test_a_long_history_loses_its_oldest_events_and_a_long_item_is_refused(demo_log, tiny_lm, rows):
    pieces = tiny_lm.pieces
    history = demo_log.recent(rows, 10)
    whole = Prompts(demo_log, pieces, 256).users(rows, history)
    limit = int(whole.lengths.max()) - 1
    cut = Prompts(demo_log, pieces, limit).users(rows, history)
    assert cut.cut.sum() == (whole.lengths > limit).sum() >= 1
    assert cut.lengths.max() <= limit
    items = np.unique(demo_log.item[rows])
    longest = int(Prompts(demo_log, pieces, 256).items(items).lengths.max())
    Prompts(demo_log, pieces, longest).items(items)
    with pytest.raises(ValueError, match=rf"{longest} tokens, {longest - 1} are free"):
        Prompts(demo_log, pieces, longest - 1).items(items)


def test_saved_and_loaded_scores_the_same_to_the_bit(demo_log, prompts, tokenizer, rows, tmp_path):
    model, pad = towers_of(tokenizer, TowersConfig(pooling="first", hidden=5)), tokenizer.pad_token_id
    model.save(tmp_path, tokenizer, 77)
    again, reloaded, context = TwoTowers.load(tmp_path)
    assert (reloaded.pad_token_id, context, again.training) == (pad, 77, False)
    history = demo_log.recent(rows, 5)
    np.testing.assert_array_equal(
        tower_scores(again, prompts, pad, rows, history), tower_scores(model, prompts, pad, rows, history)
    )


def test_learns_which_users_like_which_items(tokenizer):
    """Planted: the token that tells users apart must match that of items; neither alone says anything."""
    torch.manual_seed(0)
    model = TwoTowers(build_encoder(SMALL, tokenizer).base_model, TowersConfig(hidden=16)).train()
    rng = np.random.default_rng(0)

    def texts(kind, first):
        noise = rng.integers(30, 60, (len(kind), 3))
        return pad_right(
            Ragged.from_lists([[1, first + k, *row] for k, row in zip(kind, noise.tolist(), strict=True)])
        )

    def drawn(count):
        kinds = rng.integers(0, 2, (2, count))
        return texts(kinds[0], 10), texts(kinds[1], 20), torch.tensor(kinds[0] == kinds[1]).float()

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        users, items, label = drawn(64)
        loss = F.binary_cross_entropy_with_logits(model(model.encode(users), model.encode(items)), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    users, items, label = drawn(400)
    with torch.no_grad():
        logits = model.eval()(model.encode(users), model.encode(items))
    assert auc(logits.numpy(), label.numpy()) > 0.97
