"""What every measurement shares: rates of a loader, cost of a command, and where figures are kept."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


def rate(batches: Iterator[Any], rows: int, seconds: float = 4.0) -> dict[str, float]:
    """Rows a second of an endless loader, after a warm-up of ten batches.

    Args:
        batches: yields batches of `rows` rows for ever.
        rows: of a batch.
        seconds: how long to measure.

    Returns:
        `wall`: rows a second of wall time; `cpu`: rows a second of this process's own CPU time, which does
        not count the time that other processes held the cores; `best`: rows a second of wall time in the
        fastest quarter of the batches.
    """
    for _ in range(10):
        next(batches)
    spans: list[float] = []
    begin, own = time.perf_counter(), time.process_time()
    while (last := time.perf_counter()) - begin < seconds:
        next(batches)
        spans.append(time.perf_counter() - last)
    wall, cpu = time.perf_counter() - begin, time.process_time() - own
    quarter = sorted(spans)[: max(1, len(spans) // 4)]
    count = rows * len(spans)
    return {"wall": count / wall, "cpu": count / cpu, "best": rows * len(quarter) / sum(quarter)}


def fastest(ask: Callable[[], Any], count: int, rounds: int = 3) -> dict[str, float]:
    """Answers a second of what gives `count` of them at once: the best of some rounds, after one uncounted.

    Returns:
        `wall`: answers a second of wall time; `cpu`: of this process's own CPU time, as in `rate`; `peak_gb`:
        the largest resident set of this process so far.
    """
    ask()
    walls: list[float] = []
    owns: list[float] = []
    for _ in range(rounds):
        begin, own = time.perf_counter(), time.process_time()
        ask()
        walls.append(time.perf_counter() - begin)
        owns.append(time.process_time() - own)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"wall": count / min(walls), "cpu": count / min(owns), "peak_gb": round(peak, 2)}


def cost(command: Sequence[str], **environment: str) -> dict[str, float]:
    """Run a command in a process of its own: wall time, CPU time, and the peak of its memory in GB.

    The peak is the largest resident set of the process or of any that it started, as the kernel counts it:
    pages of mapped files that happen to be in memory count as well.

    Returns:
        `seconds`, `cpu_seconds`, `peak_gb`; on Linux `others_cpu_seconds`: CPU time that everything else on
        the machine took meanwhile, which the command could not have.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    begin, busy = time.perf_counter(), _busy()
    process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, **environment})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    own = usage.ru_utime + usage.ru_stime
    figures = {
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(own, 1),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
    }
    return figures if busy is None else figures | {"others_cpu_seconds": round(_busy() - busy - own, 1)}


def _busy() -> float | None:
    """CPU seconds that all processes of this machine have taken since it started; None where unknown."""
    table = Path("/proc/stat")
    if not table.exists():
        return None
    user, nice, system, _, _, interrupt, soft = map(int, table.read_text().split()[1:8])
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


def keep(name: str, figures: dict[str, Any], folder: str = "data") -> Path:
    """Write `results/<folder>/<name>.json`: figures under what they were measured with."""
    from recllm.files import now
    from recllm.pipeline.manifest import commit, hardware

    path = REPOSITORY / "results" / folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "command": os.environ.get("RECLLM_COMMAND", ""),
        "commit": commit(),
        "date": now(),
        "hardware": hardware(),
    }
    path.write_text(json.dumps(about | figures, indent=2) + "\n", encoding="utf-8")
    return path
