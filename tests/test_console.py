"""What long loops say, and when."""

import itertools
import threading

import pytest

from recllm import console
from recllm.console import Progress, duration, pulse, say


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand: `clock(40)` is forty seconds later."""
    seconds = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: seconds[0])
    say("begins")

    def later(by):
        seconds[0] += by

    return later


def test_a_line_comes_where_nothing_was_said_for_half_a_minute(clock, capsys):
    progress = Progress("rows scored", 1_000)
    clock(29)
    progress.reached(100)
    clock(11)  # 40 s for 200 rows: 5 a second, and 800 are left
    progress.reached(200, "train/loss 0.5")
    clock(29)
    progress.reached(300)
    say("another line")
    clock(29)
    progress.reached(400)
    assert capsys.readouterr().out.splitlines() == [
        "200 of 1,000 rows scored, train/loss 0.5, 5.0 a second, 3 min left",
        "another line",
    ]


def test_a_loop_that_begins_after_a_silence_waits_for_its_own(clock, capsys):
    clock(100)
    progress = Progress("steps", 100)
    clock(29)
    progress.reached(50)
    assert not capsys.readouterr().out
    clock(1)
    progress.reached(60)
    assert capsys.readouterr().out == "60 of 100 steps, 2.0 a second, 20 s left\n"


def test_a_loop_that_goes_on_counts_what_it_does_itself(clock, capsys):
    progress = Progress("steps", 100, done=40)
    clock(60)
    progress.reached(40)
    progress.reached(50)  # 10 steps of 6 s; 50 are left
    assert capsys.readouterr().out.splitlines() == ["50 of 100 steps, 6.0 s each, 5 min left"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (5_940, "99 min"),
        (6_000, "1 h 40 min"),
        (11_100, "3 h 05 min"),
    ],
)
def test_durations_are_rounded_for_people(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("ranks", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, True),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"RANK": "1", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),  # torchrun on the second machine
        ({"SLURM_PROCID": "3"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # started by the first process of a job
    ],
)
def test_one_process_over_all_machines_speaks(monkeypatch, capsys, ranks, first):
    for name in console.RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    say("a line")
    assert (capsys.readouterr().out == "a line\n") == first


def test_work_that_tells_nothing_is_told_of(monkeypatch, capsys):
    """Each look at the clock finds it half a minute later; the block ends when it was told of twice."""
    told = threading.Semaphore(0)
    seconds = itertools.count(0, 30)
    monkeypatch.setattr(console.time, "monotonic", lambda: next(seconds))

    def state():
        told.release()
        return "at work"

    with pulse(state, every=0.001):
        assert told.acquire(timeout=30)
        assert told.acquire(timeout=30)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2
    assert set(lines) == {"at work"}


def test_what_says_something_itself_is_not_told_of(monkeypatch, capsys):
    looks = threading.Semaphore(0)

    def now():
        looks.release()
        return 1000.0

    monkeypatch.setattr(console.time, "monotonic", now)
    with pulse(lambda: "at work", every=0.001):
        say("a line")
        for _ in range(10):
            assert looks.acquire(timeout=30)
    assert capsys.readouterr().out == "a line\n"
