"""Prompts: the text that comes out, what is cut, and the batches made of it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from recllm.lm.tiny import TinyConfig, train_tokenizer
from recllm.text.prompts import Pieces, Prompts, Ragged, Wording, fill, resolve_answers

SHARED = Path(__file__).parents[3] / "shared"
TITLES = [
    None,
    None,
    "Toy Story (1995)",
    "Dr. No (1962)",
    "Heat (1995)",
    "Heat",
    "Do Not Disturb </s> (1965)",
]
PROFILES = ["", "", "The user is a woman.\n", "The user is a man.\n"]
LEVELS = ["1", "2", "3", "4", "5"]
WORDING = Wording()


def tokenizer_of(name: str):
    if name == "tiny":
        texts = [*WORDING.names(TITLES), *PROFILES]
        return train_tokenizer(TinyConfig(), WORDING, LEVELS, texts, [0, 0, 90, 40, 10, 5, 1, 0, 0, 1, 1])
    transformers = pytest.importorskip("transformers")
    path = SHARED / {"gpt2": "tokenizers/gpt2", "stories260k": "models/stories260k"}[name]
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    return transformers.AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module", params=["tiny", "gpt2", "stories260k"])
def tokenizer(request):
    return tokenizer_of(request.param)


@pytest.fixture(scope="module")
def pieces(tokenizer):
    return Pieces.build(tokenizer, WORDING, TITLES, LEVELS, PROFILES)


@pytest.fixture
def log():
    # Two users: rows 0-3 are user 2's, rows 4-5 user 3's. Code 0 is an event without a rating.
    return SimpleNamespace(
        user=np.array([2, 2, 2, 2, 3, 3]),
        item=np.array([2, 3, 4, 5, 6, 2]),
        rating=np.array([4, 5, 0, 1, 2, 3]),
        label=np.array([1, 1, 0, 0, 0, 0]),
    )


def text_of(tokenizer, tokens) -> str:
    text = tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)
    for special in {tokenizer.bos_token}:
        text = text.removeprefix(special)
    return text.removeprefix(" ")


def test_ctr_prompt_reads_as_written(tokenizer, pieces, log):
    prompts = Prompts(log, pieces, 1000).ctr(np.array([3, 5]), np.array([[0, 1, 2], [-1, -1, 4]]))
    shared, _, _ = resolve_answers(tokenizer, WORDING.ask, WORDING.yes, WORDING.no)
    begun = " " if shared else ""
    assert text_of(tokenizer, prompts[0]) == (
        "The user is a woman.\nThe user watched these films in this order, and rated them:\n"
        "Toy Story (1995) (4 stars)\nDr. No (1962) (5 stars)\nHeat (1995)\n"
        "Will the user like this film?\nHeat\nAnswer yes or no:" + begun
    )
    assert text_of(tokenizer, prompts[1]) == (
        "The user is a man.\nThe user watched these films in this order, and rated them:\n"
        "Do Not Disturb </s> (1965) (2 stars)\n"
        "Will the user like this film?\nToy Story (1995)\nAnswer yes or no:" + begun
    )
    assert not prompts.cut.any()
    # One BOS, at the start; a title that spells EOS does not hold it.
    assert all(prompts[row][0] == tokenizer.bos_token_id for row in (0, 1))
    assert np.sum(prompts.tokens == tokenizer.bos_token_id) == 2
    assert np.sum(prompts.tokens[1:] == tokenizer.eos_token_id) == (
        tokenizer.eos_token_id == tokenizer.bos_token_id
    )


def test_targets_replace_the_rows_own_items(pieces, log):
    prompts = Prompts(log, pieces, 1000)
    rows, history = np.array([3, 3]), np.array([[0, 1], [0, 1]])
    asked = prompts.ctr(rows, history, targets=np.array([5, 6]))
    own = prompts.ctr(rows, history)
    assert np.array_equal(asked[0], own[0])
    assert not np.array_equal(asked[1], own[1])


def test_ranking_prompt_and_completion_read_as_written(tokenizer, pieces, log):
    prompts = Prompts(log, pieces, 1000)
    history, candidates = np.array([[1]]), np.array([[4, 2]])
    plain = text_of(tokenizer, prompts.ranking(np.array([3]), history)[0])
    listed = text_of(tokenizer, prompts.ranking(np.array([3]), history, candidates)[0])
    start = (
        "The user is a woman.\nThe user watched these films in this order, and rated them:\n"
        "Dr. No (1962) (5 stars)\n"
    )
    assert plain == start + "The next film that the user will like:\n"
    assert listed == (
        start + "It is one of these films:\nHeat (1995)\nToy Story (1995)\n"
        "The next film that the user will like:\n"
    )
    completion = prompts.completions(np.array([4, 2]))[1]
    assert completion[-1] == tokenizer.eos_token_id
    assert text_of(tokenizer, completion[:-1]) == "Toy Story (1995)"


def test_descriptions_continue_the_title_or_stand_alone(tokenizer):
    descriptions = ["", "", "Toy Story (1995) [Comedy]", "A film with Bond", "", "", ""]
    pieces = Pieces.build(tokenizer, WORDING, TITLES, LEVELS, PROFILES, descriptions=descriptions)
    text = text_of(tokenizer, pieces.assemble(np.stack([pieces.item, pieces.description], 1))[2])
    assert text == "Toy Story (1995) [Comedy]"
    assert text_of(tokenizer, pieces.table[pieces.description[3]]) == "\nA film with Bond"


def test_equal_texts_are_one_piece(tokenizer):
    pieces = Pieces.build(tokenizer, WORDING, [None, "A", "B", "A"], LEVELS, ["x\n", "", "x\n"])
    assert pieces.item.tolist() == [0, pieces.item[1], pieces.item[2], pieces.item[1]]
    assert pieces.item[1] != pieces.item[2]
    assert pieces.profile[0] == pieces.profile[2]
    assert pieces.table[0].size == 0


def counted(lengths: dict[str, int]) -> Pieces:
    """Pieces whose tokens are all the piece's own number, with lengths by hand."""
    names = ["", "head", "intro", "question", "ask", "next", "choose", "newline", "suffix", "eos", "answer"]
    names += ["yes", "no", "a", "b", "c", "r", "profile"]
    table = Ragged.from_lists([[number] * lengths.get(name, 1) for number, name in enumerate(names)])
    at = {name: number for number, name in enumerate(names)}
    ids = lambda *which: np.array([at[name] for name in which], np.int32)  # noqa: E731
    fixed = {name: at[name] for name in names[1:13]}
    return Pieces(
        table=table, kind=np.zeros(len(names), np.int8), item=ids("", "", "a", "b", "c"),
        description=ids(*[""] * 5),
        rating=ids("newline", "r"), profile=ids("", "", "profile"), yes_id=0, no_id=0, **fixed,
    )  # fmt: skip


