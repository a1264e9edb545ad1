"""The configuration: YAML files merged over the schema in a fixed order, and one-line errors.

Order, later wins: dataclass defaults, `conf/dataset/`, `conf/lm/`, the stage's choice
(`conf/stage1/` ...), that choice on this data set (`conf/stage1/<dataset>/` ...), `conf/experiment/`,
`key=value` from the command line. OmegaConf merges and checks types; what leaves this module is a frozen
dataclass.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recllm.config.schema import Config
from recllm.errors import ConfigError


def keys(value: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every dotted key of a nested mapping, sections included."""
    dotted = []
    for key, inner in value.items():
        dotted.append(prefix + key)
        if isinstance(inner, Mapping):
            dotted += keys(inner, f"{prefix}{key}.")
    return dotted


SCHEMA = dataclasses.asdict(Config())
"""Every default, nested as the sections are."""
_EMPTY = OmegaConf.structured(Config)  # copied for each merge: a copy takes a fifteenth of the time
KEYS = keys(SCHEMA)
"""Every dotted key, sections included."""
LEAVES = [key for key in KEYS if not any(other.startswith(f"{key}.") for other in KEYS)]
"""Every dotted key that has a value of its own."""


_TEXT_TYPES = (str, str | None, list[str], list[str | None], list[list[str]])


def _texts(section: type, prefix: str = "") -> list[str]:
    """Dotted keys of a section, and of those in it, whose values are texts, or lists of them."""
    found = []
    for name, type_ in get_type_hints(section).items():
        if dataclasses.is_dataclass(type_):
            assert isinstance(type_, type)
            found += _texts(type_, f"{prefix}{name}.")
        elif type_ in _TEXT_TYPES:
            found.append(prefix + name)
    return found


TEXTS = _texts(Config)
"""Every dotted key of a text, or of texts: such as `yes` and `007`, and not what YAML makes of them."""
DEFAULT = "default"
"""Where a value comes from that no layer states."""


def nearest_key(key: str) -> str:
    """The key that was probably meant: of the same stage, with the most similar last part."""
    if key in KEYS:  # a section; what can be set are the keys in it
        return next(leaf for leaf in LEAVES if leaf.startswith(f"{key}."))
    head, _, last = key.rpartition(".")
    top = head.partition(".")[0]
    candidates = [candidate for candidate in KEYS if candidate.partition(".")[0] == top] or KEYS

    def of_last_part(candidate: str) -> float:
        return difflib.SequenceMatcher(None, candidate.rpartition(".")[2], last).ratio()

    def of_whole(candidate: str) -> float:
        return difflib.SequenceMatcher(None, candidate, key).ratio()

    nearest = max(candidates, key=lambda candidate: (of_last_part(candidate), of_whole(candidate)))
    if of_last_part(nearest) < 0.5:
        return f"none; sections are {', '.join(SCHEMA)}"
    return nearest


def check_keys(value: Mapping[str, Any], source: str) -> None:
    """Refuse keys that the schema does not have.

    Raises:
        ConfigError: names the key, the source, and the nearest key that exists.
    """
    for key in keys(value):
        if key not in KEYS:
            raise ConfigError(f"{key} ({source}) is no configuration key; the nearest is {nearest_key(key)}")


def parse_overrides(arguments: Iterable[str], source: str = "command line") -> dict[str, Any]:
    """Turn `key=value` words into a flat mapping of dotted keys, values read as YAML.

    Raises:
        ConfigError: for a word without `=`, or an unknown key.
    """
    flat: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} ({source}) is no key=value; e.g. stage2.fit.lr=1e-3")
        if key not in KEYS or isinstance(value_at(SCHEMA, key), dict):
            raise ConfigError(f"{key} ({source}) is no configuration key; the nearest is {nearest_key(key)}")
        is_text = isinstance(value_at(SCHEMA, key), str)
        try:
            read = value_at(OmegaConf.to_container(OmegaConf.from_dotlist([argument])), key)
        except Exception as error:  # YAML and OmegaConf raise many types, all of them a fault of the value
            if not is_text:
                raise ConfigError(f"{argument!r} ({source}) cannot be read: {_first_line(error)}") from error
            read = value
        if key in TEXTS and not isinstance(read, str):
            read = _as_written(read, yaml.compose(value, yaml.SafeLoader))
        # A format string such as "{title}" reads as a mapping; where a text is wanted it is one.
        flat[key] = value if is_text and isinstance(read, dict | list) else read
    return flat


