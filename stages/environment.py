"""Checks a user's own environment (`make PYTHON=...`): says in one line what is missing from it."""

import sys
import tomllib
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
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    try:
        unmet = missing(project["dependencies"])
    except ModuleNotFoundError:
        unmet = project["dependencies"]
    if sys.version_info < (3, 11):
        unmet = ["python>=3.11", *unmet]
    if unmet:
        print(f"error: {sys.executable} lacks: {', '.join(unmet)}; install them, or leave PYTHON= out", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
