"""Pretraining text: what is told, what is learned of it, and how it is packed."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from recllm.data.prompts import Pieces, Prompts, Wording
from recllm.data.statistics import LEVELS as LEVELS_OF_A_COLUMN
from recllm.lm import documents
from recllm.lm.tiny import TinyConfig, train_tokenizer

TITLES = [None, None, "Toy Story (1995)", "Dr. No (1962)", "Heat (1995)"]
CARDS = ["", "", "Toy Story (1995) [Comedy]", "Dr. No (1962) [Action]", "Heat (1995) [Crime]"]
PROFILES = ["", "", "A woman.\n", "A man.\n"]
LEVELS = ["1", "2", "3", "4", "5"]
INTRO = Wording().intro


@pytest.fixture(scope="module")
def tokenizer():
    texts = [*Wording().names(TITLES), *CARDS, *PROFILES]
    return train_tokenizer(TinyConfig(), Wording(), LEVELS, texts, [0, 0, 9, 4, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1])


@pytest.fixture(scope="module")
def pieces(tokenizer):
    return Pieces.build(tokenizer, Wording(), TITLES, LEVELS, PROFILES, cards=CARDS)


@pytest.fixture
def log():
    return SimpleNamespace(
        user=np.array([2, 2, 2, 3, 3]), item=np.array([2, 3, 4, 4, 2]), rating=np.array([5, 4, 1, 2, 3]),
        label=np.array([1, 1, 0, 0, 0]), train_events=lambda: np.ones(5, bool),
    )  # fmt: skip


def read(tokenizer, pieces, matrix):
    texts = pieces.assemble(matrix)
    return [tokenizer.decode(texts[number].tolist()) for number in range(len(texts))]


def test_cards(tokenizer, pieces):
    texts = read(tokenizer, pieces, documents.cards(pieces, np.array([2, 4])))
    assert texts == ["<s>Toy Story (1995) [Comedy]</s>", "<s>Heat (1995) [Crime]</s>"]


def test_timelines_tell_given_rows_once_in_order(tokenizer, pieces, log):
    told = documents.timelines(log, pieces, np.array([4, 0, 2, 1]), length=2)
    assert read(tokenizer, pieces, told) == [
        f"<s>A woman.\n{INTRO}Toy Story (1995) (5 stars)\nDr. No (1962) (4 stars)\n</s>",
        f"<s>A woman.\n{INTRO}Heat (1995) (1 stars)\n</s>",
        f"<s>A man.\n{INTRO}Toy Story (1995) (3 stars)\n</s>",
    ]
    unrated = documents.timelines(log, pieces, np.array([0, 1]), length=2, ratings=False)
    assert read(tokenizer, pieces, unrated) == [f"<s>A woman.\n{INTRO}Toy Story (1995)\nDr. No (1962)\n</s>"]
    assert documents.timelines(log, pieces, np.array([], np.int64), length=2).shape == (0, 8)


def test_questions_rated_and_next_titles(tokenizer, pieces, log):
    prompts = Prompts(log, pieces, 100)
    rows, history = np.array([2, 1]), np.array([[0, 1], [-1, 0]])
    start = f"<s>A woman.\n{INTRO}Toy Story (1995) (5 stars)\n"
    asked = "Will the user like this film?\n"
    assert read(tokenizer, pieces, documents.questions(prompts, rows, history)) == [
        f"{start}Dr. No (1962) (4 stars)\n{asked}Heat (1995)\nAnswer yes or no: No</s>",
        f"{start}{asked}Dr. No (1962)\nAnswer yes or no: Yes</s>",
    ]
    assert read(tokenizer, pieces, documents.rated(prompts, rows, history)) == [
        f"{start}Dr. No (1962) (4 stars)\nHeat (1995) (1 stars)\n</s>",
        f"{start}Dr. No (1962) (4 stars)\n</s>",
    ]
    assert read(tokenizer, pieces, documents.next_titles(prompts, rows, history))[1] == (
        f"{start}The next film that the user will like:\nDr. No (1962)</s>"
    )


def test_statistics_stand_between_the_title_and_its_rating(pieces, log):
    """As in a question behind the title; the history goes without."""
    rows, history = np.array([2, 1]), np.array([[0, 1], [-1, 0]])
    prompts = Prompts(log, pieces, 100)
    plain = documents.rated(prompts, rows, history)
    prompts.pieces = replace(
        pieces, known=((0, np.full(LEVELS_OF_A_COLUMN, pieces.next)), (2, np.arange(LEVELS_OF_A_COLUMN)))
    )
    prompts.statistics = lambda rows, items: np.stack([rows, rows, items + 10], 1)
    told = documents.rated(prompts, rows, history)
    assert told[:, -4:-2].tolist() == [[pieces.next, 14], [pieces.next, 13]]
    assert np.delete(told, [-4, -3], axis=1).tolist() == plain.tolist()
    for question, rating in zip(documents.questions(prompts, rows, history), told, strict=True):
        place = question.tolist().index(pieces.question)
        assert question[place + 1 : place + 4].tolist() == rating[-5:-2].tolist()


def test_text_weighs_opinions_and_names(tokenizer, pieces, log):
    prompts = Prompts(log, pieces, 100)
    matrices = [
        documents.cards(pieces, np.array([2, 3, 4])),
        documents.questions(prompts, np.array([2, 1]), np.array([[0, 1], [-1, 0]])),
    ]
    text = documents.Text.of(pieces, matrices, 100, label_weight=4, title_weights=(1, 0))
    assert [tokenizer.decode(text.tokens[n].tolist()) for n in range(5)] == [
        document for matrix in matrices for document in read(tokenizer, pieces, matrix)
    ]
    cards = text.tokens.offsets[3]
    of_cards, of_questions = text.weights[:cards], text.weights[cards:]
    # Of a card everything but BOS; of the questions 2 answers and 3 ratings in the histories.
    assert of_cards.tolist() == (text.tokens.tokens[:cards] != tokenizer.bos_token_id).astype(float).tolist()
    assert set(of_questions.tolist()) == {0.0, 4.0}
    scored = text.tokens.tokens[cards:][of_questions == 4].tolist()
    assert sorted(map(tokenizer.decode, scored)) == [
        " (4 stars)\n", " (5 stars)\n", " (5 stars)\n", " No", " Yes"
    ]  # fmt: skip
    assert text.weight(np.array([3, 4])) == 20.0
    assert text.weight(np.array([0])) == len(text.tokens[0]) - 1
    named = documents.Text.of(pieces, matrices, 100)
    assert (named.weights[cards:] == 1).sum() > 2
    assert len(documents.Text.of(pieces, [matrices[0][:0]], 8)) == 0


def test_a_batch_is_padded_and_its_padding_weighs_nothing(pieces):
    text = documents.Text.of(pieces, [documents.cards(pieces, np.array([2, 3, 4]))], 100)
    batch = text.batch(np.array([2, 0]))
    assert batch["ids"].shape == batch["weights"].shape == (2, text.tokens.lengths[[0, 2]].max())
    for row, number in enumerate((2, 0)):
        real = len(text.tokens[number])
        assert batch["ids"][row, :real].tolist() == text.tokens[number].tolist()
        assert batch["weights"][row, real:].sum() == 0
        assert batch["weights"][row, 1:].sum() == text.weight(np.array([number]))


def test_a_document_longer_than_the_context_goes_on_in_another(pieces):
    matrix = documents.cards(pieces, np.array([2, 3, 4]))
    whole = documents.Text.of(pieces, [matrix], 100)
    for longest in (3, 5, int(whole.tokens.lengths.max())):
        parts = documents.Text.of(pieces, [matrix], longest)
        assert len(parts) == np.ceil(whole.tokens.lengths / longest).sum()
        assert parts.tokens.lengths.max() == longest
        assert np.array_equal(parts.tokens.tokens, whole.tokens.tokens)
        assert set(whole.tokens.offsets) <= set(parts.tokens.offsets)
