"""The house: who may import whom, what is shipped, and how long a file may get."""

import ast
import importlib
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ROOMS = ("recllm", "stages", "data")
FILES = sorted(path for room in ROOMS for path in (REPOSITORY / room).rglob("*.py"))
MODULES = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in FILES]


def imported(path):
    """Names of the modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def name_of(path):
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_recllm_is_imported(path):
    """Arrows: stages -> recllm, data -> recllm. A stage is run by its name, never imported by another one."""
    for module in imported(path):
        assert module.split(".")[0] not in ("stages", "data", "tests", "conf"), f"{name_of(path)}: {module}"


@pytest.mark.parametrize("module", [name.removesuffix(".__init__") for name in MODULES])
def test_every_module_can_be_imported(module):
    importlib.import_module(module)


def test_only_recllm_goes_into_the_wheel():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["recllm"]}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_outgrows_its_room(path):
    most = 300 if path.parent.name == "stages" else 400
    assert len(path.read_text().splitlines()) <= most


def test_there_is_no_file_of_odds_and_ends():
    names = {path.stem for path in FILES}
    assert not names & {"utils", "util", "helpers", "misc", "common", "registry", "factory"}


def test_tests_lie_beside_what_they_test():
    """A room's test folder has the room's name, and no test folder is a package."""
    tests = REPOSITORY / "tests"
    assert not list(tests.rglob("__init__.py"))
    rooms = {path.parent.name for path in (REPOSITORY / "recllm").rglob("*.py")}
    rooms |= {"stages", "invariant", "recipes", "bench"}
    assert {path.name for path in tests.iterdir() if path.is_dir() and list(path.glob("test_*.py"))} <= rooms


def test_ignored_patterns_are_anchored():
    """An unanchored pattern such as `data/` would hide a source folder."""
    lines = map(str.strip, (REPOSITORY / ".gitignore").read_text().splitlines())
    lines = [line for line in lines if line and line[0] not in "#!"]
    for line in lines:
        folder = line.rstrip("/")
        hidden = [path for path in FILES if folder in path.relative_to(REPOSITORY).parts]
        assert line.startswith("/") or not hidden, line
