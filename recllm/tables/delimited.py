"""Delimited text, as bytes: is it whole, in which encoding, and which line is which record.

Polars reads the columns. It fills short lines up without a word, does not say where a broken one is, and
reads UTF-8 only; so every file is looked through once before.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from recllm.console import say
from recllm.tables.broken_lines import Whole

BLOCK = 1 << 22
_HEAD = 1 << 20
BLANK = -1  # in place of a record's number of fields: an empty line
UNCLOSED = -2  # likewise: its quote is never closed
_LF = 10
_CR = 13

Fields = NDArray[np.int64]


@dataclass(frozen=True)
class Dialect:
    """How a file's text is written.

    Attributes:
        separator: between two fields, one ASCII character.
        quote: around a field that holds separators or line breaks; empty: none.
        encoding: as Python names it.
        columns: names of the columns where no first line names them.
        section: of the configuration, for messages; empty: none says how the file is written.
        escape: before a quote that is a letter, and before itself; empty: such quotes are doubled.
    """

    separator: str = ","
    quote: str = '"'
    encoding: str = "utf-8"
    columns: tuple[str, ...] = ()
    section: str = "source"
    escape: str = ""

    def hint(self, text: str) -> str:
        """What the configuration can do about it, for a message; nothing where there is none."""
        return text.format(section=self.section) if self.section else ""


@dataclass(frozen=True)
class Delimited:
    """A file that was looked through.

    Attributes:
        path: what can be read as UTF-8: the file itself, or a copy of it.
        columns: names of its columns, in order.
        rows: its records, without the line of names; an empty line is one of them.
        dialect: how it is written.
        broken: lines, from 1, that cannot be read and are not among its records; ascending.
    """

    path: Path
    columns: list[str]
    rows: int
    dialect: Dialect
    broken: Fields = field(default_factory=lambda: np.zeros(0, np.int64))

    def line(self, row: int) -> int:
        """The line, from 1, on which the record `row` begins, from 0; line breaks within quotes count."""
        line = self._line_of_copy(row)
        return line + int(np.searchsorted(self.broken - np.arange(len(self.broken)), line, side="right"))

    def _line_of_copy(self, row: int) -> int:
        row += not self.dialect.columns
        for fields, lines in _records(
            _Text(self.path, replace(self.dialect, encoding="utf-8", escape=""), ""), self.dialect
        ):
            if row < len(fields):
                return int(lines[row])
            row -= len(fields)
        raise IndexError(f"{self.path} has no such record")


def inspect(path: Path, dialect: Dialect, copy: Path, display_name: str, drop: bool = False) -> Delimited:
    """Looks a file through, and copies it where it is not plain UTF-8 with line feeds.

    A line is broken that has not as many fields as the first, or a quote where none can be.

    Args:
        path: the file; compressed where it ends in `.gz`.
        dialect: how it is written.
        copy: where a UTF-8 copy goes, should one be needed.
        display_name: the file's name in messages.
        drop: whether broken lines are left out of a copy, which is said.

    Raises:
        ValueError: the file is empty, is not in its encoding, or has a broken line and `drop` is not set.
    """
    text = _Text(path, dialect, display_name)
    columns = list(dialect.columns) or _names(text, dialect)
    try:
        rows = _count(text, dialect, columns)
    except BrokenLineError as problem:
        remedy = _remedy(path, dialect, columns)
        if drop:
            return _without_broken_lines(text, dialect, columns, copy, f"{problem}{remedy}")
        drop_them = dialect.hint(", or leave such lines out with source.faulty: drop")
        if not any(record.strip() for record in itertools.islice(_whole(text, dialect, columns), 1, None)):
            drop_them = ""
        raise ValueError(f"{problem}; mend the line{remedy}{drop_them}") from None
    if not text.is_unchanged:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with copy.open("wb") as sink:
            sink.writelines(text)
        path = copy
    return Delimited(path, columns, rows, dialect)


class BrokenLineError(ValueError):
    """A line that readers differ on; the text says which one, what is wrong with it and what was wanted."""


def _count(text: _Text, dialect: Dialect, columns: list[str]) -> int:
    """The records of a file below the line of names.

    Raises:
        BrokenLineError: the first line that is broken.
    """
    rows = 0
    display_name = text.display_name
    try:
        for fields, lines in _records(text, dialect):
            wrong = np.flatnonzero((fields != len(columns)) & (fields != BLANK))
            if len(wrong):
                got = fields[wrong[0]]
                line = lines[wrong[0]]
                is_ = "opens a quote that is never closed" if got == UNCLOSED else f"has {got} fields"
                as_in = dialect.hint(" as in {section}.columns") if dialect.columns else " as in line 1"
                raise BrokenLineError(
                    f"{display_name} line {line} {is_}, wanted {len(columns)} fields{as_in}"
                )
            rows += len(fields)
    except _Stray as stray:
        raise BrokenLineError(
            f"{display_name} {stray}, wanted quotes around whole fields, and those within doubled"
        ) from None
    return rows - (not dialect.columns)


def _without_broken_lines(
    text: _Text, dialect: Dialect, columns: list[str], copy: Path, problem: str
) -> Delimited:
    """Copies what of a file can be read; says which lines cannot.

    Args:
        text: the file.
        dialect: how it is written.
        columns: names of its columns.
        copy: where the copy goes.
        problem: what is wrong with the first broken line, and what else may mend it.

    Raises:
        ValueError: nothing is left.
    """
    records = _whole(text, dialect, columns)
    copy.parent.mkdir(parents=True, exist_ok=True)
    rows = -1 if not dialect.columns else 0
    filled = rows
    with copy.open("wb") as sink:
        for record in records:
            sink.write(record)
            rows += 1
            filled += bool(record.strip())
    count = len(records.broken)
    if filled < 1:
        raise ValueError(f"{problem}; none of its {count:,} such lines is left, wanted some; mend them")
    say(f"{problem}; {count:,} such line{'s are' if count > 1 else ' is'} left out (source.faulty: drop)")
    return Delimited(copy, columns, rows, dialect, np.array(records.broken, np.int64))


def _whole(text: _Text, dialect: Dialect, columns: list[str]) -> Whole:
    """The records of a file that can be read, that of the names too."""
    plain = _Text(text.path, replace(dialect, escape=""), text.display_name)
    sign, separator = dialect.quote.encode(), dialect.separator.encode()
    return Whole(_lines(plain), len(columns), separator, sign, text.unescape_line)


def _lines(text: _Text) -> Iterator[bytes]:
    """The lines of a file, with their line ends, without a byte order mark."""
    is_first = True
    for block in _whole_lines(text):
        for line in re.findall(b"[^\n]*\n|[^\n]+", block):
            yield line.removeprefix(codecs.BOM_UTF8) if is_first else line
            is_first = False


def _remedy(path: Path, dialect: Dialect, columns: list[str]) -> str:
    """What of the configuration gets the whole file through, for the end of a message; else nothing."""
    if not dialect.section or not dialect.quote:
        return ""
    sign = dialect.quote
    changes = [
        (
            replace(dialect, escape="\\"),
            ", or set {section}.escape: '\\', which stands before quotes that are letters",
        ),
        (
            replace(dialect, quote="", escape=""),
            f", or set {{section}}.quote: '' if {sign} is a letter like any",
        ),
    ]
    for other, words in changes:
        text = _Text(path, other, "")
        try:
            fits = (list(other.columns) or _names(text, other)) == columns and all(
                np.isin(fields, (len(columns), BLANK)).all() for fields, _ in _records(text, other)
            )
        except ValueError:
            fits = False
        if fits and other != dialect:
            return dialect.hint(words)
    return ""


class _Text:
    """A file in blocks of UTF-8, in which every line ends with a line feed or CR LF; iterate again to reread.

    Attributes:
        is_unchanged: whether all that was read so far is what stands in the file.
    """

    def __init__(self, path: Path, dialect: Dialect, display_name: str) -> None:
        self.path = path
        self.encoding = dialect.encoding
        self.display_name = display_name
        self.dialect = dialect
        self.is_unchanged = path.suffix != ".gz"
        escape, quote = re.escape(dialect.escape.encode()), re.escape(dialect.quote.encode())
        separator = re.escape(dialect.separator.encode())
        self.escaped = re.compile(escape + b"([" + escape + quote + b"])") if escape else None
        self.alone = re.compile(
            b"[\\n" + separator + b"](?:" + escape + quote + b")+[\\r\\n" + separator + b"]"
        )

    def _unescape(self, block: bytes, line: int) -> bytes:
        """The block with quotes doubled that had the escape sign before them.

        Raises:
            BrokenLineError: such quotes are all that a field seems to hold, which doubled would read as none.
        """
        assert self.escaped is not None
        if found := self.alone.search(block):
            at = line + block[: found.start() + 1].count(b"\n")
            raise BrokenLineError(
                f"{self.display_name} line {at} has a field of escaped quotes only, wanted quotes around it"
            )
        double = 2 * self.dialect.quote.encode()
        escape = self.dialect.escape.encode()
        unescaped = self.escaped.sub(lambda found: escape if found[1] == escape else double, block)
        self.is_unchanged &= unescaped == block
        return unescaped

    def unescape_line(self, line: bytes) -> bytes | None:
        """A line with doubled quotes for escaped ones; None where these are all that a field holds."""
        if self.escaped is None:
            return line
        try:
            return self._unescape(b"\n" + line, 0)[1:]
        except BrokenLineError:
            return None

    def __iter__(self) -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder(self.encoding)()
        is_utf8 = codecs.lookup(self.encoding).name == "utf-8"
        line = 1
        pending = b""  # a carriage return whose line feed may come next
        held = b""  # an escape sign whose letter comes next
        with gzip.open(self.path) if self.path.suffix == ".gz" else self.path.open("rb") as stream:
            while True:
                try:
                    raw = stream.read(BLOCK)
                except (OSError, EOFError, zlib.error) as error:
                    raise ValueError(
                        f"{self.display_name} cannot be read ({error}); get the file again"
                    ) from error
                try:
                    is_plain = is_utf8 and raw.isascii() and not decoder.getstate()[0]
                    block = raw if is_plain else decoder.decode(raw, final=not raw).encode()
                except UnicodeError as error:
                    raise self._undecodable(error, line) from error
                if not is_plain and not is_utf8:
                    self.is_unchanged &= block == raw
                if self.escaped is not None:
                    block = held + block
                    run = len(block) - len(block.rstrip(self.dialect.escape.encode()))
                    held = block[len(block) - run % 2 :] if raw else b""
                    block = self._unescape(block[: len(block) - len(held)], line)
                if b"\0" in block:
                    at = line + block[: block.index(b"\0")].count(b"\n")
                    raise ValueError(
                        f"{self.display_name} line {at} holds a zero byte, wanted text in {self.encoding}; "
                        f"{self._mend('utf-16')}"
                    )
                block = pending + block
                pending = b""
                if raw and block.endswith(b"\r"):
                    block = block[:-1]
                    pending = b"\r"
                if b"\r" in block and block.count(b"\r") != block.count(b"\r\n"):
                    block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
                    self.is_unchanged = False
                line += block.count(b"\n")
                yield block
                if not raw:
                    return

    def _undecodable(self, error: UnicodeError, line: int) -> ValueError:
        reason = str(error)
        guess = "latin-1"
        if isinstance(error, UnicodeDecodeError):
            line += error.object[: error.start].count(b"\n")
            reason = f"byte 0x{error.object[error.start]:02x}"
            guess = "utf-16" if error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else guess
        return ValueError(
            f"{self.display_name} line {line} is not in {self.encoding} ({reason}); {self._mend(guess)}"
        )

    def _mend(self, encoding: str) -> str:
        hint = self.dialect.hint(f"give the file's encoding, e.g. {{section}}.encoding: {encoding}")
        return hint or "get the file again"


def names(path: Path, dialect: Dialect, display_name: str) -> list[str]:
    """The columns' names in a file's first line.

    Raises:
        ValueError: there are none, or the file is not in its encoding.
    """
    return _names(_Text(path, dialect, display_name), dialect)


def _names(text: _Text, dialect: Dialect) -> list[str]:
    """The names in the first line, which must lie within the first _HEAD bytes."""
    head = b""
    display_name = text.display_name
    for block in _Text(text.path, replace(dialect, escape=""), display_name):  # what is below may be broken
        head += block
        if len(head) >= _HEAD:
            break
    head = b"\n".join(text.unescape_line(line) or line for line in head.split(b"\n"))
    if not head.strip(b"\xef\xbb\xbf\r\n"):
        raise ValueError(f"{display_name} is empty, wanted a line of column names and rows below it")
    lines = io.StringIO(head.decode().removeprefix("\ufeff"), newline="")
    try:
        names = [name.strip() for name in next(_reader(lines, dialect))]
    except csv.Error as error:
        raise ValueError(
            f"{display_name} line 1 cannot be read ({error}), wanted the columns' names"
        ) from error
    if not any(names):
        raise ValueError(f"{display_name} line 1 is empty, wanted the columns' names")
    return names


def _reader(stream: TextIO, dialect: Dialect) -> Any:
    """Python's reader: slow, but it says on which line quotes are wrong."""
    return csv.reader(
        stream,
        delimiter=dialect.separator,
        quotechar=dialect.quote or None,
        quoting=csv.QUOTE_MINIMAL if dialect.quote else csv.QUOTE_NONE,
        strict=True,
    )


