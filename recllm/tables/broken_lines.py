"""Lines of delimited text that no reader agrees on, told from those that can be read."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field


@dataclass
class Whole:
    """The records of a text that can be read, one after another; iterate once.

    A record begins on a line and, if that leaves a quote open, goes on with the lines below. One that has
    another number of fields is broken, with all of its lines. Where a quote stands within a field, or none
    closes, the line that the record begins on is broken alone, and the next line begins a record: an open
    quote costs one line, not all that follow.

    Attributes:
        lines: of the text, with their line ends.
        width: fields of a record.
        separator: between two fields, one byte.
        quote: around a field, one byte; empty: none.
        unescape: a line with doubled quotes in place of escaped ones; None where it cannot be told.
        broken: numbers of the broken lines, from 1, of what was iterated so far.
    """

    lines: Iterable[bytes]
    width: int
    separator: bytes
    quote: bytes
    unescape: Callable[[bytes], bytes | None]
    broken: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[bytes]:
        """Each record with its line end; empty lines are records too."""
        source = iter(self.lines)
        ahead: deque[bytes] = deque()
        whole, begun = _patterns(self.separator, self.quote)
        quoted = re.compile(_QUOTED.replace(b"Q", re.escape(self.quote))) if self.quote else None
        number = 0
        while True:
            line = ahead.popleft() if ahead else next(source, None)
            if line is None:
                return
            number += 1
            record = self.unescape(line)
            taken = 0  # lines below it that belong to it
            if quoted is None or record is None or self.quote not in record:
                plain = record
            else:
                while not whole.fullmatch(record.rstrip(b"\r\n")):
                    below = self._below(source, ahead, taken) if begun.fullmatch(record) else None
                    if below is None:
                        record = None
                        break
                    taken += len(below)
                    record += b"".join(below)
                plain = None if record is None else quoted.sub(b"", record)
            is_empty = record is not None and not record.strip(b"\r\n")
            fits = is_empty or (plain is not None and plain.count(self.separator) == self.width - 1)
            if record is None:
                taken = 0
            for _ in range(taken):
                ahead.popleft()
            if fits and record is not None:
                yield record
            else:
                self.broken += range(number, number + taken + 1)
            number += taken

    def _below(self, source: Iterator[bytes], ahead: deque[bytes], start: int) -> list[bytes] | None:
        """The lines from `start` of those ahead up to the next one with a quote; None where there is none."""
        found = []
        while True:
            if start == len(ahead):
                line = next(source, None)
                if line is None:
                    return None
                ahead.append(line)
            unescaped = self.unescape(ahead[start])
            if unescaped is None:
                return None
            found.append(unescaped)
            start += 1
            if self.quote in unescaped:
                return found


_QUOTED = b"Q[^Q]*(?:QQ[^Q]*)*Q"
"""A field in quotes, those within it doubled."""


def _patterns(separator: bytes, quote: bytes) -> tuple[re.Pattern[bytes], re.Pattern[bytes]]:
    """What a whole record looks like, without its line end, and one whose last quote is open."""
    sign, mark = re.escape(quote), re.escape(separator)
    quoted = _QUOTED.replace(b"Q", sign) if quote else b"(?!)"
    opened = b"Q[^Q]*(?:QQ[^Q]*)*".replace(b"Q", sign) if quote else b"(?!)"
    plain = b"[^" + mark + sign + b"\\r\\n]*"
    one = b"(?:" + quoted + b"|" + plain + b")"
    whole = one + b"(?:" + mark + one + b")*"
    begun = b"(?:" + one + mark + b")*" + opened
    return re.compile(whole), re.compile(begun)
