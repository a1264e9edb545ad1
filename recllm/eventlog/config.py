"""What turns tables into an event log: split, histories, negatives, candidate lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recllm.errors import check, check_choices

RejectedFrom = Literal["random", "reference", "crm", "half"]
"""Which of a row's candidates are rejected: uniformly drawn ones; those that the reference or the CRM scores
highest; half and half: the reference's highest, the rest random."""


@dataclass(frozen=True)
class PrepareConfig:
    """What turns tables into an event log."""

    seed: int = 0
    """Seed of the split (`user`, `items`, `random`), of sampled negatives, permutations and candidate lists;
    apart from `seed`, so that all runs share a split."""
    split: Literal["time", "last", "user", "items", "random", "given"] = "time"
    """Which samples are held out: `time` the latest of all (the paper), `last` the latest of each user,
    `user` those of whole users, `items` the latest of whole items, of which nothing trains, `random` any,
    `given` those that the files of the data set say; see `recllm.eventlog.splits`."""
    shares: list[float] = field(default_factory=lambda: [0.8, 0.1])
    """Shares of training and validation (of samples; of users for split=user); the rest tests. Not read by
    split=last."""
    last_n: int = 1
    """Split `last` only: samples of a user that test, and as many before them that validate."""
    held_items: list[float] = field(default_factory=lambda: [0.1, 0.1])
    """Split `items` only: shares of the items that validate, and that test."""
    min_history: int = 5
    """Earlier events that an event needs to be a sample (the paper: 5)."""
    window: int = 0
    """Most events of a history, the latest ones, for whatever reads histories (0: all events before)."""
    ties: Literal["rows", "strict"] = "rows"
    """`rows`: the history is all rows above (the paper); `strict`: rows of the same second are left out."""
    label_threshold: float | None = None
    """Liked = rating > threshold, in stars; null keeps the labels that the recipe wrote."""
    history_labels: Literal["mark", "hide"] = "mark"
    """Labels of events without a rating, in histories: `mark` which of them are liked and which are not, by a
    code that CRMs read as a rating and by `wording.liked` and `wording.disliked` (nothing where all events
    are alike, as clicks are); or `hide` it. A rating is always shown, and shown alone."""
    sampled_negatives: int = 0
    """Items drawn as further samples with label 0 for each liked sample: for logs without dislikes (0: none).
    They share its history, time and split, and stand in no history."""
    sampled_by: Literal["uniform", "popular"] = "uniform"
    """What they are drawn from: `uniform` over the items with a training event, or `popular`, in proportion
    to an item's training events; never an item of the history, nor the liked one."""
    labels: Literal["both", "liked"] = "both"
    """`both`: training samples of one label only are an error; `liked`: all may be liked, for systems that
    learn and rank what comes next, and answer no Yes or No."""
    user_fields: list[str] = field(default_factory=list)
    """Columns of the users table that a CRM reads, beside the user itself."""
    item_fields: list[str] = field(default_factory=lambda: ["title", "genre"])
    """Columns of the items table that a CRM reads, beside the item itself."""
    category: str = "genre"
    """The one of `item_fields` that events of a history carry, and that hard retrieval goes by."""
    ranking_valid_rows: int = 2000
    """Liked validation samples that carry the ranking task, at most."""
    ranking_test_rows: int = 2000
    """Liked test samples that carry the ranking task, at most."""
    repeats: Literal["leave_out", "keep"] = "leave_out"
    """Samples of an item that the user had met before: `leave_out` of the ranking rows, as no other item of a
    list is, so that the history alone would tell the answer; or `keep` them, see `draw_met`."""
    draw_met: bool | None = None
    """Whether other candidates and drawn dislikes may be items that the user had met before, the sample's own
    item apart; null: with `repeats=keep`. The system `met-before` reads nothing else."""
    candidates: int = 20
    """Items in a ranking row's list, the target included."""

    @property
    def draws_met(self) -> bool:
        """`draw_met`, with what null means."""
        return self.repeats == "keep" if self.draw_met is None else self.draw_met

    def __post_init__(self) -> None:
        """Check ranges."""
        check_choices("prepare", self)
        wanted = f"0 (all events), or prepare.min_history={self.min_history} or more"
        check(self.window == 0 or self.window >= self.min_history, "prepare.window", self.window, wanted)
        shares = self.shares
        two_shares = len(shares) == 2 and min(shares) > 0 and sum(shares) < 1
        wanted = "two shares above 0 that leave some for the test split, e.g. [0.8,0.1]"
        check(two_shares, "prepare.shares", shares, wanted)
        held = self.held_items
        two_shares = len(held) == 2 and min(held) > 0 and sum(held) < 1
        wanted = "two shares above 0 that leave some items for training, e.g. [0.1,0.1]"
        check(two_shares, "prepare.held_items", held, wanted)
        check(self.last_n >= 1, "prepare.last_n", self.last_n, "1 or more samples")
        wanted = f"one of item_fields {self.item_fields}"
        check(self.category in self.item_fields, "prepare.category", self.category, wanted)
        check(self.candidates >= 2, "prepare.candidates", self.candidates, "2 or more items")
        wanted = "false or null with prepare.repeats=leave_out, where no target of a list was met before"
        check(not (self.draw_met and self.repeats == "leave_out"), "prepare.draw_met", True, wanted)
        for name, unit in (
            ("min_history", "events"),
            ("window", "events"),
            ("sampled_negatives", "items"),
            ("ranking_valid_rows", "rows"),
            ("ranking_test_rows", "rows"),
        ):
            value = getattr(self, name)
            check(value >= 0, f"prepare.{name}", value, f"0 or more {unit}")
