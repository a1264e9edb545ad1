"""Which line has which fault, and what is read: against Python's csv module, and by hand."""

import csv
import gzip
import io
import re

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.tables import delimited
from recllm.tables.delimited import Dialect, inspect

CELLS = st.text(st.sampled_from('ab ,;\t"\n\r.é🎉'), max_size=5)


def look(tmp_path, content, dialect=None, name="x.csv", drop=False):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return inspect(tmp_path / name, dialect or Dialect(), tmp_path / "copy.csv", name, drop)


def read(file):
    options = {"separator": file.dialect.separator, "quote_char": file.dialect.quote or None}
    return pl.read_csv(file.path, infer_schema=False, glob=False, **options)


def test_lines_of_records_with_line_breaks_in_quotes_and_empty_lines(tmp_path):
    # line      1    2    3      4    5   6  7    8
    file = look(tmp_path, 'a,b\n1,2\n3,"x\ny"\n\n"\n",4\n5,6')
    assert (file.columns, file.rows) == (["a", "b"], 5)
    assert [file.line(row) for row in range(5)] == [2, 3, 5, 6, 8]
    assert read(file).rows() == [("1", "2"), ("3", "x\ny"), (None, None), ("\n", "4"), ("5", "6")]
    with pytest.raises(IndexError):
        file.line(5)


@settings(max_examples=60, deadline=None)
@given(
    table=st.integers(1, 4).flatmap(lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width))),
    end=st.sampled_from(["\n", "\r\n"]),
    separator=st.sampled_from([",", ";", "\t"]),
    block=st.integers(1, 40),
)
def test_what_pythons_csv_writes_is_found_at_its_lines(tmp_path_factory, table, end, separator, block):
    """Blocks of some bytes only, so that quotes, CR LF and multi-byte letters are cut anywhere."""
    folder = tmp_path_factory.mktemp("x")
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator, lineterminator=end, quoting=csv.QUOTE_ALL)
    width = len(table[0]) if table else 1
    lines = []
    for row in [[f"c{i}" for i in range(width)], *table]:
        lines.append(1 + text.getvalue().replace("\r\n", "\n").replace("\r", "\n").count("\n"))
        writer.writerow(row)
    whole, delimited.BLOCK = delimited.BLOCK, block
    try:
        file = look(folder, text.getvalue(), Dialect(separator))
        assert [file.line(row) for row in range(file.rows)] == lines[1:]
    finally:
        delimited.BLOCK = whole
    assert file.rows == len(table)
    lone = "\r" in text.getvalue().replace("\r\n", "")
    assert (file.path.name == "copy.csv") == lone
    wanted = [tuple(cell.replace("\r\n", "\n").replace("\r", "\n") for cell in row) for row in table]
    got = [tuple(cell.replace("\r\n", "\n") for cell in row) for row in read(file).rows()]
    assert got == wanted