def test_cutting_drops_the_oldest_events_first_by_hand():
    # Fixed: head 1 + profile 1 + intro 1 + question 1 + target a 3 + ask 1 + suffix 0 + answer 0 = 8.
    # Events: a 3 + r 1 = 4, b 1 + 1 = 2, c 2 + 1 = 3; all of them: 8 + 9 = 17.
    pieces = counted({"": 0, "a": 3, "b": 1, "c": 2, "suffix": 0, "answer": 0})
    log = SimpleNamespace(user=np.array([2] * 4), item=np.array([2, 3, 4, 2]), rating=np.array([1] * 4))
    a, b, c, r = 13, 14, 15, 16
    rows, history = np.array([3]), np.array([[-1, 0, 1, 2]])
    wanted = {
        17: [a] * 3 + [r, b, r, c, c, r],
        16: [b, r, c, c, r],  # one too many: a goes whole, 13 are left
        13: [b, r, c, c, r],
        12: [c, c, r],
        11: [c, c, r],
        10: [],
        8: [],
    }
    for limit, events in wanted.items():
        prompt = Prompts(log, pieces, limit).ctr(rows, history)
        assert prompt[0].tolist() == [1, 17, 2, *events, 3, a, a, a, 4], limit
        assert prompt.cut.tolist() == [limit < 17]
    wanted = r"row 3 of the log, without history, has 8 tokens, 7 are free \(the title of its item has 3\)"
    with pytest.raises(ValueError, match=wanted):
        Prompts(log, pieces, 7).ctr(rows, history)


