"""Arrays computed once: found again, bounded, deleted at any time, and shared by processes."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from recllm.cache import Cache, Hasher
from recllm.errors import StageError

REPOSITORY = Path(__file__).parents[1]


def values(number, size=1000):
    return np.full(size, number, np.float32)


def kept(cache, number, size=1000, calls=None):
    """The array of this number; `calls` grows where it was computed."""

    def compute():
        if calls is not None:
            calls.append(number)
        return values(number, size)

    return cache.array("name", [number, size], compute)


def files(cache):
    return sorted(cache.folder.rglob("*.npy"), key=lambda path: path.stat().st_mtime)


def used_at(path, second):
    os.utime(path, (second, second))


def test_what_is_kept_is_not_computed_again(tmp_path, capsys):
    cache, calls = Cache(tmp_path / "cache"), []
    for number in (1, 1, 2, 1):
        np.testing.assert_array_equal(kept(cache, number, calls=calls), values(number))
    assert calls == [1, 2]
    assert capsys.readouterr().out.count("scored name") == 2
    assert len(files(cache)) == 2
    assert not [path.name for path in cache.folder.iterdir() if path.suffix != ".npy"]


def test_names_are_for_people_and_may_be_folders_of_stages(tmp_path):
    cache = Cache(tmp_path)
    cache.array("ctr-stage2/lora+s1", "what", lambda: values(1))
    assert [path.name.startswith("ctr-stage2-lora+s1-") for path in tmp_path.iterdir()] == [True]


def test_what_is_given_cannot_be_written_into(tmp_path):
    cache = Cache(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match="read-only"):
            kept(cache, 1)[0] = 2
    filled = cache.arrays("set", "0" * 64, {"a": ((3,), np.int32)}, lambda arrays: None)
    with pytest.raises(ValueError, match="read-only"):
        filled["a"][0] = 2


def test_the_bound_is_kept_and_the_oldest_go_first(tmp_path):
    cache = Cache(tmp_path, gigabytes=3 * 4200 / 1e9)  # three arrays of 4,000 bytes and their headers
    for number in range(3):
        kept(cache, number)
        used_at(files(cache)[-1], 1000 + number)
    kept(cache, 0)  # read now: the second one is the oldest
    kept(cache, 3)
    assert sum(path.stat().st_size for path in files(cache)) <= cache.bytes
    calls = []
    for number in (0, 2, 3):
        kept(cache, number, calls=calls)
    assert calls == []
    kept(cache, 1, calls=calls)
    assert calls == [1]


def test_the_bound_is_that_of_the_environment(tmp_path, monkeypatch):
    assert Cache(tmp_path).bytes == 20_000_000_000
    monkeypatch.setenv("RECLLM_CACHE_GB", "0.5")
    assert Cache(tmp_path).bytes == 500_000_000
    assert Cache(tmp_path, gigabytes=2).bytes == 2_000_000_000


def test_what_is_larger_than_the_bound_is_computed_all_the_same(tmp_path):
    cache = Cache(tmp_path, gigabytes=1e-6)
    np.testing.assert_array_equal(kept(cache, 1), values(1))
    np.testing.assert_array_equal(kept(cache, 2), values(2))
    assert len(files(cache)) == 1


def test_a_deleted_cache_is_made_anew(tmp_path):
    cache, calls = Cache(tmp_path / "cache"), []
    kept(cache, 1, calls=calls)
    for path in files(cache):
        path.unlink()
    cache.folder.rmdir()
    np.testing.assert_array_equal(kept(cache, 1, calls=calls), values(1))
    assert calls == [1, 1]


@pytest.mark.parametrize("size", [0, 40, 600])
def test_a_file_that_is_cut_short_is_made_anew(tmp_path, size):
    cache, calls = Cache(tmp_path), []
    kept(cache, 1, calls=calls)
    (path,) = files(cache)
    path.write_bytes(path.read_bytes()[:size])
    np.testing.assert_array_equal(kept(cache, 1, calls=calls), values(1))
    assert calls == [1, 1]
    shapes = {"a": ((100,), np.float32), "b": ((50,), np.float32)}

    def fill(arrays):
        calls.append("set")
        for array in arrays.values():
            array[:] = 7

    cache.arrays("set", "0" * 64, shapes, fill)
    cut = next(tmp_path.glob("set-b-*"))
    cut.write_bytes(cut.read_bytes()[: size // 2])
    assert (cache.arrays("set", "0" * 64, shapes, fill)["b"] == 7).all()
    assert calls[2:] == ["set", "set"]


def test_a_mapped_array_outlives_its_file(tmp_path):
    cache = Cache(tmp_path, gigabytes=4200 / 1e9)
    first = kept(cache, 1)
    filled = cache.arrays("set", "0" * 64, {"a": ((900,), np.float32)}, lambda arrays: arrays["a"].fill(5))
    assert len(files(cache)) == 1  # the first one had to go
    kept(cache, 2)
    np.testing.assert_array_equal(first, values(1))
    np.testing.assert_array_equal(filled["a"], values(5, 900))


def test_a_set_of_which_a_part_is_gone_is_filled_again(tmp_path):
    cache, calls = Cache(tmp_path), []
    shapes = {"a": ((3,), np.float32), "b": ((2, 2), np.int64)}

    def fill(arrays):
        calls.append(1)
        arrays["a"][:] = [1, 2, 3]
        arrays["b"][:] = len(calls)

    assert cache.arrays("set", "0" * 64, shapes, fill)["a"].tolist() == [1, 2, 3]
    assert cache.arrays("set", "0" * 64, shapes, fill)["b"].tolist() == [[1, 1], [1, 1]]
    next(tmp_path.glob("set-a-*")).unlink()
    assert cache.arrays("set", "0" * 64, shapes, fill)["b"].tolist() == [[2, 2], [2, 2]]
    assert len(files(cache)) == 2


def test_a_fill_that_fails_leaves_nothing(tmp_path):
    def fails(arrays):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Cache(tmp_path).arrays("set", "0" * 64, {"a": ((3,), np.float32)}, fails)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    ask = """