@pytest.mark.parametrize(
    ("content", "dialect", "problem"),
    [
        (b"", {}, "x.csv is empty, wanted a line of column names"),
        (b"\xef\xbb\xbf\r\n\n", {}, "x.csv is empty"),
        (b"\n\na,b\n1,2\n", {}, "x.csv line 1 is empty"),
        (b"a,b\n1,2\n3\n4,5\n", {}, "x.csv line 3 has 1 fields, wanted 2 fields as in line 1"),
        (b"a,b\n1,2\n3,4,5", {}, "x.csv line 3 has 3 fields, wanted 2 fields as in line 1"),
        (b'a,b\n"1\n1",2\n3\n', {}, "x.csv line 4 has 1 fields"),
        (b'a,b\n1,2\n3,"4\n5,6\n', {}, "x.csv line 3 opens a quote that is never closed"),
        (b'a,"b\n1,2\n', {}, "x.csv line 1 cannot be read"),
        (b'a,b\n1,the "best" tea\n', {}, "x.csv line 2 has a quote within a field, wanted quotes around"),
        (b'a,b\n1,5" pipe\n2,x\n', {}, "x.csv line 2 has a quote within a field.*source.quote: ''"),
        (b'a,b\n"1\n1","x"y\n', {}, "x.csv line 3 opens a quote that closes within a field, wanted"),
        (b'a,b\n"1\n1" ,x\n', {}, "x.csv line 2 opens a quote that closes within a field on line 3, wanted"),
        (b'a,b\n1,"2\n3,"4"\n', {}, "x.csv line 2 opens a quote that closes within a field on line 3"),
        (b'a,b\n1,"""2\n3,4\n', {}, "x.csv line 2 opens a quote that is never closed"),
        (
            b"1,2\n3\n",
            {"columns": ("a", "b")},
            "x.csv line 2 has 1 fields, wanted 2 fields as in source.columns",
        ),
        (
            b"a,b\n1,2\n3,caf\xe9\n",
            {},
            r"x.csv line 3 is not in utf-8 \(byte 0xe9\).*source.encoding: latin-1",
        ),
        (b"a,b\n1,caf\xc3", {}, "x.csv line 2 is not in utf-8"),
        ("a,b\n1,é\n".encode("utf-16"), {}, "x.csv line 1 is not in utf-8.*source.encoding: utf-16"),
        ("a,b\n1,2\n".encode("utf-16-le"), {}, "x.csv line 1 holds a zero byte"),
        (b"a,b\n1,2\n3,\x00\n", {}, "x.csv line 3 holds a zero byte"),
    ],
)
def test_errors_name_the_line(tmp_path, content, dialect, problem):
    with pytest.raises(ValueError, match=problem) as error:
        look(tmp_path, content, Dialect(**dialect))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "dialect", "is_copied"),
    [
        ("a,b\n1,é\n".encode(), {}, False),
        (b"\xef\xbb\xbf" + "a,b\r\n1,é\r\n".encode(), {}, False),
        ("a,b\n1,é\r\n".encode(), {}, False),
        ("a,b\r1,é".encode(), {}, True),
        ("a,b\n1,é".encode("latin-1"), {"encoding": "latin-1"}, True),
        ("a,b\r1,é\r\n".encode("utf-16"), {"encoding": "utf-16"}, True),
        (b"a;b\n1;\xe9\n", {"encoding": "cp1252", "separator": ";"}, True),
        (b'a,b\n"1",\xc3\xa9\n', {}, False),
        ('\ufeff"a","b"\n"1","é"\n'.encode(), {}, False),
    ],
)
def test_encodings_and_line_ends(tmp_path, content, dialect, is_copied):
    file = look(tmp_path, content, Dialect(**dialect))
    assert (file.columns, file.rows, file.line(0)) == (["a", "b"], 1, 2)
    assert (file.path.name == "copy.csv") == is_copied
    assert read(file).rows() == [("1", "é")]


def test_ascii_in_another_encoding_is_not_copied(tmp_path):
    assert look(tmp_path, b"a\n1\n", Dialect(encoding="latin-1")).path.name == "x.csv"


def test_compressed_text(tmp_path):
    file = look(tmp_path, gzip.compress(b"a,b\n1,2\n"), name="x.csv.gz")
    assert read(file).rows() == [("1", "2")]
    whole = gzip.compress(np.random.default_rng(0).bytes(1000).hex().encode())
    with pytest.raises(ValueError, match=r"x.csv.gz cannot be read"):
        look(tmp_path, whole[:200], name="x.csv.gz")


BOOKS = b"""isbn;title;publisher
"1";"Caf\xe9";"Small &amp; Sons"
"2";"The \\"Good\\" Life; 1";"C:\\\\"
"3";"\\"All\\"";"x"
"""


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 22])
def test_quotes_with_an_escape_sign(tmp_path, monkeypatch, block):
    """As in Book-Crossing: within quotes a quote has a backslash before it, and `;` is a letter."""
    monkeypatch.setattr(delimited, "BLOCK", block)
    file = look(tmp_path, BOOKS, Dialect(";", encoding="latin-1", escape="\\"))
    assert read(file).rows() == [
        ("1", "Café", "Small &amp; Sons"),
        ("2", 'The "Good" Life; 1', "C:\\"),
        ("3", '"All"', "x"),
    ]
    assert [file.line(row) for row in range(3)] == [2, 3, 4]


def test_a_remedy_is_named_where_it_gets_the_whole_file_through(tmp_path):
    dropped = ", or leave such lines out with source.faulty: drop$"
    letters = rf", or set source.quote: '' if \" is a letter like any{dropped}"
    escape = (
        rf"; mend the line, or set source.escape: '\\', which stands before quotes that are letters{dropped}"
    )
    with pytest.raises(ValueError, match=rf"line 3 opens a quote that closes within a field.*{escape}"):
        look(tmp_path, BOOKS, Dialect(";", encoding="latin-1"))
    with pytest.raises(ValueError, match=rf"line 2 has a quote within a field.*{letters}"):
        look(tmp_path, b'a,b\n1,5" pipe\n2,x\n')
    for content in (b'a,b\n1,5" pipe\n2,"x,y"\n', b'"a",b\n1,5" pipe\n2,x\n', b"a,b\n1,2,3\n4,5\n"):
        with pytest.raises(ValueError, match=rf"; mend the line{dropped}"):
            look(tmp_path, content)
    for content in (b"a,b\n1,2,3\n", b'a,b\n\n1,"2,3\n'):  # nothing would be left
        with pytest.raises(ValueError, match=r"; mend the line$"):
            look(tmp_path, content)
        with pytest.raises(ValueError, match=r"none of its 1 such lines is left, wanted some; mend them$"):
            look(tmp_path, content, drop=True)


