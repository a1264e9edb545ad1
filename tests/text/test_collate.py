"""Padded batches: where every token of prompts and titles stands, by hand and read back."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recllm.text.collate import Ragged, pad_left, pad_right, separate, shared_prefix


def test_pad_left_by_hand():
    batch = pad_left(Ragged.from_lists([[5, 6, 7], [8]]), pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


def test_pad_right_by_hand():
    batch = pad_right(Ragged.from_lists([[5, 6, 7], [], [8]]), pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 9, 9], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]


def test_shared_prefix_by_hand():
    # Row 0: prompt 1 2, titles (3 E) and (3 4 E); row 1: prompts 5 and 6 7, each with titles (E) and (8 E).
    # E = 9 is never fed; both short samples fit into five places, the longer one comes first.
    prompts, titles = [[1, 2], [5], [6, 7]], [[3, 9], [3, 4, 9], [9], [8, 9], [9], [8, 9]]
    batch = shared_prefix(Ragged.from_lists(prompts), Ragged.from_lists(titles), 2)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 3, 4], [6, 7, 8, 5, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2, 3], [0, 1, 2, 0, 1]]
    assert batch["slot"].tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]
    assert batch["branch"].tolist() == [[0, 0, 1, 2, 2], [0, 0, 2, 0, 2]]
    assert batch["sample"].tolist() == [[0, 0], [2, 1]]
    assert batch["target"].tolist() == [3, 9, 3, 4, 9, 9, 8, 9, 9, 8, 9]
    assert batch["predict_row"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert batch["predict_position"].tolist() == [1, 2, 1, 3, 4, 3, 3, 4, 1, 1, 2]
    assert batch["cell"].tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 4, 5, 5]
    assert batch["present"].tolist() == [[True, True]] * 3


def test_samples_that_fit_nowhere_keep_a_row_each():
    batch = shared_prefix(
        Ragged.from_lists([[1], [1, 2], [1, 2, 3]]), Ragged.from_lists([[4, 5, 9], [5, 9], [9]]), 1
    )
    assert batch["input_ids"].tolist() == [[1, 4, 5], [1, 2, 5], [1, 2, 3]]
    assert batch["sample"].tolist() == [[0], [1], [2]]


def test_unequal_numbers_of_titles():
    batch = shared_prefix(
        Ragged.from_lists([[1], [2]]), Ragged.from_lists([[3, 9], [4, 9], [5, 6, 9]]), np.array([2, 1])
    )
    assert batch["input_ids"].tolist() == [[1, 3, 4], [2, 5, 6]]
    assert batch["present"].tolist() == [[True, True], [True, False]]
    assert batch["cell"].tolist() == [0, 0, 1, 1, 2, 2, 2]
    none = shared_prefix(Ragged.from_lists([[1], [2]]), Ragged.from_lists([[3, 9]]), np.array([0, 1]))
    assert none["present"].tolist() == [[False], [True]]
    assert none["input_ids"].tolist() == [[1, 0], [2, 3]]


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 5), min_size=0, max_size=4)),
        min_size=1,
        max_size=12,
    )
)
def test_every_token_is_where_the_layout_says(samples):
    """Read back from the padded rows, every prompt and title is what it was, and no row is too long."""
    fresh = itertools.count(1)
    prompts = [[next(fresh) for _ in range(length)] for length, _ in samples]
    titles = [[[next(fresh) for _ in range(length)] for length in lengths] for _, lengths in samples]
    flat = Ragged.from_lists([title for own in titles for title in own])
    counts = np.array([len(own) for own in titles])
    batch = shared_prefix(Ragged.from_lists(prompts), flat, counts)
    longest = max(
        len(p) + sum(len(title) - 1 for title in own) for p, own in zip(prompts, titles, strict=True)
    )
    assert batch["input_ids"].shape[1] == longest
    place = {int(sample): (row, slot) for row, own in enumerate(batch["sample"]) for slot, sample in
             enumerate(own) if (batch["slot"][row] == slot).any()}  # fmt: skip
    assert sorted(place) == list(range(len(samples)))
    for sample, (prompt, own) in enumerate(zip(prompts, titles, strict=True)):
        row, slot = place[sample]
        for branch, tokens in enumerate([prompt, *(title[:-1] for title in own)]):
            mine = (batch["slot"][row] == slot) & (batch["branch"][row] == branch)
            assert batch["input_ids"][row][mine].tolist() == tokens
            start = len(prompt) if branch else 0
            assert batch["position_ids"][row][mine].tolist() == list(range(start, start + len(tokens)))
    # What predicts a token is the token before it, of its own title or the prompt's last.
    alone = separate(Ragged.from_lists(prompts), flat, counts)
    for layout in (batch, alone):
        before = layout["input_ids"][layout["predict_row"], layout["predict_position"]].tolist()
        wanted = [token for p, own in zip(prompts, titles, strict=True) for title in own
                  for token in [p[-1], *title[:-1]]]  # fmt: skip
        assert before == wanted
    assert torch.equal(batch["target"], alone["target"])
    assert torch.equal(batch["cell"], alone["cell"])


def test_separate_titles_by_hand():
    batch = separate(
        Ragged.from_lists([[1, 2], [5]]), Ragged.from_lists([[3, 9], [9], [6, 7, 9]]), np.array([2, 1])
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 2, 0], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert batch["branch"].tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 1]]
    assert batch["predict_row"].tolist() == [0, 0, 1, 2, 2, 2]
    assert batch["predict_position"].tolist() == [1, 2, 1, 0, 1, 2]
    assert batch["sample"].tolist() == [[0], [0], [1]]
    assert batch["cell"].tolist() == [0, 0, 1, 2, 2, 2]
    assert "position_ids" not in batch


@pytest.mark.parametrize("layout", [shared_prefix, separate])
def test_wrong_counts_and_empty_completions_are_refused(layout):
    with pytest.raises(ValueError, match="want 2: pass all"):
        layout(Ragged.from_lists([[1]]), Ragged.from_lists([[2]]), 2)
    with pytest.raises(ValueError, match="empty"):
        layout(Ragged.from_lists([[1]]), Ragged.from_lists([[2], []]), 2)
