"""Items by words of their titles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from recllm.eventlog.ids import FIRST_ID
from recllm.serving.recommender import Recommender


@dataclass(frozen=True)
class FoundItem:
    """An item of the catalog.

    Attributes:
        item: external id.
        title: of the item; None: it has none.
    """

    item: Any
    title: str | None


def find_items(recommender: Recommender, text: str, most: int = 20) -> list[FoundItem]:
    """Items whose title has every word of a text, in whatever case, or whose id the text is.

    Args:
        recommender: knows the titles.
        text: what is looked for; empty: every item.
        most: so many items at most.

    Returns:
        The item whose id the text is first, then those with the most training events, then by id.
    """
    log = recommender.log
    is_match = np.zeros(log.n_items, np.bool_)
    words = text.lower().split()
    if recommender.item_titles is not None:
        titles = recommender.item_titles.str.to_lowercase()
        matches = pl.repeat(True, log.n_items, eager=True)
        for word in words:
            matches = matches & titles.str.contains(word, literal=True).fill_null(False)
        is_match |= matches.to_numpy()
    elif not words:
        is_match[:] = True
    own = int(recommender.maker.items.dense([text.strip()])[0]) if words else 0
    is_match[own] = True
    is_match[:FIRST_ID] = False
    found = np.flatnonzero(is_match)
    order = np.lexsort((found, -log.item_count[found], found != own))
    dense = found[order][:most]
    ids = recommender.maker.items.external(dense).to_list()
    names = [None] * len(ids) if recommender.item_titles is None else recommender.item_titles[dense].to_list()
    return [FoundItem(item, title) for item, title in zip(ids, names, strict=True)]