def test_a_field_of_escaped_quotes_only_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x.csv line 3 has a field of escaped quotes only"):
        look(tmp_path, b'a,b\n1,2\n3,\\"\n', Dialect(escape="\\"))


@settings(max_examples=100, deadline=None)
@given(
    cells=st.lists(st.text(st.sampled_from('a\\";\n'), max_size=6), min_size=1, max_size=12),
    block=st.integers(1, 40),
)
def test_what_python_writes_with_an_escape_sign_is_read_or_refused(tmp_path_factory, cells, block):
    text = io.StringIO(newline="")
    style = {"escapechar": "\\", "doublequote": False, "quoting": csv.QUOTE_ALL, "lineterminator": "\n"}
    csv.writer(text, delimiter=";", **style).writerows([["n", "cell"], *enumerate(cells)])
    whole, delimited.BLOCK = delimited.BLOCK, block
    try:
        file = look(tmp_path_factory.mktemp("x"), text.getvalue(), Dialect(";", escape="\\"))
        assert read(file)["cell"].fill_null("").to_list() == cells
    except ValueError as error:
        if "has a field of escaped quotes only" not in str(error):
            raise
    finally:
        delimited.BLOCK = whole


def test_quotes_that_are_letters(tmp_path):
    file = look(tmp_path, b'a,b\n1,5" pipe\n2,"x\n', Dialect(quote=""))
    assert read(file).rows() == [("1", '5" pipe'), ("2", '"x')]


def refusal(path):
    """What Python's reader says in its strict way."""
    try:
        with path.open(newline="") as stream:
            list(csv.reader(stream, strict=True))
    except csv.Error as error:
        return str(error)
    return None


@settings(max_examples=200, deadline=None)
@given(
    lines=st.lists(st.text(st.sampled_from('a,"\n'), max_size=8), min_size=1, max_size=6),
    block=st.integers(1, 40),
)
def test_any_quotes_are_read_by_polars_as_they_were_seen_or_refused(tmp_path_factory, lines, block):
    """Nothing gets through in which Python's strict reader finds other rows, or polars reads other rows."""
    folder = tmp_path_factory.mktemp("x")
    text = "a,b\n" + "\n".join(lines)
    whole, delimited.BLOCK = delimited.BLOCK, block
    try:
        file = look(folder, text)
    except ValueError as error:
        assert re.match(r"x\.csv line \d+ (has|opens) ", str(error))  # noqa: PT017
        return
    finally:
        delimited.BLOCK = whole
    assert refusal(file.path) is None
    with file.path.open(newline="") as stream:
        rows = [tuple(cell or None for cell in row) or (None, None) for row in csv.reader(stream)][1:]
    assert [tuple(cell or None for cell in row) for row in read(file).rows()] == rows
    assert file.rows == len(rows)


