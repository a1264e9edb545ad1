import polars as pl
import pytest

from recllm.tables.config import FileSource
from recllm.tables.readers import AT, file_of, open_files

ROLES = {"user": ("source.events.user", "who"), "rating": ("source.events.rating", "")}


def open_(tmp_path, path="x.csv", rest=False, **options):
    source = FileSource(path=path, **options)
    return open_files("events", source, tmp_path, ROLES, tmp_path / "scratch", rest)


def test_a_file_and_the_place_of_a_row(tmp_path):
    (tmp_path / "x.csv").write_text('who,"at",what\na,1,"p\nq"\n\nb,2,r\n')
    (file,) = open_(tmp_path, rest=True)
    assert file.frame.collect().rows() == [(0, "a", "1", "p\nq"), (1, None, None, None), (2, "b", "2", "r")]
    assert file.frame.collect().columns == [AT, "@user", "at", "what"]
    assert (file.rows, file.place(2), file.value(2, "user")) == (3, "x.csv line 5", "b")
    (file,) = open_(tmp_path)
    assert file.frame.collect().columns == [AT, "@user"]


def test_a_folder_in_the_order_of_names(tmp_path):
    folder = tmp_path / "log" / "day[1]"
    folder.mkdir(parents=True)
    (folder / "b.csv").write_text("what,who\n3,c\n")  # columns go by name
    (folder / "a.csv").write_bytes(b"\xef\xbb\xbfwho,what\r\na,1\r\nb,2\r\n")
    (folder / "_SUCCESS").write_text("")
    (folder / ".hidden").write_text("")
    files = open_(tmp_path, "log")
    rows = pl.concat([file.frame for file in files]).collect().rows()
    assert rows == [(0, "a"), (1, "b"), (2**40, "c")]
    assert [file_of(files, at).place(at) for at, _ in rows] == [
        "log/day[1]/a.csv line 2",
        "log/day[1]/a.csv line 3",
        "log/day[1]/b.csv line 2",
    ]


def test_parquet(tmp_path):
    pl.DataFrame({"who": [2**40, None], "@at": [1, 2]}).write_parquet(tmp_path / "x.parquet")
    (file,) = open_(tmp_path, "x.parquet")
    assert file.frame.collect().rows() == [(0, 2**40), (1, None)]
    assert file.place(1) == "x.parquet row 2"


@pytest.mark.parametrize(
    ("name", "content", "options", "rows"),
    [
        ("x.tsv", "who\twhat\na\t1\n", {}, [(0, "a")]),
        ("x.txt", "what;who\n1;NA\n", {"separator": ";", "nulls": ["NA"]}, [(0, None)]),
        ("x.DAT", "a|1\n", {"separator": "|", "columns": ["who", "what"]}, [(0, "a")]),
        ("x.csv", ' who ,what\n"a ""b""",1\n', {}, [(0, 'a "b"')]),
    ],
)
def test_forms_of_text(tmp_path, name, content, options, rows):
    (tmp_path / name).write_text(content)
    (file,) = open_(tmp_path, name, **options)
    assert file.frame.collect().rows() == rows


@pytest.mark.parametrize(
    ("files", "path", "problem"),
    [
        ({}, "x.csv", r"x.csv \(source.events.path\) does not exist.*RAW=<folder>"),
        ({"d/_x.csv": "who\n"}, "d", "empty folder"),
        ({"d/x.csv": "who\na\n", "d/y.tsv": "who\na\n"}, "d", "several kinds, .csv, .tsv"),
        ({"x.xlsx": "who"}, "x.xlsx", "no known kind, wanted one of .csv"),
        ({"x.csv": "who\n"}, "x.csv", "x.csv has no rows, wanted the events"),
        ({"x.csv": "whom,what\na,b\n"}, "x.csv", r"columns whom, what, wanted also 'who'.*nearest is 'whom'"),
        ({"x.csv": "who,who\na,b\n"}, "x.csv", r"2 columns 'who' \(source.events.user\)"),
        ({"x.csv": "who;what\na;b\n"}, "x.csv", "looks like source.events.separator: ';'"),
        ({"x.parquet": "who"}, "x.parquet", "x.parquet is no parquet file"),
    ],
)  # fmt: skip
def test_errors_are_one_line(tmp_path, files, path, problem):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=problem) as error:
        open_(tmp_path, path)
    assert "\n" not in str(error.value)
