"""The data set's texts, tokenized once."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from recllm.config.schema import Config
from recllm.errors import StageError
from recllm.eventlog.ids import FIRST_ID, UNUSED
from recllm.eventlog.log import EventLog
from recllm.lm.config import LmConfig, TinyConfig
from recllm.lm.encoder import load_encoder
from recllm.lm.tiny import train_tokenizer
from recllm.pipeline.finished import Finished
from recllm.text.chat import chat_frame
from recllm.text.formats import DESCRIPTION, PROFILE
from recllm.text.pieces import sentence_parts
from recllm.text.prompts import Pieces, Prompts, fill


def encoder(stage: Finished) -> tuple[Any, Any, int]:
    """The encoder of a finished stage, its tokenizer and context: trained there, or named there."""
    config = stage.config.encoder
    return load_encoder(config, stage.export if config.is_exported else None)


def tower_prompts(config: Config, log: EventLog, tokenizer: Any, context: int) -> Prompts:
    """Texts of the two towers, of `context` tokens at most."""
    return Prompts(log, build_pieces(config, log, tokenizer, LmConfig()), context)


def texts(config: Config, log: EventLog) -> tuple[list[str], list[str], list[str]]:
    """Title and description of every dense item id, profile of every user id; empty for reserved ids."""
    items = pl.read_parquet(log.folder / "items.parquet")
    users = pl.read_parquet(log.folder / "users.parquet")
    titles = [title or "" for title in items["title"].to_list()]
    descriptions = fill(config.dataset.description, items, DESCRIPTION)
    return titles, descriptions, fill(config.wording.profile, users, PROFILE)


def check_fit(log: EventLog, pieces: Pieces, context: int) -> None:
    """Refuse texts that leave no room: a sample's prompt without history, or any item's, exceeds the context.

    Args:
        log: the event log.
        pieces: its texts, tokenized.
        context: tokens that the LM takes.

    Raises:
        StageError: the item whose text is too long, and by how much.
    """
    lengths = pieces.lengths
    same = sum(int(lengths[piece]) for piece in (pieces.head, pieces.intro, pieces.suffix))
    sentence = sum(int(lengths[part].max()) for _, part in pieces.statistics_sentence)
    yes_no = sentence + sum(int(lengths[piece]) for piece in (pieces.question, pieces.ask, pieces.answer))
    next_title = int(lengths[pieces.next]) + 1  # EOS
    item, profile = lengths[pieces.item], lengths[pieces.profile]
    rows = np.flatnonzero(log.split != UNUSED)
    most = np.full(log.n_items, profile[FIRST_ID:].min(initial=0), np.int64)
    np.maximum.at(most, log.item[rows], profile[log.user[rows]])
    whole = same + max(yes_no, next_title) + most + item
    worst = int(whole.argmax())
    if whole[worst] > context:
        told = pl.read_parquet(log.folder / "items.parquet").row(worst, named=True)
        named = f"item {told['external']} ({str(told['title'])[:60]!r})"
        raise StageError(
            f"{named} makes a prompt of {whole[worst]:,} tokens, "
            f"{item[worst]:,} of them its title, without any history; wanted {context:,} at most: shorten "
            "the title in the items file, or take an LM with more context"
        )


def tiny_tokenizer(config: Config, log: EventLog, tiny: TinyConfig) -> Any:
    """The tokenizer of the tiny LM or encoder: made of the data set's texts, weighed by training events."""
    titles, descriptions, profiles = texts(config, log)
    names = config.wording.names(titles)
    seen = np.bincount(log.user[np.flatnonzero(log.train_events())], minlength=log.n_users)
    pieces = [*names, *descriptions, *profiles]
    counts = [*log.item_count.tolist(), *([1] * len(descriptions)), *seen.tolist()]
    if config.prompt.statistics:  # every prompt holds them: they become tokens of their own
        statistics = {text for _, parts in sentence_parts(config.wording.known) for text in parts}
        pieces += sorted(statistics)
        counts += [log.n_events] * len(statistics)
    levels = log.meta["rating_levels"]
    return train_tokenizer(tiny, config.wording, levels, pieces, counts, log.shows_labels)


def build_pieces(config: Config, log: EventLog, tokenizer: Any, model: LmConfig | None = None) -> Pieces:
    """Tokenize every text of the data set once; `model` says what stands around prompts (None: the LM's)."""
    titles, descriptions, profiles = texts(config, log)
    model = model or config.lm.model
    prefix, suffix = chat_frame(tokenizer, model.system) if model.chat else (model.prefix, model.suffix)
    levels = log.meta["rating_levels"]
    return Pieces.build(
        tokenizer,
        config.wording,
        titles,
        levels,
        profiles,
        prefix=prefix,
        suffix=suffix,
        descriptions=descriptions,
        statistics=config.prompt is not None and config.prompt.statistics,  # retrieval asks nothing
        shows_labels=log.shows_labels,
    )
