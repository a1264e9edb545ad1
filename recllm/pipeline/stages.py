"""The one table of stages: what makes each, what of the configuration reaches it, and who shares it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

REPEATED = ("stage1", "stage2", "stage3", "cascade")
"""Stages that `ALL_DATA=1` repeats as validation chose them: of each a finished one is a parent."""
ENDS_WITH_TABLE = ("stage3", "evaluate", "report")
"""Goals at whose end every system is evaluated and the table is printed."""
OF_OBJECTIVE = {
    "ctr": ("stage1.newest", "stage1.half_life", "stage1.cold_share"),
    "rank": ("stage1.negatives", "stage1.rank_rows"),
    "next": ("stage1.next",),
}
"""`stage1.objective` -> keys of stage 1 that are read with this objective only."""


@dataclass(frozen=True)
class Stage:
    """What is known of a stage, whatever the data set and the systems.

    Attributes:
        name: of the stage, as manifests say it.
        goal: the make target that asks for it.
        folder: first part of the folders that it makes.
        module: its `work(run)` makes it; of `tables` it is the data set's recipe, which the plan finds.
        sections: sections of the configuration that reach it.
        unread: keys of these sections that do not, with all below them: no value of theirs makes it stale.
        of_others: the same of keys that other folders of the stage read: they have their defaults here.
        seed_section: the section whose own seed it takes, so that all seeds share it; empty: `SEED=`, if any.
        shared: whether several processes may be at work in one of its folders; they see to it themselves.
        trains_lm: whether only its like runs beside it: an LM in training uses all cores well, small models
            do not.
        reported: whether the report tells of its manifests and curves.
    """

    name: str
    goal: str
    folder: str
    module: str
    sections: tuple[str, ...]
    unread: tuple[str, ...] = ()
    of_others: tuple[str, ...] = ()
    seed_section: str = ""
    shared: bool = False
    trains_lm: bool = False
    reported: bool = False

    @property
    def seeded(self) -> bool:
        """Whether `SEED=` reaches it."""
        return "seed" in self.sections

    def reached_by(self, key: str) -> bool:
        """Whether a value of this dotted key of the configuration can change what the stage makes."""
        if key.partition(".")[0] not in self.sections:
            return False
        return not any(f"{key}.".startswith(f"{unread}.") for unread in (*self.unread, *self.of_others))

    def of_objective(self, objective: str) -> Stage:
        """Stage 1, or its tuning, of CRMs that are trained for an objective: it reads no other's keys."""
        others = [keys for name, keys in OF_OBJECTIVE.items() if name != objective]
        return dataclasses.replace(self, of_others=tuple(key for keys in others for key in keys))


_MADE_INTO_LM = ("lm.seed", "lm.tiny", "lm.training")
"""What made the tiny LM: whoever loads it knows it by its weights."""
_SECOND_PHASE = tuple(
    f"lm.training.{key}"
    for key in ("prompt_tokens", "prompt_lr", "shown_weight", "timeline_share", "timeline_events")
)
_OF_ADAPTERS = tuple(
    f"stage2.{key}"
    for key in (
        "adapter",
        "gate_first",
        "license",
        "mixed_prompts",
        "representation",
        "title_share",
        "title_weight",
        "valid_lists",
    )
)
_OF_CANDIDATES = tuple(
    f"evaluate.{key}"
    for key in ("ctr_rows", "aligned_rows", "blend_rows", "candidates", "ranking_rows", "generate_rows")
)

_ALL = (
    Stage("tables", "prepare", "tables", "", ("dataset", "source"), unread=("dataset.description",)),
    Stage(
        "log",
        "prepare",
        "log",
        "stages.prepare",
        ("dataset", "prepare"),
        unread=("dataset.description",),
        seed_section="prepare",
        reported=True,
    ),
    # The log once more, with every sample in training: for production, and never evaluated.
    Stage(
        "log-all",
        "cascade",
        "log",
        "stages.all_data",
        ("dataset", "prepare"),
        unread=("dataset.description",),
        seed_section="prepare",
    ),
    Stage(
        "lm-text",
        "stage2",
        "lm",
        "stages.lm",
        ("dataset", "wording", "prompt", "lm", "subsample"),
        unread=_SECOND_PHASE,
        seed_section="lm",
        trains_lm=True,
        reported=True,
    ),
    # An LM by hub id or path: it is read and checked, and nothing is trained.
    Stage(
        "lm-named", "stage2", "lm", "stages.lm", ("dataset", "wording", "lm"), _MADE_INTO_LM, reported=True
    ),
    Stage(
        "neighbors",
        "stage1",
        "neighbors",
        "stages.retrieve",
        ("dataset", "wording", "lm", "retrieval"),
        unread=_MADE_INTO_LM,
        seed_section="retrieval",
        reported=True,
    ),
    Stage(
        "lm-prompts",
        "stage2",
        "lm",
        "stages.lm",
        ("dataset", "wording", "prompt", "lm", "subsample"),
        seed_section="lm",
        trains_lm=True,
        reported=True,
    ),
    Stage("stage1", "stage1", "stage1", "stages.stage1", ("stage1", "seed"), reported=True),
    Stage("tune", "tune", "tune", "stages.stage1", ("stage1", "tune", "seed"), shared=True),
    Stage(
        "stage2",
        "stage2",
        "stage2",
        "stages.stage2",
        ("dataset", "wording", "prompt", "lm", "subsample", "stage2", "seed"),
        unread=_MADE_INTO_LM,
        reported=True,
    ),
    Stage(
        "encoder",
        "stage2",
        "encoder",
        "stages.encoder",
        ("dataset", "wording", "prompt", "encoder"),
        seed_section="encoder",
        trains_lm=True,
    ),
    Stage(
        "towers",
        "stage2",
        "stage2",
        "stages.towers",
        ("dataset", "wording", "prompt", "subsample", "stage2", "towers", "seed"),
        unread=_OF_ADAPTERS,
    ),
    Stage(
        "stage3",
        "stage3",
        "stage3",
        "stages.stage3",
        ("dataset", "wording", "prompt", "lm", "stage3", "seed"),
        unread=_MADE_INTO_LM,
        reported=True,
    ),
    Stage(
        "evaluate",
        "evaluate",
        "evaluate",
        "stages.evaluate",
        ("dataset", "wording", "prompt", "lm", "evaluate", "seed"),
        unread=("lm.seed", "lm.tiny", "evaluate.next"),
    ),
    Stage(
        "next",
        "evaluate",
        "next",
        "stages.next",
        ("dataset", "wording", "prompt", "lm", "evaluate", "seed"),
        unread=("lm.seed", "lm.tiny", *_OF_CANDIDATES),
    ),
    Stage(
        "cascade",
        "cascade",
        "cascade",
        "stages.cascade",
        ("dataset", "wording", "prompt", "lm", "cascade", "seed"),
        unread=_MADE_INTO_LM,
    ),
)

STAGES = {stage.name: stage for stage in _ALL}
"""Name -> stage."""
