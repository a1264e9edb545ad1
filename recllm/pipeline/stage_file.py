"""What a stage's `config.yaml` says: the stage, what it is made from, and what is configured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from recllm import paths
from recllm.config.merge import empty, freeze, override, parse_overrides
from recllm.config.schema import EXECUTION, Config
from recllm.errors import ConfigError, StageError
from recllm.files import digest
from recllm.pipeline.stages import STAGES, Stage

LAYOUT = 2
"""Layout of the artifacts. A change of folders or of `config.yaml` that older ones do not meet raises it."""


class Role(StrEnum):
    """What a parent is to a stage."""

    TABLES = "tables"
    LOG = "log"
    LM = "lm"
    NEIGHBORS = "neighbors"
    ENCODER = "encoder"
    CRM = "stage1"
    """The CRM: of a stage 2 or 3 the one that gates, of an evaluation the one that LMs stand beside."""
    START = "stage2"
    """What a stage 3 aligns; of an evaluation what its alignments started from."""
    RETRIEVER = "retriever"
    """Of a cascade: what scores the whole catalog."""
    CHOSEN = "chosen"
    """Of a stage that trains on all data: the same stage, trained on the training split, whose steps, or
    weights, validation chose."""
    SYSTEM = "system"
    """Of a cascade: the system of stage 2 or 3 whose LM ranks."""


class Group(StrEnum):
    """Parents of an evaluation of which there may be any number, by system."""

    CRMS = "crms"
    TUNED = "tuned"
    TOWERS = "towers"
    ALIGNED = "aligned"


@dataclass(frozen=True)
class StageFile:
    """The content of `config.yaml`, which the plan writes and everyone else only reads.

    Attributes:
        stage: name of the stage, a key of `STAGES`.
        dataset: name of the data set.
        folder: where it lies within `artifacts/<dataset>`, e.g. `stage2/reclora+din`.
        module: what runs the stage: a module with a function `work(run)`.
        parents: role -> folder of each parent, relative to `artifacts/<dataset>`.
        systems: of an evaluation: group -> system -> folder.
        config: the sections that reach the stage, as plain values.
        sweep: `key` and `value` at which a sweep made it; empty: it is none of a sweep.
        variant: of an evaluation, what its rows differ in from the default's; None: it is the default.
    """

    stage: str
    dataset: str
    folder: str
    module: str
    parents: dict[str, str]
    config: dict[str, Any]
    systems: dict[str, dict[str, str]] = field(default_factory=dict)
    sweep: dict[str, str] = field(default_factory=dict)
    variant: str | None = None

    @classmethod
    def read(cls, folder: Path) -> StageFile:
        """Read a folder's `config.yaml`.

        Raises:
            StageError: there is none, or it is of another layout.
        """
        path = folder / paths.CONFIG
        if not path.exists():
            raise StageError(
                f"{path} is missing; stages are run by make, e.g. `make stage1`, which writes it"
            )
        content = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(content, dict) or content.pop("layout", 1) != LAYOUT:
            raise StageError(older(path.parent))
        return cls(**{str(key): value for key, value in content.items()})

    def text(self) -> str:
        """The file's content, YAML."""
        return OmegaConf.to_yaml(OmegaConf.create({"layout": LAYOUT, **dataclasses.asdict(self)}))

    @property
    def choice(self) -> str:
        """The folder within the stage's, e.g. `reclora+din`; of stages of which there is one, its name."""
        return self.folder.partition("/")[2] or self.folder

    @property
    def table(self) -> Stage:
        """What is known of the stage."""
        return STAGES[self.stage]

    @property
    def sha256(self) -> str:
        """Digest of what reaches the stage: its sections and which parents it reads; no execution key."""
        return digest([self.stage, self.dataset, self.parents, self.systems, self.config])

    def root(self, folder: Path) -> Path:
        """`artifacts/<dataset>`, given where the stage's own folder lies."""
        return folder.absolute().parents[len(Path(self.folder).parts) - 1]

    def folders(self) -> list[str]:
        """Folders of all parents, each once."""
        grouped = [folder for group in self.systems.values() for folder in group.values()]
        return list(dict.fromkeys([*self.parents.values(), *grouped]))

    def sections(self, execution: Iterable[str] = ()) -> Config:
        """The frozen configuration; sections that do not reach the stage are None: none is read by mistake.

        Args:
            execution: `trainer.devices=2` and the like.

        Raises:
            ConfigError: a key that is no execution key.
        """
        merged = OmegaConf.merge(empty(), self.config)
        for key, value in parse_overrides(execution).items():
            if not key.startswith(f"{EXECUTION}."):
                raise ConfigError(f"{key} is no execution key; give it to make as ARGS={key}={value}")
            merged = override(merged, key, value)
        config = freeze(merged)
        reaching = {*self.config, EXECUTION}
        unread: Mapping[str, Any] = {
            section.name: None for section in dataclasses.fields(Config) if section.name not in reaching
        }
        return dataclasses.replace(config, **unread)


class StageFolder:
    """A stage's folder: what is known of it whether the stage is at work (`Run`) or done (`Finished`).

    Attributes:
        folder: where it lies, `artifacts/<dataset>/<stage>/<choice>`.
        file: what its `config.yaml` says.
    """

    folder: Path
    file: StageFile

    @property
    def root(self) -> Path:
        """`artifacts/<dataset>`."""
        return self.file.root(self.folder)

    @property
    def name(self) -> str:
        """The folder within `artifacts/<dataset>`, e.g. `stage2/reclora+din`."""
        return self.file.folder

    @property
    def export(self) -> Path:
        """The folder of what others load."""
        return self.folder / paths.EXPORT


def older(folder: Path) -> str:
    """The line for artifacts of another layout."""
    return (
        f"{folder} was made by another version of this program, whose artifacts lie differently (wanted "
        f"layout {LAYOUT}); move the data set's artifacts away, or remove them with `make clean`, and run "
        "make again"
    )
