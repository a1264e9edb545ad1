"""The tiny LM: a small Llama and its own BPE, both trained on a dataset's training texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from recllm.lm.config import TinyConfig
from recllm.text.config import Wording

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

BOS = "<s>"
EOS = "</s>"
PAD = "<pad>"
LEAST_BPE_SIZE = 256 + 3
"""Tokens of a BPE without merges: every byte, and the three special ones."""


def train_tokenizer(
    config: TinyConfig,
    wording: Wording,
    rating_levels: Sequence[str],
    texts: Sequence[str],
    counts: Sequence[int] | NDArray[np.integer[Any]],
    shows_labels: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges run over whole titles: a well-known film takes one or two tokens.

    Sentences of the template and rating pieces are added tokens, matched verbatim. The answers are entries of
    the vocabulary that no merge leads to: only an answer that stands alone (behind `ask`) is one, so that
    "Dr. No" and "Do Not Disturb" do not hold the token of an answer.

    Args:
        config: `vocabulary` bounds the number of tokens; small data use fewer.
        wording: The dataset's words.
        rating_levels: Text of the rating codes 1, 2, ...
        texts: Items' names, their descriptions, users' profiles; repeated ones add up, empty ones count for
            nothing.
        counts: How often each text occurs in training; a text weighs the square root of it.
        shows_labels: Whether two codes follow the ratings', see `Wording.ratings`.

    Raises:
        ValueError: The vocabulary is too small, or a rating or answer is not exactly one token.
    """
    from transformers import PreTrainedTokenizerFast

    sentences = [wording.intro, wording.question, wording.ask, wording.next, wording.choose]
    ratings = wording.ratings(rating_levels, shows_labels)
    constants = [text for text in dict.fromkeys([*sentences, *ratings]) if text]
    answers = [wording.yes, wording.no]
    bpe_size = config.vocabulary - len(constants) - len(answers)
    if bpe_size < LEAST_BPE_SIZE:
        wanted = config.vocabulary - bpe_size + LEAST_BPE_SIZE
        raise ValueError(f"tiny.vocabulary is {config.vocabulary}, want {wanted} or more")

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = _train_bpe(byte_level, bpe_size, _weighted_lines(texts, counts))
    tokenizer = Tokenizer(_with_answers(bpe, {byte_level.pre_tokenize_str(text)[0][0] for text in answers}))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in (PAD, BOS, EOS)]
    )
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False, lstrip=False, rstrip=False) for text in constants]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    for text in [*constants, *answers]:
        if len(fast(text, add_special_tokens=False)["input_ids"]) != 1:
            raise ValueError(f"{text!r} is not one token of the tiny LM: change the dataset's `wording`")
    return fast


def _weighted_lines(texts: Sequence[str], counts: Sequence[int] | NDArray[np.integer[Any]]) -> Iterator[str]:
    """Lines of the texts, as often as their text weighs: no merge runs over a line break, a token itself."""
    for text, count in zip(texts, counts, strict=True):
        for line in filter(None, text.split("\n")):
            yield from repeat(line, max(1, round(int(count) ** 0.5)))


def _train_bpe(byte_level: pre_tokenizers.ByteLevel, size: int, lines: Iterator[str]) -> dict[str, Any]:
    """`vocab` (token -> id) and `merges` (pairs of tokens) of a BPE of `size` tokens over whole lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    bpe: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return bpe


def _with_answers(bpe: dict[str, Any], answers: set[str]) -> models.BPE:
    """The BPE with the answers as entries of its vocabulary, and without the merges that would lead to them.

    Args:
        bpe: as `_train_bpe` returned it.
        answers: as the byte-level alphabet spells them.
    """
    vocabulary: dict[str, int] = bpe["vocab"]
    for answer in sorted(answers):
        vocabulary.setdefault(answer, len(vocabulary))
    merges = [(left, right) for left, right in bpe["merges"] if left + right not in answers]
    # ignore_merges: a text that is an entry of the vocabulary is that entry, whatever merges make of it.
    return models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True)


def shape_arguments(config: TinyConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The arguments that transformers' configurations of a small LM and of a small encoder have in common."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.context,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_model(config: TinyConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama with tied embeddings for that tokenizer; torch's generator draws the weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = shape_arguments(config, tokenizer)
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=config.heads, tie_word_embeddings=True))
