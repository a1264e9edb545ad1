"""Points of a sweep: one key of the configuration at several values, all else equal, beside one another."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from recllm.config.merge import LEAVES, parse_overrides
from recllm.errors import ConfigError, check
from recllm.eventlog.names import check_hold_out

SECTIONS = ("subsample", "prompt", "stage1", "stage2")
"""Sections whose keys may be swept: what stage 2 makes anew on the same LM, neighbors and test rows."""
ROWS = "subsample"


@dataclass(frozen=True)
class SweepValue:
    """One value of the key.

    Attributes:
        key: dotted key of the configuration.
        text: the value as it was typed.
        value: the value as YAML reads it.
    """

    key: str
    text: str
    value: Any

    @property
    def tag(self) -> str:
        """How folders and tables name the point."""
        return tag(self.key, self.text)

    def settings(self, sections: Iterable[str]) -> dict[str, Any]:
        """The key and its value where it belongs to one of these sections, else nothing."""
        return {self.key: self.value} if self.key.split(".")[0] in sections else {}


def tag(key: str, text: str) -> str:
    """`num_meta-4`: a point's key and value within a name."""
    return f"{short(key)}-{text}"


def short(key: str) -> str:
    """The end of a key that no other key has: `num_meta`, but `stage1.retrieved`.

    Keys that may be swept are told from one another, all others from every key.
    """
    swept = key.split(".")[0] in SECTIONS
    known = [leaf.split(".") for leaf in LEAVES if not swept or leaf.split(".")[0] in SECTIONS]
    parts = key.split(".")
    ends = (parts[-n:] for n in range(1, len(parts) + 1))
    return ".".join(next(end for end in ends if sum(leaf[-len(end) :] == end for leaf in known) == 1))


def parse_sweep(key: str, values: str) -> tuple[SweepValue, ...]:
    """The points that `KEY=` and `VALUES=` name; none where both are empty.

    Raises:
        ConfigError: one without the other, a key that cannot be swept, a value that names no folder.
    """
    words = list(dict.fromkeys(values.split()))
    if not key and not words:
        return ()
    example = "e.g. make sweep KEY=stage2.adapter.num_meta VALUES='4 8 16'"
    if not key or not words:
        raise ConfigError(f"KEY={key} VALUES='{values}' is half a sweep; wanted both, {example}")
    points = []
    for word in words:
        if not re.fullmatch(r"[\w.-]+", word):
            raise ConfigError(f"VALUES={word} can name no folder; wanted letters, digits, '.', '-' and '_'")
        points.append(SweepValue(key, word, parse_overrides([f"{key}={word}"], "KEY")[key]))
    if key.split(".")[0] not in SECTIONS:
        raise ConfigError(f"KEY={key} cannot be swept; wanted a key of {', '.join(SECTIONS)}, {example}")
    if key == ROWS:
        for word in words:
            check_hold_out("VALUES", word)
            check(word != "none", "VALUES", word, "uniform<n>, last<n> or a fraction such as 0.1")
        if len({_amount(word)[0] for word in words}) > 1:
            raise ConfigError(f"VALUES='{values}' mixes kinds of row sets; wanted one, as they nest")
    return tuple(points)


def fewest(points: Iterable[SweepValue]) -> str | None:
    """The smallest subsample of a sweep over subsamples; None of any other sweep."""
    return min((point.text for point in points if point.key == ROWS), key=_amount, default=None)


def covering(points: Iterable[SweepValue], configured: str) -> str:
    """The row set of the training split that holds every point's subsample: subsamples nest.

    Args:
        points: of a sweep over subsamples.
        configured: `subsample` without the sweep; it is taken if it is of the points' kind and larger.
    """
    words = [point.text for point in points]
    kind, _ = _amount(words[0])
    comparable = re.fullmatch(r"(uniform|last)\d+|0?\.\d+", configured) and _amount(configured)[0] == kind
    return max(([configured] if comparable else []) + words, key=lambda word: _amount(word)[1])


def _amount(rows: str) -> tuple[str, float]:
    """Kind of a row set, and how much it is: ("", 0.1), ("uniform", 20000) or ("last", 20000)."""
    kind = rows.rstrip("0123456789.")
    return kind, float(rows.removeprefix(kind))
