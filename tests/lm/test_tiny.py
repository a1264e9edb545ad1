"""The tiny LM: its tokenizer's promises, its size, and the way to disk and back."""

import numpy as np
import pytest
import torch

from recllm.lm.load import LmConfig, load_lm
from recllm.lm.tiny import TinyConfig, build_model, train_tokenizer
from recllm.text.pieces import Wording

TITLES = ["", "", "Toy Story (1995)", "Dr. No (1962)", "Do Not Disturb (1965)", "Yes Man (2008)"]
COUNTS = [0, 0, 400, 100, 1, 4]
LEVELS = ["0.5", "1", "5"]
WORDING = Wording()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TinyConfig(), WORDING, LEVELS, [*TITLES, "A man.\n"], [*COUNTS, 9])


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_template_ratings_and_answers_are_one_token_each(tokenizer):
    constants = [WORDING.intro, WORDING.question, WORDING.ask, WORDING.next, WORDING.choose, "\n"]
    texts = [*constants, " (0.5 stars)\n", " (1 stars)\n", " (5 stars)\n", " Yes", " No"]
    encoded = [encode(tokenizer, text) for text in texts]
    assert [len(tokens) for tokens in encoded] == [1] * len(texts)
    assert len({tokens[0] for tokens in encoded}) == len(texts)
    # Also where they stand in a prompt.
    film = encode(tokenizer, "Toy Story (1995)")
    assert encode(tokenizer, "Toy Story (1995) (5 stars)\n") == [*film, *encode(tokenizer, " (5 stars)\n")]
    assert encode(tokenizer, WORDING.ask + " No") == [
        *encode(tokenizer, WORDING.ask),
        *encode(tokenizer, " No"),
    ]


def test_a_frequent_title_is_one_token_and_no_title_holds_an_answer(tokenizer):
    assert len(encode(tokenizer, "Toy Story (1995)")) == 1
    answers = {*encode(tokenizer, " Yes"), *encode(tokenizer, " No")}
    unseen = ["Say Yes to No One (2020)", "Do No Harm (1999)", "Not of This Earth"]
    for title in [*TITLES[2:], *unseen]:
        assert not answers & set(encode(tokenizer, title)), title


@pytest.mark.parametrize(
    "text", ["Amélie (2001)", "七人の侍", "a\tb  c\n\nd ", " leading", "<s> no </s>", "\x00\x7f🎬"]
)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < len(tokenizer)


def test_weights_decide_which_titles_get_short():
    titles = ["abcdefgh", "zyxwvuts"]
    config = TinyConfig(vocabulary=256 + 3 + 11 + 2 + 7 - 2)
    common = [
        train_tokenizer(config, WORDING, LEVELS, titles, counts) for counts in ([10_000, 1], [1, 10_000])
    ]
    lengths = np.array([[len(encode(one, title)) for title in titles] for one in common])
    assert lengths[0, 0] < lengths[0, 1]
    assert lengths[1, 1] < lengths[1, 0]


def test_a_vocabulary_without_room_is_refused():
    with pytest.raises(ValueError, match="vocabulary is 200"):
        train_tokenizer(TinyConfig(vocabulary=200), WORDING, LEVELS, TITLES, COUNTS)


def test_model_has_the_stated_size_and_ties_its_embeddings(tokenizer):
    model = build_model(TinyConfig(), tokenizer)
    # A layer: 4 x 128^2 (attention) + 3 x 128 x 344 (MLP) + 2 x 128 (norms) = 197,888.
    # Four of them, a last norm, the embeddings once.
    assert sum(p.numel() for p in model.parameters()) == 4 * 197_888 + 128 + 128 * len(tokenizer)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_saved_and_loaded_is_the_same_language_model(tokenizer, tmp_path):
    model = build_model(TinyConfig(hidden=16, intermediate=24, layers=2, heads=2), tokenizer).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, reloaded = load_lm(LmConfig(), tmp_path)
    text = WORDING.intro + "Dr. No (1962) (5 stars)\nDo Not Disturb (1965)" + WORDING.ask + " Yes</s>"
    assert encode(reloaded, text) == encode(tokenizer, text)
    assert (reloaded.bos_token_id, reloaded.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    ids = torch.tensor([encode(tokenizer, text)])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
