"""Pretraining text: what is told, what is learned of it, and how it is packed."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from recllm.eventlog.statistics import LEVELS as LEVELS_OF_A_COLUMN
from recllm.lm.tiny import TinyConfig, train_tokenizer
from recllm.text import documents
from recllm.text.prompts import Pieces, Prompts, Wording

TITLES = [None, None, "Toy Story (1995)", "Dr. No (1962)", "Heat (1995)"]
DESCRIPTIONS = ["", "", "Toy Story (1995) [Comedy]", "Dr. No (1962) [Action]", "Heat (1995) [Crime]"]
PROFILES = ["", "", "A woman.\n", "A man.\n"]
LEVELS = ["1", "2", "3", "4", "5"]
INTRO = Wording().intro
ALL = np.ones(5, bool)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [*Wording().names(TITLES), *DESCRIPTIONS, *PROFILES]
    return train_tokenizer(TinyConfig(), Wording(), LEVELS, texts, [0, 0, 9, 4, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1])


@pytest.fixture(scope="module")
def pieces(tokenizer):
    return Pieces.build(tokenizer, Wording(), TITLES, LEVELS, PROFILES, descriptions=DESCRIPTIONS)


@pytest.fixture
def log():
    return SimpleNamespace(
        user=np.array([2, 2, 2, 3, 3]), item=np.array([2, 3, 4, 4, 2]), rating=np.array([5, 4, 1, 2, 3]),
        label=np.array([1, 1, 0, 0, 0]),
    )  # fmt: skip


def read(tokenizer, pieces, matrix):
    texts = pieces.assemble(matrix)
    return [tokenizer.decode(texts[number].tolist()) for number in range(len(texts))]


def test_descriptions(tokenizer, pieces):
    texts = read(tokenizer, pieces, documents.descriptions(pieces, np.array([2, 4])))
    assert texts == ["<s>Toy Story (1995) [Comedy]</s>", "<s>Heat (1995) [Crime]</s>"]


def test_timelines_tell_given_rows_once_in_order(tokenizer, pieces, log):
    told = documents.timelines(log, pieces, np.array([4, 0, 2, 1]), length=2)
    assert read(tokenizer, pieces, told) == [
        f"<s>A woman.\n{INTRO}Toy Story (1995) (5 stars)\nDr. No (1962) (4 stars)\n</s>",
        f"<s>A woman.\n{INTRO}Heat (1995) (1 stars)\n</s>",
        f"<s>A man.\n{INTRO}Toy Story (1995) (3 stars)\n</s>",
    ]
    assert documents.timelines(log, pieces, np.array([], np.int64), length=2).shape == (0, 8)


def test_questions_rated_and_next_titles(tokenizer, pieces, log):
    prompts = Prompts(log, pieces, 100)
    rows, history = np.array([2, 1]), np.array([[0, 1], [-1, 0]])
    start = f"<s>A woman.\n{INTRO}Toy Story (1995) (5 stars)\n"
    asked = "Will the user like this film?\n"
    assert read(tokenizer, pieces, documents.questions(prompts, rows, history, ALL)) == [
        f"{start}Dr. No (1962) (4 stars)\n{asked}Heat (1995)\nAnswer yes or no: No</s>",
        f"{start}{asked}Dr. No (1962)\nAnswer yes or no: Yes</s>",
    ]
    assert read(tokenizer, pieces, documents.rated(prompts, rows, history, ALL)) == [
        f"{start}Dr. No (1962) (4 stars)\nHeat (1995) (1 stars)\n</s>",
        f"{start}Dr. No (1962) (4 stars)\n</s>",
    ]
    assert read(tokenizer, pieces, documents.next_titles(prompts, rows, history, ALL))[1] == (
        f"{start}The next film that the user will like:\nDr. No (1962)</s>"
    )
    told = np.array([True, False, True, True, True])  # Dr. No is not told of in a history
    assert read(tokenizer, pieces, documents.rated(prompts, rows[:1], history[:1], told)) == [
        f"{start}Heat (1995) (1 stars)\n</s>"
    ]
    for make in (documents.questions, documents.next_titles):
        assert "Dr. No" not in read(tokenizer, pieces, make(prompts, rows[:1], history[:1], told))[0]


def test_statistics_stand_between_the_title_and_its_rating(pieces, log):
    """As in a question behind the title; the history goes without."""
    rows, history = np.array([2, 1]), np.array([[0, 1], [-1, 0]])
    prompts = Prompts(log, pieces, 100)
    plain = documents.rated(prompts, rows, history, ALL)
    prompts.pieces = replace(
        pieces,
        statistics_sentence=(
            (0, np.full(LEVELS_OF_A_COLUMN, pieces.next)),
            (2, np.arange(LEVELS_OF_A_COLUMN)),
        ),
    )
    prompts.statistics = lambda rows, items: np.stack([rows, rows, items + 10], 1)
    told = documents.rated(prompts, rows, history, ALL)
    assert told[:, -4:-2].tolist() == [[pieces.next, 14], [pieces.next, 13]]
    assert np.delete(told, [-4, -3], axis=1).tolist() == plain.tolist()
    for question, rating in zip(documents.questions(prompts, rows, history, ALL), told, strict=True):
        place = question.tolist().index(pieces.question)
        assert question[place + 1 : place + 4].tolist() == rating[-5:-2].tolist()


def test_timelines_say_statistics_between_title_and_rating_too(pieces, log):
    rows = np.array([4, 0, 2, 1])
    plain = documents.timelines(log, pieces, rows, 2)

    def sentence(rows, items):
        return np.stack([rows + 100, items + 200], 1)

    told = documents.timelines(log, pieces, rows, 2, sentence)
    middle = told[:, 3:-1].reshape(len(told), 2, 4)
    # Events 0 and 1; event 2 alone; event 4 alone: the second place of the latter two is empty.
    items = log.item
    assert middle[:, :, 1:3].tolist() == [
        [[100, items[0] + 200], [101, items[1] + 200]],
        [[102, items[2] + 200], [0, 0]],
        [[104, items[4] + 200], [0, 0]],
    ]
    assert middle[:, :, [0, 3]].reshape(len(told), 4).tolist() == plain[:, 3:-1].tolist()


def test_packing_keeps_every_document_whole_and_weighs_opinions(tokenizer, pieces, log):
    prompts = Prompts(log, pieces, 100)
    matrices = [
        documents.descriptions(pieces, np.array([2, 3, 4])),
        documents.questions(prompts, np.array([2, 1]), np.array([[0, 1], [-1, 0]]), ALL),
    ]
    blocks, weights = documents.pack(pieces, matrices, 16, np.random.default_rng(0), label_weight=4)
    assert blocks.dtype == np.int32
    assert blocks.shape == weights.shape
    total = sum(len(pieces.assemble(matrix).tokens) for matrix in matrices)
    assert blocks.shape == (-(-total // 16), 16)
    wanted = sorted(text for matrix in matrices for text in read(tokenizer, pieces, matrix))
    stream = tokenizer.decode(blocks.ravel()[:total].tolist())
    assert sorted("<s>" + text for text in stream.split("<s>")[1:]) == wanted
    assert (weights.ravel()[total:] == 0).all()
    # By token: stars and answers 4, the template, profile and BOS 0, titles and EOS 1.
    by_text = {
        tokenizer.decode([t]): w
        for t, w in zip(blocks.ravel()[:total].tolist(), weights.ravel()[:total], strict=True)
    }
    assert {by_text[text] for text in (" Yes", " No", " (5 stars)\n", " (4 stars)\n")} == {4.0}
    assert {by_text[text] for text in ("<s>", INTRO, "\nAnswer yes or no:")} == {0.0}
    assert by_text["</s>"] == 1.0
    # 2 answers, 3 ratings in the histories.
    assert (weights == 4).sum() == 5
    # Titles of the questions' histories may count for nothing: of weight 1 are the descriptions' but BOS.
    unlearnt = documents.pack(pieces, matrices, 16, np.random.default_rng(0), 4, (1.0, 0.0))[1]
    assert (unlearnt == 4).sum() == 5
    assert (unlearnt == 1).sum() == pieces.lengths[matrices[0]].sum() - 3


def test_packing_is_a_function_of_the_generator(pieces):
    matrix = documents.descriptions(pieces, np.array([2, 3, 4] * 5))
    same = [documents.pack(pieces, [matrix], 8, np.random.default_rng(seed))[0] for seed in (0, 0, 1)]
    assert np.array_equal(same[0], same[1])
    assert not np.array_equal(same[0], same[2])