import sys
import numpy as np
from recllm.cache import Cache
from tests.unprivileged import obey_permissions
obey_permissions()
Cache(sys.argv[1]).array("name", 1, lambda: np.zeros(3))
"""
    tmp_path.chmod(0o555)
    for folder in (tmp_path, tmp_path / "new"):
        command = [sys.executable, "-c", ask, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
        assert done.returncode != 0
        line = done.stderr.strip().splitlines()[-1]
        assert re.search(r"StageError: the cache .* cannot be written to; wanted .* RECLLM_CACHE=", line)
    tmp_path.chmod(0o755)


def test_a_cache_that_may_be_read_only_is_read(tmp_path, monkeypatch):
    cache, calls = Cache(tmp_path), []
    kept(cache, 1, calls=calls)

    def refused(*_, **__):
        raise PermissionError

    monkeypatch.setattr(os, "utime", refused)
    monkeypatch.setattr(os, "access", lambda *_: False)
    np.testing.assert_array_equal(kept(cache, 1, calls=calls), values(1))
    assert calls == [1]
    with pytest.raises(StageError, match="RECLLM_CACHE"):
        kept(cache, 2)


WRITER = """
import sys, time
import numpy as np
from recllm.cache import Cache
from recllm.files import digest

folder, own, start, gigabytes = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
cache = Cache(folder, gigabytes)
time.sleep(max(0.0, start - time.time()))  # both begin at once
for turn in range(40):
    number = (turn + 5 * own) % 12
    one = cache.array("one", number, lambda: np.full(5000, number, np.float32))
    assert (one == number).all() and len(one) == 5000
    def fill(arrays):
        arrays["a"][:] = number
        arrays["b"][:] = -number
    some = cache.arrays("some", digest(number), {"a": ((700,), "i8"), "b": ((9, 9), "f4")}, fill)
    assert (some["a"] == number).all() and (some["b"] == -number).all()
"""


def test_a_file_that_is_being_written_is_not_removed_for_another(tmp_path):
    """However long ago it was begun."""
    cache = Cache(tmp_path, gigabytes=2 * 4200 / 1e9)

    def fill(arrays):
        arrays["a"][:] = 1
        (at_work,) = tmp_path.iterdir()
        used_at(at_work, 1000)
        for number in (2, 3):
            kept(cache, number)

    assert (cache.arrays("set", "0" * 64, {"a": ((1000,), np.float32)}, fill)["a"] == 1).all()


@pytest.mark.parametrize(
    "gigabytes",
    [pytest.param(1.0, id="room for all"), pytest.param(15e-5, id="room for half")],
)
def test_two_processes_share_a_folder(tmp_path, gigabytes):
    start = time.time() + 3
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(own), str(start), str(gigabytes)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in (0, 1)
    ]
    for writer in writers:
        _, stderr = writer.communicate(timeout=120)
        assert writer.returncode == 0, stderr
    left = files(Cache(tmp_path))
    assert [path for path in tmp_path.iterdir() if path not in left] == []  # no temporary file
    if gigabytes == 1.0:
        assert len(left) == 36
    else:
        assert len(left) < 36
    assert sum(path.stat().st_size for path in left) <= 1e9 * gigabytes + 2 * 30_000  # a file of each at work


def test_a_hasher_tells_shapes_and_types_apart():
    one = Hasher().add("rows", np.arange(6))
    assert one.hexdigest() == Hasher().add("rows", np.arange(6)).hexdigest()
    others = [np.arange(6).reshape(2, 3), np.arange(6, dtype=np.int32), np.arange(7)]
    assert one.hexdigest() not in [Hasher().add("rows", other).hexdigest() for other in others]
    copy = one.copy().add("more")
    assert copy.hexdigest() != one.hexdigest()
