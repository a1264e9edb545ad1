"""Work that is dealt over processes: who computes what, and that all come to have the whole."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from recllm import processes
from tests.children import environment

REPOSITORY = Path(__file__).parents[1]
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from recllm import processes
from recllm.cache import Cache
from recllm.config.trainer import TrainerConfig
from recllm.console import is_first_process
from recllm.training.launch import start_processes

config = TrainerConfig(accelerator="cpu", devices=2, strategy=sys.argv[1])
assert processes.world() == 1
start_processes(config)
start_processes(config)  # no second time
rank = processes.rank()
assert processes.world() == 2
assert is_first_process() == (rank == 0)

# Five batches of two rows; what no other process computes is 0 here, and NaN, -0 and inf come through.
rows = np.array([1.5, np.nan, -0.0, np.inf, 3, 4, 5, 6, 7], np.float32)
values = np.zeros(9, np.float32)
numbers = []
for number, is_own in processes.dealt(5):
    numbers.append(number)
    if is_own:
        values[2 * number : 2 * number + 2] = rows[2 * number : 2 * number + 2]
assert numbers == ([0, 2, 4] if rank == 0 else [1, 3, 4])
processes.CHUNK = 5  # of 36 bytes
processes.complete(values)
assert values.tobytes() == rows.tobytes()

assert processes.all_agree(True)
assert not processes.all_agree(rank == 0)
made = []
def make():
    made.append(rank)
    return {"rank": rank}
assert processes.from_first(make) == {"rank": 0}
assert made == ([0] if rank == 0 else [])

# What one process finds and another does not is computed by both together.
cache = Cache(Path(sys.argv[2]) / str(rank))
if rank == 0:
    with processes.alone():
        assert processes.world() == 1
        cache.array("one", "what", lambda: np.full(3, 9.0, np.float32))
def compute():
    computed = np.zeros(3, np.float32)
    computed[rank] = 1 + rank
    processes.complete(computed)
    return computed
assert cache.array("one", "what", compute).tolist() == [1, 2, 0]
assert cache.array("one", "what", lambda: 1 / 0).tolist() == [1, 2, 0]

processes.leave()
assert processes.world() == 1 and processes.rank() == 0
(Path(sys.argv[2]) / f"passed-{rank}").touch()
"""


@pytest.mark.parametrize("strategy", ["auto", "sharded"])
def test_two_processes_share_what_they_compute(tmp_path, strategy):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program), strategy, str(tmp_path)],
        cwd=REPOSITORY,
        env=environment(PYTHONPATH=str(REPOSITORY)),
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("passed-*")) == ["passed-0", "passed-1"]


def test_one_process_does_all():
    assert list(processes.dealt(3)) == [(0, True), (1, True), (2, True)]
    assert list(processes.dealt(0)) == []
    values = np.arange(3)
    processes.complete(values)
    assert values.tolist() == [0, 1, 2]
    assert processes.all_agree(True)
    assert not processes.all_agree(False)
    assert processes.from_first(lambda: 7) == 7


def test_all_processes_compute_equally_many_batches(monkeypatch):
    """A forward of a sharded LM waits for all: who has none left repeats the last one, in vain."""
    monkeypatch.setattr(processes, "world", lambda: 4)
    dealt = []
    for rank in range(4):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        dealt.append(list(processes.dealt(6)))
    assert dealt == [
        [(0, True), (4, True)],
        [(1, True), (5, True)],
        [(2, True), (5, False)],
        [(3, True), (5, False)],
    ]
