"""The page that lies beside adapter weights and says what they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

NAME = "README.md"


@dataclass(frozen=True)
class AdapterCard:
    """What a reader of an adapter's model card wants to know and the weights do not say.

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


def write_model_card(directory: Path, card: AdapterCard, config: Any, note: str = "") -> None:
    """Writes `README.md`, a model card as the hub takes it.

    Args:
        directory: Folder of the adapter.
        card: What to say.
        config: The adapter's PEFT configuration.
        note: A sentence on this adapter, e.g. what an export was made of.
    """
    base = card.base or config.base_model_name_or_path or ""
    head = ModelCardData(
        library_name="peft",
        base_model=base if "/" in base else None,  # the hub links to it
        license=card.license or "other",
        tags=["lora", "recommendation", "recllm"],
    )
    # Not `ModelCard.from_template`, which writes nothing where the template names a value that is not there.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    modules = config.target_modules
    text = environment.get_template("card.md.j2").render(
        card=card,
        base=base,
        config=config,
        method=str(getattr(config.peft_type, "value", config.peft_type)),
        modules=modules if isinstance(modules, str) else ", ".join(sorted(modules)),
        note=note,
    )
    ModelCard(f"---\n{head.to_yaml()}\n---\n\n{text}").save(directory / NAME)
