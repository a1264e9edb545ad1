"""What is known of each stage: its make target, what it reads, and who shares it."""

from __future__ import annotations

GOAL_OF = {"tables": "prepare", "log": "prepare", "towers": "stage2"}

ENDS_WITH_TABLE = ("stage3", "evaluate", "report")

READS = {
    "tables": ("dataset", "source"),
    "log": ("dataset", "prepare"),
    "lm-text": ("dataset", "wording", "prompt", "lm", "subsample"),
    "neighbors": ("dataset", "wording", "lm", "retrieval"),
    "lm-prompts": ("dataset", "wording", "prompt", "lm", "subsample"),
    "stage1": ("stage1", "seed"),
    "tune": ("stage1", "tune", "seed"),
    "stage2": ("dataset", "wording", "prompt", "lm", "subsample", "stage2", "seed"),
    "encoder": ("dataset", "wording", "prompt", "encoder"),
    "towers": ("dataset", "wording", "prompt", "subsample", "stage2", "towers", "seed"),
    "stage3": ("dataset", "wording", "prompt", "lm", "stage3", "seed"),
    "evaluate": ("dataset", "wording", "prompt", "lm", "evaluate", "seed"),
    "report": (),
}

SECOND_PHASE = tuple(
    f"lm.training.{key}"
    for key in ("prompt_tokens", "prompt_lr", "shown_weight", "timeline_share", "timeline_events")
)

LANGUAGE_MODEL = tuple(
    f"stage2.{key}"
    for key in ("representation", "mixed_prompts", "license", "title_share", "title_weight", "adapter")
)

UNREAD = {"lm-text": SECOND_PHASE, "neighbors": SECOND_PHASE, "towers": LANGUAGE_MODEL}
"""Keys, with all below them, that do not reach a stage, though others of their section do."""

STAGES = {
    "log": "prepare",
    "lm": "stage2",
    "neighbors": "stage2",
    "stage1": "stage1",
    "stage2": "stage2",
    "stage3": "stage3",
}
"""Folder of a data set's artifacts -> the make target that fills it."""

SHARED = ("tune",)
"""Stages that several processes may be at work in; they see to it themselves."""

OWN_SEED = {
    "log": "prepare",
    "lm-text": "lm",
    "lm-prompts": "lm",
    "neighbors": "retrieval",
    "encoder": "encoder",
}
"""Stages that all seeds share -> the section that has a seed of their own."""
