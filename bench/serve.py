"""The HTTP service under load: `make bench-serve`.

    python -m bench.serve artifacts/demo/bundle/reclora seconds=10 soak=100000 retrieved=20 ranked=20

Three cascades are served, each by a process of its own on loopback: the retriever alone, with the CRM, and
with the LM. 1, 8 and 32 clients ask for ten items for one known user a request, each as soon as it has its
last answer. Given are requests a second of wall time, p50 and p99 of what a client waits, and the service's
own CPU time a request. At 32 clients the same is asked of a service that takes requests one at a time
(`--batch-users 1`), and every user's list is compared with that of `Recommender.recommend`. Then 8 clients of
one user each ask beside one that asks for 64 users at once, and a soak looks at the memory of the service.

Clients and service share the cores, and a core is shared with whatever else runs: compare figures of one run.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.clock import REPOSITORY, keep

CLIENTS = (1, 8, 32)
K = 10
STEPS = ("retriever", "crm", "lm")
"""A cascade of the measurement is this and all before it."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        bundle: with a retriever, a CRM and an LM.
        seconds: of each measurement.
        soak: requests of the soak.
        retrieved: items that the retriever hands on.
        ranked: items that the LM orders.
    """

    bundle: Path
    seconds: float = 10.0
    soak: int = 100_000
    retrieved: int = 20
    ranked: int = 20

    @classmethod
    def parse(cls, words: Sequence[str]) -> Plan:
        """Of words such as `seconds=3`; the one without a sign of equality is the bundle."""
        given: dict[str, Any] = {}
        for word in words:
            name, is_setting, value = word.partition("=")
            if is_setting:
                given[name] = float(value) if name == "seconds" else int(value)
            else:
                given["bundle"] = Path(word)
        return cls(**given)


# ---- the service


def recommender_of(plan: Plan, last: str) -> Any:
    """The bundle's recommender, with the steps up to the last one."""
    from recllm.serving.recommender import Recommender

    recommender = Recommender.load(plan.bundle)
    cascade = recommender.cascade
    rerankers = []
    for reranker in cascade.rerankers[: STEPS.index(last)]:
        depth = plan.ranked if reranker.step.name == "lm" else plan.retrieved
        rerankers.append(replace(reranker, depth=depth))
    recommender.cascade = replace(cascade, retrieved=plan.retrieved, rerankers=rerankers)
    lm = recommender.parts.lm if last == "lm" else None
    if lm is not None:
        lm.most_open = 2
    crm = recommender.parts.crm if last != "retriever" else None
    recommender.parts = replace(recommender.parts, cascade=recommender.cascade, lm=lm, crm=crm)
    return recommender


def child(words: Sequence[str]) -> int:
    """Serve one of the cascades, in a process of its own: last step, users of a batch, and the plan."""
    from recllm.files import now
    from recllm.serving.server.running import run
    from recllm.serving.server.served import Served
    from recllm.serving.server.settings import Settings

    last, batch_users, *rest = words
    plan = Plan.parse(rest)

    def load() -> Served:
        served = Served(recommender_of(plan, last), "bench", None, now())
        served.warm()
        return served

    settings = Settings(port=0, batch_users=int(batch_users), deadline=120)
    return run(load, settings, None)


@contextmanager
def serving(plan: Plan, last: str, batch_users: int = 32) -> Iterator[int]:
    """A service that is ready; its port."""
    words = [str(plan.bundle), f"retrieved={plan.retrieved}", f"ranked={plan.ranked}"]
    command = [sys.executable, "-m", "bench.serve", "child", last, str(batch_users), *words]
    environment = {"GOMP_SPINCOUNT": "20000", "OPENBLAS_NUM_THREADS": "1", "EVENTS_URL": "", **os.environ}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        port = 0
        for line in process.stderr:
            facts = json.loads(line) if line.startswith("{") else {"event": line}
            port = facts.get("port", port)
            if facts["event"] == "bundle ready":
                break
        else:
            raise RuntimeError(f"the service with {last} ended before it was ready")
        # The log of requests goes on, and a full pipe would stop the service.
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        yield port
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()
    drain.wait()


# ---- the clients


