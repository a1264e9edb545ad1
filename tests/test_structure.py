"""The house: which rooms there are, who may import whom, and what is shipped."""

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
            # `from recllm import paths` names a module, `from recllm.paths import MANIFEST` does not.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


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


ORDER = (
    {"errors", "console", "files", "paths", "cache", "losses", "metrics", "processes", "reclora"},
    {"tables"},
    {"eventlog"},
    {"text", "crm", "retrieval"},
    {"lm"},
    {"config"},
    {"pipeline"},
    {"training"},
    {"systems"},
    {"evaluation", "serving"},
    {"report"},
)
"""Rooms of `recllm/`, lowest first; rooms on one line do not import each other, but for the ground files."""
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
GROUND = ORDER[0] - {"reclora"}


def room_arrows():
    """(file, its room, another room that it imports) over all of `recllm/`."""
    for path in FILES:
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        if parts[0] != "recllm" or parts == ("recllm", "__init__"):
            continue
        for module in imported(path):
            first, *inner = module.split(".")
            if first == "recllm" and inner and inner[0] in LEVEL and inner[0] != parts[1]:
                yield name_of(path), parts[1], inner[0]


def test_arrows_between_rooms_point_down():
    for file, room, other in room_arrows():
        ground = room in GROUND and other in GROUND
        assert LEVEL[other] < LEVEL[room] or ground, f"{file} imports {other}, not below {room}"


def test_modules_import_each_other_in_no_circle():
    """Within a room too: a depth-first walk meets no module that it is still in."""
    known = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in FILES}
    arrows = {name: known.keys() & set(imported(path)) for name, path in known.items()}
    finished, open_path = set(), []

    def visit(name):
        assert name not in open_path, " -> ".join([*open_path[open_path.index(name) :], name])
        if name not in finished:
            open_path.append(name)
            for other in arrows[name]:
                visit(other)
            open_path.pop()
            finished.add(name)

    for name in arrows:
        visit(name)


def test_the_ground_is_eight_files_at_most():
    loose = {path.stem for path in (REPOSITORY / "recllm").glob("*.py")} - {"__init__"}
    assert loose == GROUND
    assert len(loose) <= 8


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
