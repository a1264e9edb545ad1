"""Questions of requests that wait together go through the model together, in one thread of its own.

A request's questions are queued one by one, so that a request of many users neither keeps a short one waiting
for more than a batch, nor needs a batch of its own size. Whoever gives up (a client that has gone, a deadline
that has passed) has his questions taken out of the queue.

The model's thread takes what waits as soon as it is free. After a batch of several requests it waits a few
milliseconds for their clients' next ones, which would else miss each other for ever: the first to come back
would go alone. A client that asks alone never waits.
"""

from __future__ import annotations

import asyncio
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
    """

    served: Served
    kind: Kind
    questions: Sequence[Any]
    future: asyncio.Future[list[Any]]
    answers: list[Any] = field(init=False)
    left: int = field(init=False)

    def __post_init__(self) -> None:
        """Nothing is answered yet."""
        self.answers = [None] * len(self.questions)
        self.left = len(self.questions)


Waiting = tuple[Job, int]
"""A question: its job, and its place among the job's."""


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
        self._queue: deque[Waiting] = deque()
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

    # ---- in the event loop

    async def answer(self, served: Served, kind: Kind, questions: Sequence[Any]) -> list[Any]:
        """Answers of one request, in the order of its questions.

        Raises:
            Refusal: too much waits already.
        """
        job = Job(served, kind, questions, asyncio.get_running_loop().create_future())
        with self._changed:
            if len(self._queue) + len(questions) > self._most:
                raise Refusal(503, "too much waits for the model; ask again soon", self._retry_after)
            self._queue.extend((job, place) for place in range(len(questions)))
            self.metrics.waiting.set(len(self._queue))
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
            before = len(self._queue)
            self._queue = deque(waiting for waiting in self._queue if waiting[0] is not job)
            self.metrics.dropped.inc(before - len(self._queue))
            self.metrics.waiting.set(len(self._queue))

    # ---- in the model's thread

    def _work(self) -> None:
        gathers = False
        while batch := self._take(gathers):
            gathers = len({id(job) for job, _ in batch}) > 1
            self._answer(batch)

    def _take(self, gathers: bool) -> list[Waiting]:
        """Questions of the first one's kind, as many as go together; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_stopped)
            if gathers and self._queue:
                limit = self._limits[self._queue[0][0].kind]
                end = time.monotonic() + self._gather
                while len(self._queue) < limit and (left := end - time.monotonic()) > 0:
                    self._changed.wait(left)
            batch: list[Waiting] = []
            others: deque[Waiting] = deque()
            while self._queue:
                waiting = self._queue.popleft()
                first = batch[0][0] if batch else waiting[0]
                alike = waiting[0].kind == first.kind and waiting[0].served is first.served
                if alike and len(batch) < self._limits[first.kind]:
                    batch.append(waiting)
                else:
                    others.append(waiting)
            self._queue = others
            self.metrics.waiting.set(len(self._queue))
            return batch

    def _answer(self, batch: list[Waiting]) -> None:
        """Answer a batch; should it fail, each job of it alone, so that one failure stays one."""
        try:
            answers = self._ask(batch)
        except Exception as error:
            jobs = list({id(job): job for job, _ in batch}.values())
            tell("a batch failed", level=40, error=error, kind=batch[0][0].kind, requests=len(jobs))
            if len(jobs) == 1:
                _deliver(jobs[0], error)
                return
            for job in jobs:
                self._answer([waiting for waiting in batch if waiting[0] is job])
            return
        for (job, place), answer in zip(batch, answers, strict=True):
            job.answers[place] = answer
            job.left -= 1
            if not job.left:
                _deliver(job)

    def _ask(self, batch: list[Waiting]) -> list[Any]:
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


def _deliver(job: Job, error: Exception | None = None) -> None:
    """Hand a job's answers, or what went wrong, over to the event loop."""

    def hand_over() -> None:
        if job.future.done():
            return
        if error is None:
            job.future.set_result(job.answers)
        else:
            job.future.set_exception(error)

    job.future.get_loop().call_soon_threadsafe(hand_over)
