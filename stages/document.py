"""Documents that are made from the code and the results; a test checks that they are up to date.

python -m stages.document results          docs/results.md: its tables, from results/<dataset>/table.json
python -m stages.document architecture     docs/architecture.svg: the rooms, from the import graph
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from recllm.files import write_text
from recllm.paths import repository
from recllm.report.results_page import fill

COLUMN, GAP, MARGIN = 226, 18, 24
"""Width of a column, of the space between two, and around all, in pixels."""
LEVEL_GAP = 34
"""Height of the space between two levels, in which arrows are seen."""
TITLE, LETTER, LINE = 24, 7.0, 16
"""Height of a box's title, mean width of a letter of its text, and height of a line of it, in pixels."""

DATA, MODELS, RUNNING, SCORING, RUN = "data", "models", "running", "scoring", "run"

PLACES = {
    "tables": (0, 2, DATA),
    "eventlog": (0, 2, DATA),
    "crm": (0, 0, MODELS),
    "retrieval": (1, 1, MODELS),
    "text": (2, 2, DATA),
    "reclora": (3, 3, MODELS),
    "lm": (2, 3, MODELS),
    "config": (0, 3, RUNNING),
    "pipeline": (0, 3, RUNNING),
    "training": (1, 3, RUNNING),
    "systems": (1, 2, SCORING),
    "evaluation": (1, 2, SCORING),
    "report": (1, 2, SCORING),
    "serving": (3, 3, SCORING),
    "data": (0, 0, RUN),
    "stages": (1, 2, RUN),
    "bench": (3, 3, RUN),
}
"""Room -> its first and its last column, and its kind, which is its color. Its level is not said here."""

COLORS = {
    DATA: ("#e8f3ec", "#4c8a66"),
    MODELS: ("#e7effa", "#4472b0"),
    RUNNING: ("#fbf1e0", "#b0803a"),
    SCORING: ("#f3eaf7", "#8a5aa5"),
    RUN: ("#f1f2f4", "#5d6570"),
}
"""Kind -> fill and line."""

SENTENCES = {
    "stages": "One file a stage, read from top to bottom; run by make.",
    "data": "One recipe a published data set; run by make.",
    "bench": "Speed and memory, measured.",
}
"""What the folders do that are no packages and so have no docstring."""

GROUND = "ground"


@dataclass(frozen=True)
class Box:
    """A room on the picture; all numbers in pixels."""

    name: str
    text: list[str]
    kind: str
    left: float
    top: float
    width: float
    height: float


def import_graph(root: Path) -> dict[str, set[str]]:
    """Room -> rooms that it imports; the loose files of `recllm/` are one, `ground`.

    Args:
        root: the repository.
    """
    folders = sorted(path.name for path in (root / "recllm").iterdir() if list(path.glob("*.py")))
    graph: dict[str, set[str]] = {room: set() for room in (*folders, "stages", "data", "bench")}
    for room in graph:
        folder = root / room if room in SENTENCES else root / "recllm" / room
        for path in sorted(folder.rglob("*.py")):
            for module in imported_modules(path):
                package, _, inner = module.partition(".")
                if package != "recllm" or not inner:
                    continue
                other = inner.split(".")[0]
                other = other if other in folders else GROUND
                if other != room:
                    graph[room].add(other)
    return graph


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom) and node.module == "recllm":
            for alias in node.names:
                yield f"recllm.{alias.name}"
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
    """Room -> its level: one above the highest that it imports, 0 where it imports the ground alone.

    What no room imports (the folders that are run) stands on top.
    """
    numbers: dict[str, int] = {GROUND: -1}

    def level(room: str) -> int:
        if room not in numbers:
            numbers[room] = 1 + max((level(other) for other in graph[room]), default=-1)
        return numbers[room]

    top = max(level(room) for room in graph)
    for room in SENTENCES:
        numbers[room] = top
    del numbers[GROUND]
    return numbers