def value_at(nested: Any, dotted: str) -> Any:
    """The value, or section, of a dotted key in nested mappings."""
    for part in dotted.split("."):
        nested = nested[part]
    return nested


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of the configuration and check its keys.

    Raises:
        ConfigError: where it cannot be read, or holds an unknown key.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(path)) or {}
        written = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except Exception as error:  # YAML and OmegaConf raise many types, all of them a fault of the file
        raise ConfigError(f"{path} cannot be read: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no mapping of keys to values")
    sections = {str(key): value for key, value in content.items()}
    check_keys(sections, str(path))
    for key in TEXTS:
        *above, last = key.split(".")
        section: Any = sections
        node = written
        for name in above:
            section = section.get(name) if isinstance(section, dict) else None
            node = _value_of(node, name)
        if isinstance(section, dict) and last in section:
            section[last] = _as_written(section[last], _value_of(node, last))
    return sections


def _value_of(node: Any, name: str) -> Any:
    """What stands behind a name in a mapping as YAML composes it; None where nothing does."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for key, value in pairs if key.value == name), None)


def _as_written(value: Any, node: Any) -> Any:
    """A text, or a list of texts, in which truth values and numbers are the texts they were read from.

    YAML reads yes, no, on and off as truth values, 007 as 7 and 1.50 as 1.5; names of columns and texts of a
    file are none of them.

    Args:
        value: as it was read.
        node: the same as YAML composes it.
    """
    if isinstance(value, list) and isinstance(node, yaml.SequenceNode):
        return [_as_written(inner, one) for inner, one in zip(value, node.value, strict=True)]
    if isinstance(value, bool | int | float) and isinstance(node, yaml.ScalarNode):
        return node.value
    return value


def merge(layers: Iterable[tuple[str, Mapping[str, Any]]], overrides: Mapping[str, Any]) -> Config:
    """Merge layers over the schema, then the overrides, and freeze.

    Args:
        layers: (source, nested mapping), weakest first.
        overrides: dotted key -> value, strongest.

    Raises:
        ConfigError: a value of the wrong type or out of range, with its key.
    """
    layers = [(source, dict(layer)) for source, layer in layers]
    try:
        merged = OmegaConf.unsafe_merge(  # unsafe: may keep what it is given, which nobody else has
            empty(), *(layer for _, layer in layers), nest(overrides)
        )
    except OmegaConfBaseException:  # one by one, which is slow, so that the one at fault is named
        merged = empty()
        for source, layer in layers:
            try:
                merged = OmegaConf.merge(merged, layer)
            except OmegaConfBaseException as error:
                raise ConfigError(f"{error.full_key or source} ({source}): {_first_line(error)}") from error
        for key, value in overrides.items():
            merged = override(merged, key, value)
    return freeze(merged)


def origins(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
    """Where each key's value comes from: the source of the last layer that states it, or `default`.

    Args:
        layers: (source, nested mapping), weakest first, as `merge` takes them.
    """
    origin = dict.fromkeys(LEAVES, DEFAULT)
    for source, layer in layers:
        for key in keys(layer):
            if key in origin:  # no section
                origin[key] = source
    return origin


def empty() -> Any:
    """The schema's defaults as an OmegaConf object of the caller's own."""
    return copy.deepcopy(_EMPTY)


def override(merged: Any, key: str, value: Any) -> Any:
    """Merge one dotted key; a value of the wrong type is an error that names it."""
    try:
        return OmegaConf.merge(merged, nest({key: value}))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}={value}: {_first_line(error)}") from error


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys -> nested mappings."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return nested


def freeze(merged: Any) -> Config:
    """Turn a merged OmegaConf object into the frozen dataclass; ranges are checked here."""
    try:
        config = OmegaConf.to_object(merged)
    except ConfigError:
        raise
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_first_line(error)) from error
    assert isinstance(config, Config)
    return config
