"""The stage of an LM that is loaded: its tokenizer's tokens are the LM's."""

import copy

import pytest

from recllm.errors import StageError
from recllm.systems.texts import build_pieces, texts
from stages.lm import check_tokens


def test_texts_that_the_lm_has_rows_for_are_taken(tiny_lm):
    check_tokens(tiny_lm.pieces, tiny_lm.model, tiny_lm.tokenizer)


def test_a_token_that_the_tokenizer_alone_has_is_refused_with_its_text(tiny_lm, demo_config, demo_log):
    """A word was added to the tokenizer, and the LM's embeddings not resized."""
    titles, _, _ = texts(demo_config, demo_log)
    word = next(title for title in titles if title)
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    rows = len(tiny_lm.model.get_input_embeddings().weight)
    tokenizer.add_tokens([f"<spare{number}>" for number in range(rows - len(tokenizer))] + [word])
    largest = tokenizer.convert_tokens_to_ids(word)
    assert largest == rows
    with pytest.raises(StageError, match="tokenizer has and the LM has not") as error:
        check_tokens(build_pieces(demo_config, demo_log, tokenizer), tiny_lm.model, tokenizer)
    message = str(error.value)
    assert f"the token {word!r} ({rows})" in message
    assert f"wanted ids below {rows}" in message
    assert "\n" not in message
    # A spare token that no text holds does no harm, and neither does an LM with a row for the word.
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.add_tokens(["<never said>"])
    check_tokens(build_pieces(demo_config, demo_log, tokenizer), tiny_lm.model, tokenizer)
