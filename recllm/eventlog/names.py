"""The words that name row sets and candidate lists; no other place knows their grammar.

No array is read here, so that the configuration may import it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, cast

from recllm.errors import ConfigError, check

RowSetKind = Literal["all", "first", "last", "uniform", "fraction"]
CandidateDraw = Literal["uniform", "popular", "hard", "given"]

ROW_SETS = "all, first<n>, last<n>, uniform<n> or a fraction such as 0.1 or 0.1max70000"
"""What a row set may be called, for messages."""
HOLD_OUTS = "none, uniform<n>, last<n> or a fraction such as 0.1 or 0.1max70000"
"""What a row set that is held out may be called, for messages."""
CANDIDATE_KINDS = "uniform<n>, popular<n> or hard<n>, e.g. uniform20; given<n> where the data set has lists"
"""What a kind of candidate lists may be called, for messages."""

AUTO = "auto"
"""For a row set that a figure is measured on: as many rows as it needs, see `sized`."""
ENOUGH_ROWS = 200_000
"""Rows on which an AUC of .8 is known to .002, with a confidence of 95 %: 1.96 * sqrt(.2 / 200,000), by the
formula of Hanley and McNeil (1982) for as many likes as dislikes. More rows buy nothing that tables show."""

_COUNTED = re.compile(r"(first|last|uniform)(\d+)")
_FRACTION = re.compile(r"(0?\.\d+|1\.0+)(?:max(\d+))?")
_CANDIDATES = re.compile(r"(uniform|popular|hard|given)(\d+)")


@dataclass(frozen=True)
class RowSet:
    """Some rows of a split.

    Attributes:
        kind: `all` in time order; `first` or `last` of that order; `uniform` or `fraction`, a prefix of the
            split's stored permutation, so that a smaller set lies in a larger one of either kind.
        amount: a number of rows; of the split's rows the fraction for `fraction`, and 1.0 for `all`.
        most: of a fraction, the most rows that it has; None: as many as it is.
    """

    kind: RowSetKind
    amount: int | float
    most: int | None = None

    @classmethod
    def parse(cls, text: str) -> RowSet:
        """Reads `all`, `first30000`, `last70000`, `uniform500`, `0.1`, `.1`, `1.0` or `0.1max70000`.

        Raises:
            ConfigError: the text is no name of a row set.
        """
        if text == "all":
            return cls("all", 1.0)
        counted = _COUNTED.fullmatch(text)
        if counted:
            return cls(cast(RowSetKind, counted[1]), int(counted[2]))
        fraction = _FRACTION.fullmatch(text)
        if fraction:
            return cls("fraction", float(fraction[1]), int(fraction[2]) if fraction[2] else None)
        raise ConfigError(f"row set {text!r} is unknown; wanted {ROW_SETS}")

    def __str__(self) -> str:
        """The shortest text that `parse` reads as this row set."""
        if self.kind == "all":
            return "all"
        if self.kind == "fraction":
            fraction = f"{Decimal(str(self.amount)):f}"  # a float's own text may be 1e-05
            return fraction if self.most is None else f"{fraction}max{self.most}"
        return f"{self.kind}{self.amount}"

    @property
    def is_drawn(self) -> bool:
        """Whether it is a prefix of the stored permutation, rather than a part of the time order."""
        return self.kind in ("uniform", "fraction")

    @property
    def can_be_held_out(self) -> bool:
        """Whether fewer rows of its kind lie in more, and some of the split are left."""
        return self.kind in ("uniform", "last") or (self.kind == "fraction" and self.amount < 1)

    def __contains__(self, other: RowSet) -> bool:
        """Whether all rows of another set are in this one, in a split of any size."""
        if self.kind == "all" or self == other:
            return True
        if self.kind == "uniform" and other.most is not None:
            return self.amount >= other.most
        if self.kind != other.kind or self.amount < other.amount:
            return False
        return self.most is None or (other.most is not None and self.most >= other.most)

    def count(self, total: int) -> int:
        """How many rows the set has in a split of `total` rows; one that is larger is the whole split."""
        if self.kind in ("all", "fraction"):
            count = round(self.amount * total)
            return count if self.most is None else min(count, self.most)
        return min(int(self.amount), total)


@dataclass(frozen=True)
class CandidateKind:
    """How the candidate lists of a ranking task are made.

    Attributes:
        kind: what the negatives are drawn from: `uniform` over the training catalog, `popular` in proportion
            to training events, `hard` out of items that are alike (`recllm.eventlog.candidates`); `given`:
            the lists are the data set's own.
        size: items of a list, the target included.
    """

    kind: CandidateDraw
    size: int

    @classmethod
    def parse(cls, text: str) -> CandidateKind:
        """Reads `uniform20`, `popular20`, `hard20` or `given20`.

        Raises:
            ConfigError: the text is no kind of candidate lists.
        """
        named = _CANDIDATES.fullmatch(text)
        if not named:
            raise ConfigError(f"candidates {text!r} are unknown; wanted {CANDIDATE_KINDS}")
        return cls(cast(CandidateDraw, named[1]), int(named[2]))

    def __str__(self) -> str:
        """The text that `parse` reads as this kind."""
        return f"{self.kind}{self.size}"


def check_sized_rows(key: str, got: str) -> None:
    """Refuse a configured value that is neither `auto` nor a name of a row set, as `check_rows` does."""
    if got != AUTO:
        check_rows(key, got)


def check_rows(key: str, got: str) -> None:
    """Refuse a configured value that is no name of a row set.

    Args:
        key: of the configuration, for the message.
        got: its value.

    Raises:
        ConfigError: `RowSet.parse` does not read it.
    """
    check(_read(got) is not None, key, got, ROW_SETS)


def sized(text: str, total: int) -> str:
    """The row set that is meant in a split of so many rows: `auto` is all, or `ENOUGH_ROWS` drawn of more."""
    if text != AUTO:
        return text
    return "all" if total <= ENOUGH_ROWS else str(RowSet("uniform", ENOUGH_ROWS))


def check_hold_out(key: str, got: str) -> None:
    """Refuse a configured value that names no rows to hold out of training.

    Such rows must nest, so that fewer lie in more: a prefix of the training permutation, or the latest
    samples. The whole split cannot be held out.

    Args:
        key: of the configuration, for the message.
        got: its value; `none` holds out nothing.

    Raises:
        ConfigError: it is neither `none` nor such a row set.
    """
    row_set = _read(got)
    check(got == "none" or (row_set is not None and row_set.can_be_held_out), key, got, HOLD_OUTS)


def check_candidates(key: str, got: str) -> None:
    """Refuse a configured value that is no kind of candidate lists.

    Args:
        key: of the configuration, for the message.
        got: its value.

    Raises:
        ConfigError: `CandidateKind.parse` does not read it.
    """
    check(_CANDIDATES.fullmatch(got) is not None, key, got, CANDIDATE_KINDS)


def _read(text: str) -> RowSet | None:
    try:
        return RowSet.parse(text)
    except ConfigError:
        return None