@dataclass
class Load:
    """What clients saw.

    Attributes:
        waits: seconds of each answer.
        seconds: of the measurement.
        failed: answers without status 200.
        lists: user -> the first answer.
    """

    waits: list[float]
    seconds: float
    failed: int
    lists: dict[int, Any]

    def figures(self) -> dict[str, float]:
        """Requests a second, median and 99th percentile in milliseconds."""
        p50, p99 = np.percentile(self.waits, (50, 99))
        return {
            "requests": len(self.waits),
            "failed": self.failed,
            "per_second": round(len(self.waits) / self.seconds, 1),
            "p50_ms": round(1000 * p50, 1),
            "p99_ms": round(1000 * p99, 1),
        }


async def ask(
    streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], method: str, path: str, body: bytes = b""
) -> tuple[int, bytes]:
    """One request on a connection that stays open."""
    reader, writer = streams
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    answer = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in answer.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    content = await reader.readexactly(int(length.split(b":")[1]))
    return int(answer.split(b" ", 2)[1]), content


async def load(
    port: int, clients: int, users: Sequence[int], seconds: float, most: int | None = None, together: int = 0
) -> Load:
    """Let clients ask for one user after the other.

    Args:
        port: of the service.
        clients: connections, each of which waits for its answer before it asks again.
        users: who is asked for, in turn.
        seconds: how long.
        most: requests after which it ends, if that is sooner.
        together: users of one more client's every request, which is not counted; 0: there is none.
    """
    seen = Load([], 0.0, 0, {})
    begin = time.perf_counter()
    turn = 0

    def is_over() -> bool:
        return time.perf_counter() - begin > seconds or (most is not None and turn >= most)

    async def client() -> None:
        nonlocal turn
        streams = await asyncio.open_connection("127.0.0.1", port)
        while not is_over():
            user = users[turn % len(users)]
            turn += 1
            body = json.dumps({"users": [{"user": user}], "k": K}).encode()
            start = time.perf_counter()
            status, content = await ask(streams, "POST", "/recommend", body)
            seen.waits.append(time.perf_counter() - start)
            if status != 200:
                seen.failed += 1
            elif user not in seen.lists:
                seen.lists[user] = json.loads(content)["answers"][0]["items"]
        streams[1].close()

    async def greedy() -> None:
        streams = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps({"users": [{"user": user} for user in users[:together]], "k": K}).encode()
        while not is_over():
            await ask(streams, "POST", "/recommend", body)
        streams[1].close()

    await asyncio.gather(*(client() for _ in range(clients)), *([greedy()] if together else []))
    seen.seconds = time.perf_counter() - begin
    return seen


async def metric(port: int, name: str) -> float:
    """A figure that the service tells of itself."""
    streams = await asyncio.open_connection("127.0.0.1", port)
    _, content = await ask(streams, "GET", "/metrics")
    streams[1].close()
    line = next(line for line in content.decode().splitlines() if line.startswith(f"{name} "))
    return float(line.split()[1])


async def measured(
    port: int, clients: int, users: Sequence[int], seconds: float
) -> tuple[Load, dict[str, float]]:
    """A load after a short one that is not counted, with the service's own CPU time a request."""
    await load(port, clients, users, seconds / 4)
    before = await metric(port, "process_cpu_seconds_total")
    seen = await load(port, clients, users, seconds)
    cpu = await metric(port, "process_cpu_seconds_total") - before
    return seen, seen.figures() | {"cpu_ms": round(1000 * cpu / len(seen.waits), 2)}


# ---- what is measured


def difference(plan: Plan, last: str, lists: dict[int, Any]) -> float:
    """Largest difference of a score from that of `Recommender.recommend`; infinite where an item differs."""
    table = recommender_of(plan, last).recommend(list(lists), k=K)
    largest = 0.0
    for (user,), group in table.group_by("user", maintain_order=True):
        items = lists[int(str(user))]
        if [item["item"] for item in items] != group["item"].to_list():
            return float("inf")
        scores = np.array([item["score"] for item in items])
        largest = max(largest, float(np.abs(scores - group["score"].to_numpy()).max()))
    return largest