def direct_arrows(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """(room, room that it imports) without those that follow from others, and without the ground."""

    def reached(room: str) -> set[str]:
        others = graph.get(room, set())
        return others.union(*(reached(other) for other in others))

    arrows = []
    for room, others in graph.items():
        implied: set[str] = set()
        for other in others:
            implied |= reached(other)
        arrows += [(room, other) for other in sorted(others - implied - {GROUND})]
    return arrows


def sentence(root: Path, room: str) -> str:
    """What a room says of itself: the first line of its docstring."""
    if room in SENTENCES:
        return SENTENCES[room]
    docstring = ast.get_docstring(ast.parse((root / "recllm" / room / "__init__.py").read_text()))
    return (docstring or "").partition("\n")[0].replace("`", "")


def boxes(root: Path, graph: dict[str, set[str]]) -> dict[str, Box]:
    """Every room's place: its columns by `PLACES`, its level by the graph; the ground below all."""
    level_of = levels(graph)
    unplaced = sorted(graph.keys() - PLACES.keys())
    if unplaced:
        raise ValueError(f"stages/document.py has no place for {unplaced[0]}, want it in PLACES")
    placed: dict[str, Box] = {}
    top: float = MARGIN
    for level in range(max(level_of.values()), -1, -1):
        rooms = [room for room in graph if level_of[room] == level]
        texts = {room: wrapped(sentence(root, room), width_of(room)) for room in rooms}
        height = TITLE + LINE * max(len(text) for text in texts.values()) + 16
        for room in rooms:
            first, _, kind = PLACES[room]
            left = MARGIN + first * (COLUMN + GAP)
            placed[room] = Box(room, texts[room], kind, left, top, width_of(room), height)
        top += height + LEVEL_GAP
    files = sorted(path.stem for path in (root / "recllm").glob("*.py") if path.stem != "__init__")
    text = ["Loose files that every room may import: " + ", ".join(files) + "."]
    width = 4 * COLUMN + 3 * GAP
    placed[GROUND] = Box("the ground", text, RUN, MARGIN, top, width, TITLE + LINE + 16)
    return placed


def width_of(room: str) -> float:
    """Width of a room's box."""
    first, last, _ = PLACES[room]
    return (last - first + 1) * COLUMN + (last - first) * GAP


def wrapped(text: str, width: float) -> list[str]:
    """Lines of a text that fit a box of that width."""
    return textwrap.wrap(text, int((width - 24) / LETTER))


def picture(root: Path) -> str:
    """The rooms of the repository as an SVG: boxes in levels, arrows from a room to what it imports."""
    graph = import_graph(root)
    placed = boxes(root, graph)
    width = 2 * MARGIN + 4 * COLUMN + 3 * GAP
    ground = placed[GROUND]
    caption = ground.top + ground.height + 30
    height = caption + 18
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" font-family="Helvetica, Arial, sans-serif">',
        '<!-- Drawn by "python -m stages.document architecture"; do not edit. -->',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto"><path d="M0 0.5 L8 4 L0 7.5 z" fill="#7a828c"/></marker></defs>',
        f'<rect width="{width:g}" height="{height:g}" rx="10" fill="#ffffff"/>',
    ]
    parts += [arrow(placed[room], placed[other]) for room, other in direct_arrows(graph)]
    parts += [drawn(box) for box in placed.values()]
    text = "An arrow goes from a room to one that it imports; arrows that follow from others are left out."
    parts.append(f'<text x="{MARGIN}" y="{caption:g}" font-size="12.5" fill="#5d6570">{text}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def arrow(above: Box, below: Box) -> str:
    """A line down, upright wherever the two boxes have columns in common."""
    left = max(above.left, below.left)
    right = min(above.left + above.width, below.left + below.width)
    start = end = (left + right) / 2
    if left > right:
        start = above.left + above.width / 2
        end = below.left + below.width / 2
    return (
        f'<line x1="{start:g}" y1="{above.top + above.height:g}" x2="{end:g}" y2="{below.top - 2:g}" '
        'stroke="#7a828c" stroke-width="1.4" marker-end="url(#head)"/>'
    )


def drawn(box: Box) -> str:
    """A box with its name and its text."""
    fill_color, line_color = COLORS[box.kind]
    left = box.left + 12
    parts = [
        f'<rect x="{box.left:g}" y="{box.top:g}" width="{box.width:g}" height="{box.height:g}" rx="7" '
        f'fill="{fill_color}" stroke="{line_color}" stroke-width="1.3"/>',
        f'<text x="{left:g}" y="{box.top + TITLE:g}" font-size="15" font-weight="bold" '
        f'fill="{line_color}">{escape(box.name)}</text>',
    ]
    for number, line in enumerate(box.text):
        y = box.top + TITLE + LINE * (number + 1) + 2
        parts.append(f'<text x="{left:g}" y="{y:g}" font-size="12.5" fill="#2b3036">{escape(line)}</text>')
    return "\n".join(parts)


def write_results(root: Path) -> Path:
    """Fill the tables of docs/results.md anew; returns its path."""
    page = root / "docs" / "results.md"
    write_text(page, fill(page.read_text(), root / "results"))
    return page


def write_architecture(root: Path) -> Path:
    """Draw docs/architecture.svg anew; returns its path."""
    path = root / "docs" / "architecture.svg"
    write_text(path, picture(root))
    return path


DOCUMENTS = {"results": write_results, "architecture": write_architecture}


def main(names: list[str]) -> int:
    """Write the documents of these names; an unknown name is one line and status 2."""
    unknown = [name for name in names if name not in DOCUMENTS]
    if unknown or not names:
        got = unknown[0] if unknown else "nothing"
        wanted = ", ".join(DOCUMENTS)
        print(
            f"error: got {got}, wanted some of {wanted}: python -m stages.document results", file=sys.stderr
        )
        return 2
    for name in names:
        print(DOCUMENTS[name](repository()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
