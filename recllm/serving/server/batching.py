"""Questions of requests that wait together go through the model together, in one thread of its own.

A batch takes a question of each request that waits, then a second one of each, and so on until it is full;
what is left of a request waits behind the others. So a request of many users keeps a short one waiting for no
more than the batch that is at work. Whoever gives up (a client that has gone, a deadline that has passed) has
his questions taken out of the queue.

The model's thread takes what waits as soon as it is free. After a batch of several requests it waits for as
many to be there again, as their clients' next ones would else miss each other for ever: the first to come
back would go alone. It waits for half as long as that batch took at most, so that clients who do not come
back cost the others little. A client that asks alone never waits.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from recllm.serving.recommender import Recommender
from recllm.serving.server.answering import answer_lists, answer_pairs
from recllm.serving.server.logs import tell
from recllm.serving.server.metrics import Metrics
from recllm.serving.server.refusals import Refusal
from recllm.serving.server.served import Served
from recllm.serving.server.settings import Settings


class Kind(StrEnum):
    """What is asked of the model."""

    LISTS = "lists"
    PAIRS = "pairs"
    CALL = "call"


@dataclass(eq=False)
class Job:
    """The questions of one request.

    Attributes:
        served: what answers them; a reload does not change it.
        kind: of the questions.
        questions: of `recllm.serving.server.answering`; of a call, the function.
        future: gets the answers, in the order of the questions.
        answers: those that are there.
        left: how many are missing.
        waiting: places of the questions that no batch has taken yet.
    """

    served: Served
    kind: Kind
    questions: Sequence[Any]
    future: asyncio.Future[list[Any]]
    answers: list[Any] = field(init=False)
    left: int = field(init=False)
    waiting: deque[int] = field(init=False)

    def __post_init__(self) -> None:
        """Nothing is answered yet."""
        self.answers = [None] * len(self.questions)
        self.left = len(self.questions)
        self.waiting = deque(range(len(self.questions)))

    def goes_with(self, other: Job) -> bool:
        """Whether the questions of both can be answered at once."""
        return self.kind == other.kind and self.served is other.served


Taken = tuple[Job, int]
"""A question of a batch: its job, and its place among the job's."""


class Batcher:
    """The queue before the model, and the thread that runs it.

    Args:
        settings: sizes of queue and batches.
        metrics: are told what happens.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Nothing runs before `start`."""
        self.metrics = metrics
        self._limits = {Kind.LISTS: settings.batch_users, Kind.PAIRS: settings.batch_pairs, Kind.CALL: 1}
        self._most = settings.max_waiting
        self._gather = settings.gather_ms / 1000
        self._retry_after = settings.retry_after
        self._queue: dict[Job, None] = {}  # a set in the order of arrival
        self._changed = threading.Condition()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Answer what waits, and end."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Questions that wait."""
        return sum(len(job.waiting) for job in list(self._queue))

    # ---- in the event loop

    async def answer(self, served: Served, kind: Kind, questions: Sequence[Any]) -> list[Any]:
        """Answers of one request, in the order of its questions.

        Raises:
            Refusal: too much waits already.
        """
        job = Job(served, kind, questions, asyncio.get_running_loop().create_future())
        with self._changed:
            if self.waiting + len(questions) > self._most:
                raise Refusal(503, "too much waits for the model; ask again soon", self._retry_after)
            self._queue[job] = None
            self.metrics.waiting.set(self.waiting)
            self._changed.notify()
        try:
            return await job.future
        finally:
            if job.left:
                self._drop(job)

    async def call(self, served: Served, function: Callable[[Recommender], Any]) -> Any:
        """What a function makes of the recommender, run by the model's thread in its turn."""
        (result,) = await self.answer(served, Kind.CALL, [function])
        return result

    def _drop(self, job: Job) -> None:
        """Take a job's questions out of the queue."""
        with self._changed:
            self._queue.pop(job, None)
            self.metrics.dropped.inc(len(job.waiting))
            self.metrics.waiting.set(self.waiting)

    # ---- in the model's thread

    def _work(self) -> None:
        requests = 0
        seconds = 0.0
        while batch := self._take(requests, seconds):
            start = time.perf_counter()
            self._answer(batch)
            requests = len({id(job) for job, _ in batch})
            seconds = time.perf_counter() - start

    def _take(self, requests: int, seconds: float) -> list[Taken]:
        """Questions that go with those of the first job, as many as go together; none at the end.

        Args:
            requests: of the batch before.
            seconds: that it took.
        """
        with self._changed:
            if requests > 1:
                self._changed.wait_for(
                    lambda: len(self._queue) >= requests or self._is_full() or self._is_stopped,
                    min(self._gather, seconds / 2),
                )
            self._changed.wait_for(lambda: self._queue or self._is_stopped)
            if not self._queue:
                return []
            first = next(iter(self._queue))
            jobs = [job for job in self._queue if job.goes_with(first)]
            limit = self._limits[first.kind]
            batch: list[Taken] = []
            while jobs and len(batch) < limit:
                for job in jobs[: limit - len(batch)]:
                    batch.append((job, job.waiting.popleft()))
                jobs = [job for job in jobs if job.waiting]
            for job in dict.fromkeys(job for job, _ in batch):
                del self._queue[job]
                if job.waiting:  # behind the others
                    self._queue[job] = None
            self.metrics.waiting.set(self.waiting)
            return batch

    def _is_full(self) -> bool:
        first = next(iter(self._queue), None)
        return first is not None and self.waiting >= self._limits[first.kind]

    def _answer(self, batch: list[Taken]) -> None:
        """Answer a batch; should it fail, each job of it alone, so that one failure stays one."""
        try:
            answers = self._ask(batch)
        except Exception as error:
            jobs = list({id(job): job for job, _ in batch}.values())
            tell(
                "a batch failed", level=logging.ERROR, error=error, kind=batch[0][0].kind, requests=len(jobs)
            )
            if len(jobs) == 1:
                _deliver(jobs, error)
                return
            for job in jobs:
                self._answer([taken for taken in batch if taken[0] is job])
            return
        complete = []
        for (job, place), answer in zip(batch, answers, strict=True):
            job.answers[place] = answer
            job.left -= 1
            if not job.left:
                complete.append(job)
        _deliver(complete)

    def _ask(self, batch: list[Taken]) -> list[Any]:
        first = batch[0][0]
        questions = [job.questions[place] for job, place in batch]
        start = time.perf_counter()
        if first.kind == Kind.LISTS:
            answers = answer_lists(first.served.recommender, questions)
        elif first.kind == Kind.PAIRS:
            answers = answer_pairs(first.served.recommender, questions)
        else:
            answers = [question(first.served.recommender) for question in questions]
        self.metrics.batch_seconds.labels(first.kind).observe(time.perf_counter() - start)
        self.metrics.batch_size.labels(first.kind).observe(len(batch))
        return answers


def _deliver(jobs: Sequence[Job], error: Exception | None = None) -> None:
    """Hand the answers of jobs, or what went wrong, over to the event loop, which is woken once for all."""

    def hand_over() -> None:
        for job in jobs:
            if job.future.done():
                continue
            if error is None:
                job.future.set_result(job.answers)
            else:
                job.future.set_exception(error)

    if jobs:
        jobs[0].future.get_loop().call_soon_threadsafe(hand_over)
