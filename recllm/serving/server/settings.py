"""What may be set of the service; each field is a flag of `python -m recllm.serving`."""

from __future__ import annotations

from dataclasses import dataclass

from recllm.errors import check


@dataclass(frozen=True)
class Settings:
    """Limits of the service, and where it listens."""

    host: str = "127.0.0.1"
    """Address that is listened at; loopback: nobody beyond this machine."""
    port: int = 8000
    """Port that is listened at; 0: a free one, which the log names."""
    deadline: float = 10.0
    """Seconds from a request's first byte until it is answered, or refused with status 504."""
    max_body: int = 1 << 20
    """Bytes of a request's body; beyond, status 413."""
    max_users: int = 64
    """Users of one request."""
    max_items: int = 1000
    """Items of one request to score, over all of its users; and of each list of items to filter by."""
    max_history: int = 500
    """Events of one user's history in a request."""
    max_events: int = 1000
    """Events of one POST /events."""
    max_stored: int = 1000
    """Stored events of one user that are read, the latest ones."""
    impressions: bool = False
    """Whether what is recommended is written to the event store."""
    max_k: int = 100
    """Items of a list of recommendations."""
    max_requests: int = 256
    """Requests at work at once; beyond, status 503 with Retry-After."""
    max_waiting: int = 1024
    """Users, or pairs to score, that wait for the model; beyond, status 503 with Retry-After."""
    batch_users: int = 32
    """Users that go through the model together; bounds how long a slow request keeps others waiting."""
    batch_pairs: int = 256
    """Pairs of a user and an item that are scored together."""
    gather_ms: float = 50.0
    """Most milliseconds that the model waits for the next requests after a batch of several; never longer
    than half of what the batch took, and not after a request that was alone."""
    retry_after: int = 1
    """Seconds after which a client that got status 503 may ask again."""
    lms: int = 2
    """LMs in memory: 2: one ranks lists, one answers /score; 1: they take turns, and each turn loads anew."""
    hosts: str = ""
    """Names that the Host header may have, with commas between; empty: any. On loopback: its own names."""

    def __post_init__(self) -> None:
        """Refuse values that no service can keep to."""
        check(0 <= self.port < 1 << 16, "port", self.port, "0 to 65535")
        for name in (
            "deadline",
            "max_body",
            "max_users",
            "max_items",
            "max_history",
            "max_k",
            "max_events",
            "max_stored",
        ):
            check(getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        for name in ("max_requests", "max_waiting", "batch_users", "batch_pairs", "retry_after"):
            check(getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        check(self.lms in (1, 2), "lms", self.lms, "1 or 2")
        check(self.gather_ms >= 0, "gather_ms", self.gather_ms, "0 or more")
        check(self.max_waiting >= self.max_users, "max_waiting", self.max_waiting, "max_users or more")
        check(self.max_waiting >= self.max_items, "max_waiting", self.max_waiting, "max_items or more")
