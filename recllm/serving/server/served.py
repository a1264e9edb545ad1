"""A bundle that is loaded and has answered once, and what can be said of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recllm import __version__, paths
from recllm.eventlog.ids import FIRST_ID
from recllm.eventlog.queries import last_second
from recllm.files import now
from recllm.serving.recommender import Recommender

LENGTH = 12
"""Characters of a bundle's hash that are shown."""


@dataclass(frozen=True)
class Served:
    """What answers requests.

    Attributes:
        recommender: answers.
        bundle: hash of what its files are, hex.
        made: when the bundle was made, ISO; None: it is not known.
        loaded: when it was loaded, ISO.
    """

    recommender: Recommender
    bundle: str
    made: str | None
    loaded: str

    @classmethod
    def load(cls, folder: Path, lms: int = 2) -> Served:
        """Load a bundle, or a finished cascade, and see that it answers.

        Args:
            folder: of the bundle.
            lms: LMs that it may have in memory.

        Raises:
            StageError: it is broken, or is none.
            ValueError: a model of it cannot be used.
        """
        recommender = Recommender.load(folder)
        if recommender.parts.lm is not None:
            recommender.parts.lm.most_open = lms
        path = folder / paths.BUNDLE
        made = None
        if path.exists():
            made = json.loads(path.read_text(encoding="utf-8")).get("made")
        served = cls(recommender, recommender.version[:LENGTH], made, now())
        served.warm()
        return served

    def warm(self) -> None:
        """Let every model answer once: what is opened or compiled at the first question is there then."""
        recommender = self.recommender
        most_popular = int(recommender.log.item_count.argmax())
        item = recommender.maker.items.external(np.array([most_popular]))
        user = pl.Series("user", ["warm-up"])
        history = pl.DataFrame({"user": user, "item": item})  # who has one goes through all steps
        recommender.recommend(user, k=1, filter_viewed=False, histories=history)
        recommender.score(pl.DataFrame({"user": user, "item": item}), histories=history)

    def info(self) -> dict[str, Any]:
        """What `/info` says."""
        recommender = self.recommender
        log = recommender.log
        until = None
        if log.timed and log.n_events:
            until = datetime.fromtimestamp(last_second(log), UTC).isoformat()
        return {
            "bundle": self.bundle,
            "cascade": recommender.name,
            "dataset": recommender.dataset,
            "steps": recommender.cascade.names,
            "users": log.n_users - FIRST_ID,
            "items": log.n_items - FIRST_ID,
            "data_until": until,
            "made": self.made,
            "loaded": self.loaded,
            "versions": {"recllm": __version__, **_versions(("torch", "transformers", "peft", "fastapi"))},
        }


def _versions(names: Iterable[str]) -> dict[str, str]:
    return {name: version(name) for name in names}
