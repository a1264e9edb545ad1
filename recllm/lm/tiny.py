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

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_tokenizer(
    config: TinyConfig,
    wording: Wording,
    rating_levels: Sequence[str],
    texts: Sequence[str],
    counts: Sequence[int] | NDArray[np.integer[Any]],
) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges run over whole titles: a well-known film takes one or two tokens.

    Sentences of the template and rating pieces are added tokens, matched verbatim. The answers are entries of
    the vocabulary that no merge leads to: only an answer that stands alone (behind `ask`) is one, so that
    "Dr. No" and "Do Not Disturb" do not hold the token of an answer.

    Args:
        config: Its `vocabulary` bounds the number of tokens; small data use fewer.
        wording: The dataset's words.
        rating_levels: Text of the rating codes 1, 2, ...
        texts: Items' names, their cards, users' profiles; repeated ones add up, empty ones count for nothing.
        counts: How often each text occurs in training; a text weighs the square root of it.

    Raises:
        ValueError: The vocabulary is too small, or a rating or answer is not exactly one token.
    """
    from transformers import PreTrainedTokenizerFast

    sentences = [wording.intro, wording.question, wording.ask, wording.next, wording.choose]
    constants = [text for text in dict.fromkeys([*sentences, *wording.ratings(rating_levels)]) if text]
    answers = [wording.yes, wording.no]
    room = config.vocabulary - len(constants) - len(answers)
    if room < 256 + 3:
        raise ValueError(
            f"tiny.vocabulary is {config.vocabulary}, want {config.vocabulary - room + 259} or more"
        )
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = whole
    trainer = trainers.BpeTrainer(
        vocab_size=room,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    def weighted() -> Iterator[str]:
        for text, count in zip(texts, counts, strict=True):
            # The line break is a token of its own, so no merge may run over it.
            for line in filter(None, text.split("\n")):
                yield from repeat(line, max(1, round(int(count) ** 0.5)))

    draft.train_from_iterator(weighted(), trainer)
    bpe = json.loads(draft.to_str())["model"]
    vocabulary: dict[str, int] = bpe["vocab"]
    spelled = {whole.pre_tokenize_str(answer)[0][0] for answer in answers}
    for answer in sorted(spelled):
        vocabulary.setdefault(answer, len(vocabulary))
    # ignore_merges: a text that is an entry of the vocabulary is that entry, whatever merges make of it.
    merges = [(left, right) for left, right in bpe["merges"] if left + right not in spelled]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = whole, decoders.ByteLevel()
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


def sizes(config: TinyConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the configurations of a small LM and of a small encoder have in common, in transformers' words."""
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

    own: dict[str, Any] = {"num_key_value_heads": config.heads, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes(config, tokenizer), **own))