@pytest.mark.parametrize(
    ("content", "dialect", "rows", "lines", "broken"),
    [
        ("a,b\n1,2\n3\n4,5\n6,7,8\n9,10", {}, [("1", "2"), ("4", "5"), ("9", "10")], [2, 4, 6], [3, 5]),
        # An open quote costs its own line, whatever stands below.
        ('a,b\n1,"2\n3,"4"\n5,"6""7"\n', {}, [("3", "4"), ("5", '6"7')], [3, 4], [2]),
        ('a,b\n1,2\n3,"4\n5,6\n7,8\n', {}, [("1", "2"), ("5", "6"), ("7", "8")], [2, 4, 5], [3]),
        ('a,b\n1,5" pipe\n2,x\n', {}, [("2", "x")], [3], [2]),
        # Line breaks within quotes, before and behind broken lines; one with too many fields goes whole.
        ('a,b\n"1\n1",2\n3\n"4\n\n4",5\n6,"7\n7",8\n9,0', {},
         [("1\n1", "2"), ("4\n\n4", "5"), ("9", "0")], [2, 5, 10], [4, 8, 9]),
        ("\ufeffa,b\r\n1\r\n\r\n2,3\r\n", {}, [(None, None), ("2", "3")], [3, 4], [2]),
        ('\ufeff"a","b"\n"1"x,2\n3,4', {}, [("3", "4")], [3], [2]),
        ("1,2\n3\n4,5\n", {"columns": ("a", "b")}, [("1", "2"), ("4", "5")], [1, 3], [2]),
        ("1;2\n3;caf\xe9;4\n5;\xe9".encode("latin-1"), {"columns": ("a", "b"), "separator": ";",
         "encoding": "latin-1"}, [("1", "2"), ("5", "é")], [1, 3], [2]),
        ('a\tb\n1\t"2\n3\t4\t5\n', {"separator": "\t", "quote": ""}, [("1", '"2')], [2], [3]),
        ('a;b\n"1";"x \\"y\\""\n"2";\\"\n3;"z\n"4";"\\\\"\n', {"separator": ";", "escape": "\\"},
         [("1", 'x "y"'), ("4", "\\")], [2, 5], [3, 4]),
    ],
)  # fmt: skip
def test_broken_lines_are_left_out_one_by_one(tmp_path, capsys, content, dialect, rows, lines, broken):
    dialect = Dialect(**dialect)
    with pytest.raises(ValueError, match=rf"x.csv line {broken[0]} ") as error:
        look(tmp_path, content, dialect)
    file = look(tmp_path, content, dialect, drop=True)
    options = {"separator": dialect.separator, "quote_char": dialect.quote or None}
    got = pl.read_csv(
        file.path, infer_schema=False, glob=False, has_header=not dialect.columns, **options
    ).rows()
    assert [tuple(cell and cell.replace("\r", "") for cell in row) for row in got] == rows
    assert (file.columns, file.rows) == (["a", "b"], len(rows))
    assert file.broken.tolist() == broken
    assert [file.line(row) for row in range(file.rows)] == lines
    told = capsys.readouterr().out
    assert told.startswith(str(error.value).partition("; mend")[0])
    assert f"; {len(broken)} such line" in told


@settings(max_examples=200, deadline=None)
@given(
    lines=st.lists(st.text(st.sampled_from('a,"\n'), max_size=8), min_size=1, max_size=6),
    block=st.integers(1, 40),
)
def test_what_is_left_of_any_lines_is_read_alike_by_all(tmp_path_factory, lines, block):
    """Broken lines and those of the records are all lines; without a broken one nothing is left out."""
    folder = tmp_path_factory.mktemp("x")
    text = "a,b\n0,0\n" + "\n".join(lines) + "\n"
    whole, delimited.BLOCK = delimited.BLOCK, block
    try:
        file = look(folder, text, drop=True)
        try:
            assert look(folder, text).rows == file.rows
            is_whole = True
        except ValueError:
            is_whole = False
        firsts = [file.line(row) for row in range(file.rows)]
    finally:
        delimited.BLOCK = whole
    assert is_whole == (not len(file.broken))
    file = look(folder, text, drop=True)
    assert refusal(file.path) is None
    with file.path.open(newline="") as stream:
        rows = [tuple(cell or None for cell in row) or (None, None) for row in csv.reader(stream)][1:]
    assert [tuple(cell or None for cell in row) for row in read(file).rows()] == rows
    assert file.rows == len(rows)
    every = text.splitlines(keepends=True)
    taken = file.path.read_text().splitlines(keepends=True)
    left = [line for number, line in enumerate(every, 1) if number not in set(file.broken.tolist())]
    assert taken == left
    assert not set(firsts) & set(file.broken.tolist())


@settings(max_examples=100, deadline=None)
@given(
    table=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8),
    bad=st.lists(st.tuples(st.integers(0, 8), st.sampled_from(["x", "x,y,z", 'x,5" y', '"x"y,z', "x,,"]))),
)
def test_broken_lines_between_good_ones_are_all_that_is_lost(tmp_path_factory, table, bad):
    pieces = []
    for row in [("a", "b"), *table]:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL).writerow(row)
        pieces.append(text.getvalue().replace("\r", "\n"))
    good = "".join(pieces)
    for place, line in bad:
        pieces.insert(1 + min(place, len(pieces) - 1), f"{line}\n")
    folder = tmp_path_factory.mktemp("x")
    file = look(folder, "".join(pieces), drop=True)
    assert len(file.broken) == len(bad)
    assert file.path.read_text() == good
