"""Errors that a user can mend, each told in one line, and checks of configured values."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot be used; its text is one line for the user."""


def check(ok: bool, key: str, got: object, wanted: str) -> None:
    """Refuse a value: the key, what it is, and what is wanted."""
    if not ok:
        raise ConfigError(f"{key}={got} is not usable; wanted {wanted}")


class StageError(RuntimeError):
    """A stage that cannot go on; its text is one line for the user."""


class Busy(StageError):
    """Another process is at work in the folder."""
