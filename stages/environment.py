"""Checks a user's own environment (`make PYTHON=...`): says in one line what is missing from it."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def missing(requirements: list[str]) -> list[str]:
    """Requirements of pyproject.toml that the running Python does not meet, in their own words."""
    from packaging.requirements import Requirement

    unmet = []
    for text in requirements:
        requirement = Requirement(text)
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            unmet.append(text)
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            unmet.append(f"{text} (got {installed})")
    return unmet


def main() -> int:
    """Print what is missing; status 2 if anything is."""
    if sys.version_info < (3, 11):  # noqa: UP036 - this file is what an older Python is told by
        print(
            f"error: {sys.executable} is Python {sys.version.split()[0]}; wanted 3.11 or newer",
            file=sys.stderr,
        )
        return 2
    import tomllib

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    try:
        unmet = missing(project["dependencies"])
    except ModuleNotFoundError:
        unmet = project["dependencies"]
    if unmet:
        print(
            f"error: {sys.executable} lacks: {', '.join(unmet)}; install them, or leave PYTHON= out",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