def _whole_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes, in blocks that end with a line feed."""
    rest = b""
    for block in blocks:
        end = block.rfind(b"\n") + 1
        if end:
            yield rest + block[:end]
            rest = block[end:]
        else:
            rest += block
    if rest:
        yield rest


class _Quotes:
    """Which bytes lie in quotes, block by block of whole lines; each quote opens, closes, or is one of two.

    Attributes:
        inside: whether the next block begins in quotes.
        opening_line: the line on which they were opened.
    """

    def __init__(self, dialect: Dialect) -> None:
        self.inside = False
        self.opening_line = 0
        self.sign = ord(dialect.quote)
        self.separator = ord(dialect.separator)

    def mask(self, data: NDArray[np.uint8], line: int) -> NDArray[np.bool_]:
        """Marks what lies in quotes in a block that begins with that line.

        Raises:
            _Stray: a quote opens within a field, or closes where none ends: readers differ on what that is.
        """
        places = np.flatnonzero(data == self.sign)
        opens = np.arange(len(places)) % 2 == int(self.inside)
        before = data[np.maximum(places - 1, 0)]
        after = data[np.minimum(places + 1, len(data) - 1)]
        at_start = (places == 0) | ((places == 3) & (data[:3].tobytes() == codecs.BOM_UTF8))
        at_end = places == len(data) - 1
        starts = at_start | (before == self.separator) | (before == _LF) | (before == self.sign)
        ends = at_end | (after == self.separator) | (after == _LF) | (after == _CR) | (after == self.sign)
        stray = np.flatnonzero(np.where(opens, ~starts, ~ends))
        if len(stray):
            first = stray[0]
            at = line + int(np.count_nonzero(data[: places[first]] == _LF))
            if opens[first]:
                raise _Stray(f"line {at} has a quote within a field")
            if first:
                self.opening_line = line + int(np.count_nonzero(data[: places[first - 1]] == _LF))
            where = "" if self.opening_line == at else f" on line {at}"
            raise _Stray(f"line {self.opening_line} opens a quote that closes within a field{where}")
        if len(places):
            toggles = np.zeros(len(data), np.bool_)
            toggles[places] = True
            within = np.logical_xor.accumulate(toggles) ^ self.inside
            if within[-1] and opens[-1]:
                self.opening_line = line + int(np.count_nonzero(data[: places[-1]] == _LF))
            self.inside = bool(within[-1])
            return within
        return np.full(len(data), self.inside)


class _Stray(ValueError):
    """A quote where none can be; the text says on which line."""


def _records(blocks: Iterable[bytes], dialect: Dialect) -> Iterator[tuple[Fields, Fields]]:
    """For each block the records that end in it: their number of fields, and the line that they begin on."""
    separator = ord(dialect.separator)
    quote = dialect.quote.encode()
    quotes = _Quotes(dialect) if quote else None
    marks_before = 0  # separators of the record that goes on from the last block
    length_before = 0  # bytes of it
    line_before = 1  # on which it begins
    line = 1  # on which the block begins
    for block in _whole_lines(blocks):
        data = np.frombuffer(block, np.uint8)
        is_break = data == _LF
        is_mark = is_break | (data == separator)
        has_quotes = quotes is not None and (quotes.inside or quote in block)
        if quotes is not None and has_quotes:
            is_mark &= ~quotes.mask(data, line)
        marks = np.flatnonzero(is_mark)
        places = np.flatnonzero(data[marks] == _LF)  # of the records' ends among the marks
        ends = marks[places]
        breaks = np.flatnonzero(is_break) if has_quotes else ends
        if len(ends):
            fields = np.diff(places, prepend=-1)
            fields[0] += marks_before
            lengths = np.diff(ends, prepend=-1) - 1
            lengths[0] += length_before
            fields[(lengths == 0) | ((lengths == 1) & (data[ends - 1] == _CR))] = BLANK
            before = np.searchsorted(breaks, ends) if has_quotes else np.arange(len(ends))
            following = line + 1 + before  # lines that begin after these ends
            yield fields, np.concatenate([[line_before], following[:-1]])
            marks_before = -int(places[-1]) - 1
            length_before = -int(ends[-1]) - 1
            line_before = int(following[-1])
        marks_before += len(marks)
        length_before += len(data)
        line += len(breaks)
    if length_before:  # the last line has no line end
        yield (
            np.array([UNCLOSED if quotes is not None and quotes.inside else marks_before + 1]),
            np.array([line_before]),
        )
