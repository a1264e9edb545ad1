"""The page that lies beside adapter weights and says what they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

NAME = "README.md"


@dataclass(frozen=True)
class ModelCard:
    """What a reader of a model card wants to know and the weights do not say.

    Attributes:
        base: The LM that the adapter is for: hub id, or its name.
        data: What it was trained on, in a few words.
        metrics: Name -> value, on validation data unless the name says otherwise.
        license: SPDX identifier under which the adapter may be shared; empty: the card says that it is open.
        title: Headline.
    """

    base: str = ""
    data: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    license: str = ""
    title: str = "LoRA of a recommender"


def write_model_card(directory: Path, card: ModelCard, config: Any, note: str = "") -> None:
    """Writes `README.md`.

    Args:
        directory: Folder of the adapter.
        card: What to say.
        config: The adapter's PEFT configuration.
        note: A sentence on this adapter, e.g. what an export was made of.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    text = environment.get_template("card.md.j2").render(
        card=card,
        base=card.base or config.base_model_name_or_path or "",
        config=config,
        method=str(getattr(config.peft_type, "value", config.peft_type)),
        modules=config.target_modules
        if isinstance(config.target_modules, str)
        else ", ".join(sorted(config.target_modules)),
        note=note,
    )
    (directory / NAME).write_text(text)