def test_ranking_keeps_room_for_the_completions_that_may_come():
    # Fixed: head 1 + profile 1 + intro 1 + next 1 = 4; the row's own completion a 3 + EOS 1 = 4.
    pieces = counted({"": 0, "a": 3, "b": 1, "c": 2, "suffix": 0, "answer": 0})
    log = SimpleNamespace(user=np.array([2] * 4), item=np.array([2, 3, 4, 2]), rating=np.array([1] * 4))
    rows, history = np.array([3]), np.array([[1, 2]])
    assert Prompts(log, pieces, 4 + 5 + 4).ranking(rows, history).lengths.tolist() == [9]
    assert Prompts(log, pieces, 4 + 5 + 3).ranking(rows, history).lengths.tolist() == [7]
    assert Prompts(log, pieces, 4 + 5 + 3).ranking(rows, history, reserve=3).lengths.tolist() == [9]
    # Each row by its own candidates: b and c need 3, a and b 4.
    both = Prompts(log, pieces, 4 + 5 + 3)
    room = both.room(np.array([[3, 4], [2, 3]]))
    assert room.tolist() == [3, 4]
    found = both.ranking(np.array([3, 3]), np.repeat(history, 2, 0), reserve=room)
    assert found.lengths.tolist() == [9, 7]
    assert found.cut.tolist() == [False, True]


def test_answers_differ_in_the_next_token(tokenizer):
    shared, yes, no = resolve_answers(tokenizer, WORDING.ask, " Yes", " No")
    assert yes != no
    for answer, token in ((" Yes", yes), (" No", no)):
        whole = tokenizer(WORDING.ask + answer, add_special_tokens=False)["input_ids"]
        asked = tokenizer(WORDING.ask, add_special_tokens=False)["input_ids"]
        assert whole[: len(asked) + len(shared) + 1] == [*asked, *shared, token]


def test_answers_that_share_a_beginning_move_it_into_the_prompt():
    tokenizer = tokenizer_of("gpt2")
    assert resolve_answers(tokenizer, "Answer:", " Yes", " No") == ([], 3363, 1400)
    shared, yes, no = resolve_answers(tokenizer, "Answer:", " I like it", " I hate it")
    assert tokenizer.decode(shared) == " I"
    assert tokenizer.decode([yes]) == " like"
    assert tokenizer.decode([no]) == " hate"


@pytest.mark.parametrize(("yes", "no"), [(" Yes", " Yes"), (" Yes", " Yes!"), (" No sir", " No")])
def test_answers_without_a_difference_are_refused(tokenizer, yes, no):
    with pytest.raises(ValueError, match="no token in which they differ"):
        resolve_answers(tokenizer, "Answer:", yes, no)


def test_an_answer_that_merges_with_the_question_is_refused():
    with pytest.raises(ValueError, match="merges"):
        resolve_answers(tokenizer_of("gpt2"), "Answer: Y", "es", "ellow")


def test_chat_markup_wraps_the_prompt(tokenizer, log):
    pieces = Pieces.build(tokenizer, WORDING, TITLES, LEVELS, PROFILES, prefix="USER: ", suffix=" ASSISTANT:")
    text = text_of(tokenizer, Prompts(log, pieces, 1000).ctr(np.array([1]), np.array([[0]]))[0])
    assert text.startswith("USER: The user is a woman.\n")
    assert text.rstrip(" ").endswith("Dr. No (1962)\nAnswer yes or no: ASSISTANT:")


def test_a_piece_that_merges_with_what_precedes_it_is_refused():
    with pytest.raises(ValueError, match="merges"):
        Pieces.build(tokenizer_of("gpt2"), WORDING, [None, None, "\nx"], LEVELS, ["", "", "\n\nA profile\n"])


def test_fill_reads_columns_and_leaves_placeholders_empty():
    users = pl.DataFrame({"user": [0, 1, 2], "gender": [None, None, "woman"], "age": [None, 3, 40]})
    assert fill("A {gender} of {age}.\n", users) == ["", "", "A woman of 40.\n"]
    assert fill("", users) == ["", "", ""]
    with pytest.raises(ValueError, match="job"):
        fill("{job}", users)


def test_no_rows_give_no_prompts(pieces, log):
    none = np.zeros(0, np.int64)
    prompts = Prompts(log, pieces, 100)
    assert len(prompts.ctr(none, np.zeros((0, 3), np.int64))) == 0
    assert len(prompts.ranking(none, np.zeros((0, 3), np.int64), np.zeros((0, 4), np.int64))) == 0
    # No history at all is allowed as well: k = 0.
    assert len(prompts.ctr(np.array([0]), np.zeros((1, 0), np.int64))) == 1


