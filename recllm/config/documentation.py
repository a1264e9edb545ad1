"""What the configuration's dataclasses say of themselves: every key with its type, default and meaning.

The meaning of a key is the docstring under its field. `make config` shows it beside the value, and
docs/configuration.md is written from it, so that neither can differ from the code.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from recllm.config.schema import EXECUTION, Config

Readers = Callable[[str], Sequence[str]]
"""Names of the stages that a dotted key reaches."""

TYPE_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "any"}


@dataclass(frozen=True)
class Key:
    """One configuration key.

    Attributes:
        name: dotted, `stage2.fit.lr`.
        type: what a value may be, in words.
        default: the value where nothing else is said.
        meaning: the docstring of its field, in one line.
    """

    name: str
    type: str
    default: Any
    meaning: str


@dataclass(frozen=True)
class Section:
    """A group of keys: a dataclass of the configuration where it stands.

    Attributes:
        name: dotted, `stage2.fit`.
        meaning: the docstring of its field, else that of its dataclass, in one line.
        keys: its keys and those of the sections in it.
        sections: all sections in it, outer ones first.
    """

    name: str
    meaning: str
    keys: list[Key]
    sections: list[Section]


def field_docstrings(config: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, in one line; fields without one are left out."""
    docstrings = {}
    for owner in reversed(config.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in pairwise(definition.body):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                docstrings[statement.target.id] = _one_line(str(following.value.value))
    return docstrings


def _one_line(text: str) -> str:
    return " ".join(text.split())


def read_section(config: Any, name: str = "", meaning: str = "") -> Section:
    """A section, read from an instance of its dataclass: its values are the defaults.

    Args:
        config: the instance; nested ones are its sections.
        name: dotted name of the section, empty for the whole configuration.
        meaning: docstring of the field that holds it; empty: that of its dataclass.
    """
    section = Section(name, meaning or _one_line(inspect.getdoc(type(config)) or ""), keys=[], sections=[])
    docstrings = field_docstrings(type(config))
    types = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        dotted = f"{name}.{field.name}" if name else field.name
        docstring = docstrings.get(field.name, "")
        if dataclasses.is_dataclass(value):
            inner = read_section(value, dotted, docstring)
            section.sections.extend([inner, *inner.sections])
            section.keys.extend(inner.keys)
        else:
            section.keys.append(Key(dotted, type_in_words(types[field.name]), value, docstring))
    return section


def all_keys() -> list[Key]:
    """Every configuration key, in the order of the dataclasses."""
    return read_section(Config()).keys


def type_in_words(type_: Any) -> str:
    """`one of a, b`, `number or null`, `list of text`."""
    if get_origin(type_) is Literal:
        return f"one of {', '.join(get_args(type_))}"
    if get_origin(type_) is list:
        (inner,) = get_args(type_)
        words = type_in_words(inner)
        return f"list of {words}s" if words in ("integer", "number") else f"list of {words}"
    if get_origin(type_) in (Union, UnionType):
        inner_types = [inner for inner in get_args(type_) if inner is not NoneType]
        return " or ".join([*map(type_in_words, inner_types), "null"])
    return TYPE_NAMES.get(type_, type_.__name__)


def as_text(value: Any) -> str:
    """A value as a configuration file would write it; of a dataclass what is not its default."""
    if isinstance(value, str):
        return value if _reads_as_text(value) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(as_text(entry) for entry in value)}]"
    if dataclasses.is_dataclass(value):
        stated = []
        for field in dataclasses.fields(value):
            entry = getattr(value, field.name)
            if entry != _default(field):
                stated.append(f"{field.name}: {as_text(entry)}")
        return f"{{{', '.join(stated)}}}"
    return json.dumps(value)


def _reads_as_text(value: str) -> bool:
    """Whether YAML reads it as text without quotes: a word that is neither a number nor a boolean."""
    if not re.fullmatch(r"[\w./-]+", value) or value.lower() in (
        "true",
        "false",
        "yes",
        "no",
        "on",
        "off",
        "null",
    ):
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


HEAD = """\
<!-- Written by `python -m stages.config write` from the configuration's docstrings: edit those, not this. -->

# Configuration

Every key, with its type, its default and what it means. Any of them can be set for a command:
`make stage2 ARGS="stage2.fit.lr=1e-3 stage2.adapter.r=4"`. `make config` shows what a command is configured
with and where each value comes from. It takes the same variables, of one CRM and one system; with `KEY=` it
shows the keys that begin so:

    make config DATASET=ml-1m CRM=sim SYSTEM=reclora KEY=stage2.fit

Later wins: the defaults below, `conf/dataset/`, `conf/lm/`, the file of the CRM or system (`conf/stage1/`
...), that file for this data set (`conf/stage1/<dataset>/` ...), `conf/experiment/`, `ARGS`. Files under
`conf/` say only what differs from the defaults.
"""


def document(readers: Readers) -> str:
    """The text of docs/configuration.md.

    Args:
        readers: the stages that a key reaches.
    """
    whole = read_section(Config())
    parts = [HEAD]
    for field in dataclasses.fields(Config):
        keys = [key for key in whole.keys if key.name.split(".")[0] == field.name]
        sections = [section for section in whole.sections if section.name.split(".")[0] == field.name]
        parts.append(_chapter(field.name, keys, sections, readers))
    return "\n".join(parts)


def _chapter(name: str, keys: list[Key], sections: list[Section], readers: Readers) -> str:
    """A top-level section, or a key that stands in none: heading, meaning, readers, table of keys."""
    lines = [f"## {name}", ""]
    if sections:
        lines += [sections[0].meaning, ""]
    lines += [*_readers_in_words(keys, readers), ""]
    for section in sections[1:]:
        lines.append(f"- `{section.name}`: {section.meaning}")
    if sections[1:]:
        lines.append("")
    lines += _table(keys)
    for key in keys:
        if isinstance(key.default, list) and key.default and dataclasses.is_dataclass(key.default[0]):
            lines += ["", *_entries(key)]
    return "\n".join([*lines, ""])


def _readers_in_words(keys: list[Key], readers: Readers) -> list[str]:
    """Which stages read the keys: a line for most of them, and one for each group that is read by others."""
    if keys[0].name.startswith(f"{EXECUTION}."):
        return ["Read by all stages."]
    groups: dict[tuple[str, ...], list[str]] = {}
    for key in keys:
        groups.setdefault(tuple(readers(key.name)), []).append(key.name)
    by_size = sorted(groups.items(), key=lambda group: -len(group[1]))
    lines = [f"Read by {_code(by_size[0][0])}."]
    for stages, names in by_size[1:]:
        lines.append(f"But {_code(names)} by {_code(stages)}.")
    return lines


def _code(words: Sequence[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _table(keys: list[Key]) -> list[str]:
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key in keys:
        default = "below" if len(as_text(key.default)) > 200 else f"`{as_text(key.default)}`"
        cells = (f"`{key.name}`", key.type, default, key.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return lines


def _entries(key: Key) -> list[str]:
    """The fields of a list's entries, and the entries that are the default."""
    entry_type = type(key.default[0])
    types = get_type_hints(entry_type)
    docstrings = field_docstrings(entry_type)
    lines = [f"An entry of `{key.name}`:", ""]
    fields = [
        Key(field.name, type_in_words(types[field.name]), _default(field), docstrings.get(field.name, ""))
        for field in dataclasses.fields(entry_type)
    ]
    lines += [*_table(fields), "", f"The default of `{key.name}`:", ""]
    return [*lines, *(f"    - {as_text(entry)}" for entry in key.default)]
