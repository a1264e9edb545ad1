import gzip

import polars as pl
import pytest

from recllm.tables import jsonl

SCHEMA = {"id": pl.String(), "stars": pl.Int64(), "tags": pl.List(pl.Struct({"name": pl.String()}))}
GOOD = (
    b'{"id": "a \\u00e9 \\ud83d\\ude00", "stars": 4, "other": [1], "tags": [{"name": "x", "count": "3"}]}\n'
)


def read(path):
    with jsonl.faults(path, SCHEMA):
        return jsonl.scan(path, SCHEMA).collect(engine="streaming")


def refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name) as error:
        read(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "pack", [gzip.compress, bytes, lambda text: gzip.compress(text[:200]) + gzip.compress(text[200:])]
)
def test_lines_are_read_plain_zipped_and_in_several_members(tmp_path, pack):
    path = tmp_path / "some.json.gz"
    path.write_bytes(pack(GOOD * 3 + b'{"id": null}\r\n\n' + GOOD.rstrip()))
    frame = read(path)
    assert frame["id"].to_list() == ["a é 😀"] * 3 + [None, "a é 😀"]
    assert frame["stars"].to_list() == [4, 4, 4, None, 4]
    assert frame["tags"][0].to_list() == [{"name": "x"}]


def test_a_line_at_fault_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "BLOCK", 1000)  # so that there are many
    text = GOOD * 40 + b'{"id": "b", "stars": "many"}\n' + GOOD * 3
    assert 'some line 41 has \'{"id": "b", "stars": "many"}\' (cannot parse \'many\'' in refused(
        tmp_path / "some", gzip.compress(text)
    )
    assert ' line 44 has \'{"id": "a' in refused(tmp_path / "some", GOOD * 43 + GOOD[:30])
    assert " line 3 has 'oops' (" in refused(tmp_path / "some", GOOD * 2 + b"oops\n" + GOOD)
    assert "wanted a JSON object; get the file again" in refused(tmp_path / "some", GOOD + b"[1, 2]\n")


@pytest.mark.parametrize("place", [1, 2, 499, 999])
def test_the_first_of_several_faults_is_found_in_few_steps(tmp_path, monkeypatch, place):
    rows = [GOOD, b"\n"] * 500
    rows[place] = b'{"id": "x"}\r{"id": "y"}\n'  # a CR alone ends no line of JSON
    rows[place + 1 :: 100] = [b"oops\n"] * len(rows[place + 1 :: 100])
    calls, error = [], jsonl._error
    monkeypatch.setattr(jsonl, "_error", lambda *given: calls.append(given) or error(*given))
    said = refused(tmp_path / "some", b"".join(rows))
    assert f' line {place + 1} has \'{{"id": "x"}}\\r' in said
    assert len(calls) < 15  # 2^10 lines


def test_a_truncated_or_corrupt_stream(tmp_path):
    packed = gzip.compress(GOOD * 1000, mtime=0)
    assert "truncated or corrupt gzip stream (Compressed file ended" in refused(
        tmp_path / "some", packed[:-20]
    )
    assert "truncated or corrupt gzip stream (" in refused(
        tmp_path / "some", packed[:40] + bytes(9) + packed[49:]
    )
    wrong_sum = packed[:-8] + bytes(4) + packed[-4:]
    assert "truncated or corrupt gzip stream (CRC check failed" in refused(tmp_path / "some", wrong_sum)


def test_what_is_no_such_file_at_all(tmp_path):
    assert "line 1 has nothing, wanted a JSON object" in refused(tmp_path / "some", b"")
    assert "line 1 has nothing, wanted a JSON object" in refused(tmp_path / "some", gzip.compress(b""))
    assert "line 1 has '<html>', wanted a JSON object" in refused(tmp_path / "some", b"<html>")
    assert "line 1 has id, name, wanted also stars, tags;" in refused(
        tmp_path / "some", b'{"id": "a", "name": 1}'
    )


def test_an_error_that_is_not_the_files_fault_passes(tmp_path):
    path = tmp_path / "some"
    path.write_bytes(GOOD)
    with pytest.raises(OSError, match="disk"), jsonl.faults(path, SCHEMA):
        raise OSError("the disk is full")
