"""A sweep: one key of the configuration at several values, all else equal, beside one another."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from recllm.config.merge import LEAVES, parse_overrides
from recllm.errors import ConfigError, check
from recllm.eventlog.names import RowSet, check_hold_out

SECTIONS = ("subsample", "prompt", "stage1", "stage2")
"""Sections whose keys may be swept: what stage 2 makes anew on the same LM, neighbors and test rows."""
ROWS = "subsample"
"""The key whose values are row sets, which nest: a sweep over it shares one LM and one held-out CRM."""


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
        """How folders and tables name it."""
        return tag(self.key, self.text)

    def settings(self, sections: Iterable[str]) -> dict[str, Any]:
        """The key and its value where it belongs to one of these sections, else nothing."""
        return {self.key: self.value} if self.key.split(".")[0] in sections else {}


def tag(key: str, text: str) -> str:
    """Key and value as a part of a name: `num_meta-4`."""
    return f"{short(key)}-{text}"


def short(key: str) -> str:
    """The end of a key that no other key has: `num_meta`, but `stage1.retrieved`.

    Keys that may be swept are told from one another, all others from every key.
    """
    parts = key.split(".")
    swept = parts[0] in SECTIONS
    leaves = [leaf.split(".") for leaf in LEAVES if not swept or leaf.split(".")[0] in SECTIONS]
    for length in range(1, len(parts) + 1):
        end = parts[-length:]
        if sum(leaf[-length:] == end for leaf in leaves) == 1:
            return ".".join(end)
    raise ConfigError(f"KEY={key} cannot be swept; wanted a key of {', '.join(SECTIONS)}")


def parse_sweep(key: str, values: str) -> tuple[SweepValue, ...]:
    """The values that `KEY=` and `VALUES=` name; none where both are empty.

    Raises:
        ConfigError: one without the other, a key that cannot be swept, a value that names no folder.
    """
    words = list(dict.fromkeys(values.split()))
    if not key and not words:
        return ()
    example = "e.g. make sweep KEY=stage2.adapter.num_meta VALUES='4 8 16'"
    if not key or not words:
        raise ConfigError(f"KEY={key} VALUES='{values}' is half a sweep; wanted both, {example}")
    sweep_values = []
    for word in words:
        if not re.fullmatch(r"[\w.-]+", word):
            raise ConfigError(f"VALUES={word} can name no folder; wanted letters, digits, '.', '-' and '_'")
        value = parse_overrides([f"{key}={word}"], "KEY")[key]
        sweep_values.append(SweepValue(key, word, value))
    if key.split(".")[0] not in SECTIONS:
        raise ConfigError(f"KEY={key} cannot be swept; wanted a key of {', '.join(SECTIONS)}, {example}")
    if key == ROWS:
        for word in words:
            check_hold_out("VALUES", word)
            check(word != "none", "VALUES", word, "uniform<n>, last<n> or a fraction such as 0.1")
        _check_nesting(words)
    return tuple(sweep_values)


def fewest(sweep_values: Iterable[SweepValue]) -> str | None:
    """The smallest subsample of a sweep over subsamples; None of any other sweep."""
    row_sets = [sweep_value.text for sweep_value in sweep_values if sweep_value.key == ROWS]
    return _by_size(row_sets)[0] if row_sets else None


def covering(sweep_values: Iterable[SweepValue], configured: str) -> str:
    """The row set of the training split that holds every subsample of a sweep: subsamples nest.

    Args:
        sweep_values: of a sweep over subsamples.
        configured: `subsample` without the sweep, or another row set that is held out, or `none`; it is taken
            if it can be held out and holds them all.
    """
    largest = _by_size([sweep_value.text for sweep_value in sweep_values])[-1]
    if configured == "none":
        return largest
    row_set = RowSet.parse(configured)
    return configured if row_set.can_be_held_out and RowSet.parse(largest) in row_set else largest


def _check_nesting(row_sets: list[str]) -> None:
    """Refuse row sets of which two overlap, or may in a split of some size.

    Raises:
        ConfigError: it names the first two.
    """
    for text, other in itertools.combinations(row_sets, 2):
        row_set = RowSet.parse(text)
        other_set = RowSet.parse(other)
        if row_set not in other_set and other_set not in row_set:
            raise ConfigError(
                f"VALUES='{' '.join(row_sets)}' do not nest: neither {text} nor {other} holds the other in a "
                "split of any size; wanted row sets of one kind, e.g. '0.05 0.1'"
            )


def _by_size(row_sets: list[str]) -> list[str]:
    """Row sets that nest, the smallest first."""
    parsed = [RowSet.parse(text) for text in row_sets]
    return sorted(row_sets, key=lambda text: sum(other in RowSet.parse(text) for other in parsed))
