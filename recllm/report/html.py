"""Pages of one file that need nothing else, no network either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from recllm.files import write_text


def write_page(out: Path, template: str, **values: Any) -> None:
    """Fill a template of this folder; the file is replaced atomically, its folder made where absent."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template(template).render(**values)
    write_text(out, page)