def known_users(plan: Plan) -> list[int]:
    """Users of the log, in an order of no meaning."""
    users = recommender_of(plan, "retriever").maker.users.by_dense_id[2:].to_list()
    return [int(user) for user in np.random.default_rng(0).permutation(users)]


def cascades(plan: Plan, users: Sequence[int]) -> dict[str, Any]:
    """Load of the three cascades, and of each the same without batching at 32 clients."""
    figures: dict[str, Any] = {}
    for last in STEPS:
        of_step: dict[str, Any] = {}
        with serving(plan, last) as port:
            for clients in CLIENTS:
                seen, of_step[f"{clients} clients"] = asyncio.run(
                    measured(port, clients, users, plan.seconds)
                )
            of_step["mib"] = round(asyncio.run(metric(port, "process_resident_memory_bytes")) / 2**20)
            beside = asyncio.run(load(port, 8, users, plan.seconds, together=64))
            of_step["8 clients beside one of 64 users"] = beside.figures()
        with serving(plan, last, batch_users=1) as port:
            _, alone = asyncio.run(measured(port, CLIENTS[-1], users, plan.seconds))
        of_step[f"{CLIENTS[-1]} clients, one at a time"] = alone
        many = of_step[f"{CLIENTS[-1]} clients"]
        of_step["batching gains"] = round(many["per_second"] / alone["per_second"], 2)
        of_step["batching gains in CPU time"] = round(alone["cpu_ms"] / many["cpu_ms"], 2)
        of_step["largest difference from the batch way"] = difference(plan, last, seen.lists)
        figures[last] = of_step
        show(last, of_step)
    return figures


def table(figures: dict[str, Any]) -> Iterator[str]:
    """The lines of docs/serve.md's table."""
    for last, of_step in figures.items():
        loads = [of_step[f"{clients} clients"] for clients in CLIENTS]
        cells = [" + ".join(STEPS[: STEPS.index(last) + 1])]
        cells += [f"{of['per_second']:g}; {of['p50_ms']:.0f} / {of['p99_ms']:.0f}" for of in loads]
        alone = of_step[f"{CLIENTS[-1]} clients, one at a time"]
        cells += [f"{alone['per_second']:g}", f"{of_step['batching gains']:.1f} x", f"{of_step['mib']:,} MiB"]
        yield f"| {' | '.join(cells)} |"


def soak(plan: Plan, users: Sequence[int]) -> dict[str, float]:
    """Memory of the service after a tenth of many requests, and after all of them."""
    with serving(plan, "retriever") as port:
        first = asyncio.run(load(port, CLIENTS[-1], users, 3600.0, plan.soak // 10))
        before = asyncio.run(metric(port, "process_resident_memory_bytes"))
        rest = asyncio.run(load(port, CLIENTS[-1], users, 3600.0, plan.soak - plan.soak // 10))
        after = asyncio.run(metric(port, "process_resident_memory_bytes"))
    figures = {
        "requests": len(first.waits) + len(rest.waits),
        "failed": first.failed + rest.failed,
        "seconds": round(first.seconds + rest.seconds, 1),
        "mib_after_a_tenth": round(before / 2**20, 1),
        "mib_after_all": round(after / 2**20, 1),
    }
    show("soak", figures)
    return figures


def show(name: str, figures: dict[str, Any]) -> None:
    """Print figures, a line each."""
    for key, value in figures.items():
        text = (
            ", ".join(f"{part} {number:,}" for part, number in value.items())
            if isinstance(value, dict)
            else value
        )
        print(f"{name:10} {key:38} {text}", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and keep the figures."""
    if arguments[:1] == ["child"]:
        return child(arguments[1:])
    plan = Plan.parse(arguments)
    users = known_users(plan)
    figures = {"cascades": cascades(plan, users)}
    if plan.soak:
        figures["soak"] = soak(plan, users)
    print(*table(figures["cascades"]), sep="\n")
    about = {"seconds": plan.seconds, "retrieved": plan.retrieved, "ranked": plan.ranked, "users": len(users)}
    keep("bench", {"plan": about, "threads": os.environ.get("OMP_NUM_THREADS"), **figures}, "serve")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
