"""Ids of one table that another does not have: how many, which, and why that may be."""

from __future__ import annotations

import polars as pl

_FORMS = (
    ("whole numbers written as 1.0", lambda ids: ids.str.replace(r"^([+-]?\d+)\.0+$", "$1")),
    ("leading zeros", lambda ids: ids.str.replace(r"^0+(.)", "$1")),
    ("capital and small letters", lambda ids: ids.str.to_lowercase()),
)
"""How one id may be written in two ways: in words, and what makes both the same."""


def unlike(missing: pl.Series, present: pl.Series) -> str:
    """Why ids may not be found: the first way of writing in which one of them would be.

    Args:
        missing: ids that are not among the others, as a file holds them.
        present: the others, text.

    Returns:
        For the end of a message, `; it looks like whole numbers written as 1.0: '7.0' here, '7' there`, or
        nothing where no id would be found in any of the ways.
    """
    texts = missing.cast(pl.String).str.strip_chars()
    for words, form in _FORMS:
        here = pl.DataFrame({"here": texts, "form": form(texts)})
        there = pl.DataFrame({"there": present, "form": form(present)})
        pairs = here.join(there, on="form", how="inner", maintain_order="left_right").head(1)
        if pairs.height:
            return f"; it looks like {words}: {pairs['here'][0]!r} here, {pairs['there'][0]!r} there"
    return ""