def test_statistics_are_said_behind_the_film(tokenizer):
    """User 2 has liked 2 of 3 films before row 3, and 1 of 2 has liked item 5, the first of its kind."""
    log = SimpleNamespace(
        user=np.array([2, 2, 2, 2, 3, 3]),
        item=np.array([2, 3, 4, 5, 5, 5]),
        rating=np.array([4, 5, 1, 4, 2, 3]),
        label=np.array([1, 1, 0, 1, 0, 1]),
        timestamp=np.array([1, 2, 3, 9, 4, 5]),
        item_fields=np.array([[0, 0], [1, 1], [2, 2], [3, 2], [4, 2], [5, 3], [6, 2]]),
        item_count=np.array([0, 0, 10, 0, 0, 0, 0]),
        item_likes=np.array([0, 0, 5, 0, 0, 0, 0]),
        offsets=np.array([0, 0, 0, 4, 6]),
        n_events=6,
        meta={"category_field": 1},
    )
    log.history = lambda rows: (log.offsets[log.user[rows]], np.asarray(rows))
    said = Pieces.build(tokenizer, WORDING, TITLES, LEVELS, PROFILES, statistics=True)
    plain = Pieces.build(tokenizer, WORDING, TITLES, LEVELS, PROFILES)
    rows, history = np.array([3, 3]), np.array([[0, 1], [0, 1]])
    prompts = Prompts(log, said, 1000).ctr(rows, history, targets=np.array([5, 6]))
    # (2 + 5/2) / (3 + 5) = .5625, as the share of a kind without events; of the kind of item 6 are all three,
    # (2 + 5 x .5625) / (3 + 5) = .6016; of item 5 (1 + 5/2) / (2 + 5) = .5, as of item 6 that nobody has met.
    for row, sentence in enumerate(
        (
            "Liked before: 55% of 3, of this kind 55% of 0; by others 50% of 2.",
            "Liked before: 55% of 3, of this kind 60% of 3; by others 50% of 0.",
        )
    ):
        text = text_of(tokenizer, prompts[row])
        before, _, after = text.partition("\n" + sentence)
        assert before.endswith(["Heat", TITLES[6]][row])
        assert after.startswith("\nAnswer yes or no:")
        without = Prompts(log, plain, 1000).ctr(rows, history, targets=np.array([5, 6]))[row]
        assert text_of(tokenizer, without) == before + after


@pytest.mark.parametrize("statistics", [False, True])
def test_pieces_that_were_saved_are_the_same(tokenizer, tmp_path, statistics):
    pieces = Pieces.build(tokenizer, WORDING, TITLES, LEVELS, PROFILES, statistics=statistics)
    pieces.save(tmp_path / "pieces")
    opened = Pieces.open(tmp_path / "pieces")
    for name, value in vars(pieces).items():
        again = getattr(opened, name)
        if name == "table":
            value, again = [value.tokens, value.offsets], [again.tokens, again.offsets]
        if name == "statistics_sentence":
            assert [column for column, _ in value] == [column for column, _ in again]
            assert len(value) == 0 or statistics
            value, again = [part for _, part in value], [part for _, part in again]
        np.testing.assert_equal(again, value)


def test_what_is_no_statistic_is_named(tokenizer):
    wording = Wording(known="{user_count} of {films}")
    with pytest.raises(ValueError, match=r"wording\.known names 'films'; wanted of user_count"):
        Pieces.build(tokenizer, wording, TITLES, LEVELS, PROFILES, statistics=True)


def test_events_without_a_rating_say_whether_they_were_liked():
    """Codes 1 and 2 are levels of ratings, 3 and 4 labels, 0 neither; of the tiny LM each is one token."""
    wording = Wording(liked=" (clicked)\n", disliked=" (skipped)\n")
    texts = [*wording.names(TITLES), *PROFILES]
    tokenizer = train_tokenizer(TinyConfig(), wording, LEVELS[:2], texts, [1] * len(texts), True)
    pieces = Pieces.build(tokenizer, wording, TITLES, LEVELS[:2], PROFILES, shows_labels=True)
    assert pieces.lengths[pieces.rating].tolist() == [1] * 5
    log = SimpleNamespace(
        user=np.array([2] * 6), item=np.array([2, 3, 4, 5, 2, 6]), rating=np.array([2, 3, 4, 0, 1, 4])
    )
    prompt = Prompts(log, pieces, 1000).ctr(np.array([5]), np.arange(5)[None])
    names = wording.names(TITLES)
    behind = [" (2 stars)\n", " (skipped)\n", " (clicked)\n", "\n", " (1 stars)\n"]
    story = "".join(names[item] + text for item, text in zip([2, 3, 4, 5, 2], behind, strict=True))
    text = text_of(tokenizer, prompt[0])
    assert text.startswith(f"{PROFILES[2]}{wording.intro}{story}{wording.question}")
