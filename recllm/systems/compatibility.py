"""Whether systems that were tuned elsewhere go together with what is asked of them now."""

from __future__ import annotations

import dataclasses

from recllm.config.schema import Config
from recllm.errors import StageError
from recllm.pipeline.finished import Finished
from recllm.pipeline.stage_file import Role


def check_same_prompts(tuned: Finished, config: Config) -> None:
    """Refuse a system that was tuned on other prompts than a stage with this configuration would ask with.

    Whether histories are retrieved is a system's own choice (`retrieves`).

    Raises:
        StageError: the first key that differs, with both values.
    """
    for section in ("prompt", "wording"):
        theirs = dataclasses.asdict(getattr(tuned.config, section))
        ours = dataclasses.asdict(getattr(config, section))
        for name, value in theirs.items():
            if name != "retrieved" and value != ours[name]:
                key = f"{section}.{name}"
                raise StageError(
                    f"{tuned.name} was tuned with {key}={value!r}, and this stage would ask with "
                    f"{ours[name]!r}; add ARGS={key}=..., or tune it anew with `make {tuned.file.table.goal}`"
                )


def retrieves(tuned: Finished) -> bool:
    """Whether Yes/No prompts of a system of stage 2, or of what stage 3 made of it, show nearest events."""
    if tuned.file.stage == "stage3":
        return retrieves(tuned.parent(Role.START))
    return tuned.config.prompt.retrieved
