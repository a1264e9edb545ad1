import gzip
import zipfile

import pytest

from recllm.tables import archive

TEXT = b"a,b\n1,2\n" * 5000


@pytest.fixture
def packed(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as content:
        content.writestr("set/a.csv", TEXT)
        content.writestr("set/deep/b.csv", b"b")
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_files_of_a_folder_are_found_in_it_one_below_or_unpacked(tmp_path):
    (tmp_path / "given" / "set").mkdir(parents=True)
    (tmp_path / "given" / "a.csv").write_bytes(TEXT)
    (tmp_path / "given" / "set" / "b.csv").write_bytes(b"b")
    (tmp_path / "given" / "c.json").write_bytes(b"{}")
    found = archive.find(tmp_path / "given", tmp_path / "raw", ["a.csv", "b.csv", "c.json.gz"])
    assert [str(path.relative_to(tmp_path / "given")) for path in found.values()] == [
        "a.csv",
        "set/b.csv",
        "c.json",
    ]
    assert not (tmp_path / "raw").exists()


def test_a_zip_is_unpacked_once_and_again_if_what_is_there_is_spoilt(packed, tmp_path):
    raw = tmp_path / "raw"
    found = archive.find(packed, raw, ["a.csv", "b.csv"])
    assert found == {"a.csv": raw / "a.csv", "b.csv": raw / "b.csv"}
    assert (raw / "a.csv").read_bytes() == TEXT
    before = (raw / "a.csv").stat().st_mtime_ns
    archive.find(packed, raw, ["a.csv"])
    assert (raw / "a.csv").stat().st_mtime_ns == before
    (raw / "a.csv").write_bytes(TEXT[:-2] + b"3\n")  # of the same length
    archive.find(packed, raw, ["a.csv"])
    assert (raw / "a.csv").read_bytes() == TEXT
    assert names(raw) == ["a.csv", "b.csv"]


def test_a_truncated_zip(packed, tmp_path):
    size = packed.stat().st_size
    packed.write_bytes(packed.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=rf"set.zip \({size - 100} bytes\) is no whole zip archive .* wanted .*a.csv"
    ):
        archive.find(packed, tmp_path / "raw", ["a.csv"])
    assert names(tmp_path / "raw") == []


def test_a_corrupt_zip_leaves_nothing_half_unpacked(packed, tmp_path):
    content = bytearray(packed.read_bytes())
    content[60:70] = bytes(10)  # within the compressed a.csv
    packed.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"set.zip .* is no whole zip archive \(.*\), wanted one with a.csv; remove it"
    ):
        archive.find(packed, tmp_path / "raw", ["a.csv"])
    assert names(tmp_path / "raw") == []


def test_another_file_than_a_zip(tmp_path):
    path = tmp_path / "set.tar.gz"
    path.write_bytes(gzip.compress(TEXT))
    with pytest.raises(ValueError, match=r"set.tar.gz .* is no whole zip archive \(File is not a zip file\)"):
        archive.find(path, tmp_path / "raw", ["a.csv"])


def test_missing_members_missing_files_and_empty_ones(packed, tmp_path):
    with pytest.raises(ValueError, match=r"set.zip has no c.csv, wanted it in there; point RAW"):
        archive.find(packed, tmp_path / "raw", ["c.csv"])
    with pytest.raises(ValueError, match=r"nowhere does not exist, wanted a folder or zip with c.csv"):
        archive.find(tmp_path / "nowhere", tmp_path / "raw", ["c.csv"])
    folder = tmp_path / "given"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"RAW=.*given has no a.csv, wanted a.csv, b.csv; point RAW"):
        archive.find(folder, tmp_path / "raw", ["a.csv", "b.csv"])
    (folder / "a.csv").touch()
    with pytest.raises(ValueError, match=r"given/a.csv is empty \(0 bytes\), wanted its data"):
        archive.find(folder, tmp_path / "raw", ["a.csv"])


def test_a_license_is_printed_once(tmp_path, capsys):
    for _ in range(2):
        archive.show_license(tmp_path / "raw", "Set", "for tests only")
    assert capsys.readouterr().out == "Set: for tests only\n"
    archive.show_license(tmp_path / "raw", "Set", "for all")  # it has changed
    assert capsys.readouterr().out == "Set: for all\n"


def test_counts_say_whether_a_source_is_the_published_one(tmp_path, capsys):
    wanted = {"rows": 3, "users": 2}
    assert archive.is_published(tmp_path, "", {"rows": 3, "users": 2, "more": 1}, wanted)
    assert capsys.readouterr().out == ""
    assert not archive.is_published(tmp_path, "", {"rows": 1003, "users": 2}, wanted)
    assert (
        capsys.readouterr().out
        == f"note: {tmp_path} is not the published data set: 1,003 rows (published: 3)\n"
    )
