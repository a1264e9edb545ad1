"""Errors that a user can mend, each told in one line, and checks of configured values."""

from __future__ import annotations

from typing import Literal, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A configuration that cannot be used; its text is one line for the user."""


def check(ok: bool, key: str, got: object, wanted: str) -> None:
    """Refuse a value: the key, what it is, and what is wanted."""
    if not ok:
        raise ConfigError(f"{key}={got} is not usable; wanted {wanted}")


def check_choices(section: str, config: object) -> None:
    """Refuse a section of which a `Literal` field holds none of its options.

    OmegaConf checks what it merges; this checks what Python code and saved files make.

    Args:
        section: where its keys stand, e.g. `stage2.adapter`; empty where several sections have one such.
        config: instance of a section's dataclass.
    """
    for name, type_ in get_type_hints(type(config)).items():
        if get_origin(type_) is Literal:
            options = get_args(type_)
            key = f"{section}.{name}" if section else name
            got = getattr(config, name)
            check(got in options, key, got, f"one of {', '.join(options)}")


class StageError(RuntimeError):
    """A stage that cannot go on; its text is one line for the user."""


class Busy(StageError):
    """Another process is at work in the folder."""
