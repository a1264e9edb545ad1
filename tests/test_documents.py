"""Documents tell of what is there: paths, commands, keys that they name exist, figures are the results'."""

import ast
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

from recllm.config.merge import parse_overrides
from recllm.config.schema import Config
from recllm.evaluation.results import read
from recllm.evaluation.tables import number
from recllm.report.results_page import BLOCKS, MARKED, fill
from stages import document

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted(
    [
        *REPOSITORY.glob("*.md"),
        *REPOSITORY.glob("docs/*.md"),
        *REPOSITORY.glob("results/*.md"),
        *REPOSITORY.glob("data/*/README.md"),
    ]
)
NAMES = [str(path.relative_to(REPOSITORY)) for path in PAGES]
CHANGELOG = "CHANGELOG.md"
PRESENT = [name for name in NAMES if name != CHANGELOG]
"""All pages but the changelog, which names what is gone."""

WIDTH = 120
"""Most characters of a line of the README, tables and commands too."""
LENGTH = 130
"""Most lines of it."""

ROOMS = ("recllm", "stages", "data", "conf", "tests", "bench", "docs", "results", ".ci")
SECTIONS = {section.name for section in dataclasses.fields(Config)}
SOURCES = [
    path
    for folder in ("recllm", "stages", "data", "bench", "conf")
    for path in sorted((REPOSITORY / folder).rglob("*"))
    if path.suffix in (".py", ".yaml", ".j2")
]
SOURCE = "\n".join(path.read_text() for path in [*SOURCES, REPOSITORY / "Makefile", REPOSITORY / ".ci/run"])
MAKEFILE = (REPOSITORY / "Makefile").read_text()

SHOP = "corner-shop"
"""The data set of docs/own-data.md: the page holds its files, and the reader makes them."""
FORBIDDEN = {"utils.py"}
"""What CONTRIBUTING.md names as what must not be."""


def text_of(name):
    return (REPOSITORY / name).read_text()


def fenced(text):
    """(language, content) of each fenced block."""
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.M | re.S)


def prose_of(name):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(name), flags=re.M | re.S)


def spans(name):
    """Inline code of a page, a line break within as a blank."""
    flat = re.sub(r"^    .*$", "", prose_of(name), flags=re.M)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", flat)]


def commands(name):
    """Indented lines of a page, those that end in a backslash joined, without their comments."""
    lines = re.findall(r"^    (\S.*)$", re.sub(r"\\\n +", "", prose_of(name)), re.M)
    return [re.sub(r"\s+#.*", "", line) for line in lines]


def words(name):
    """All words of all code of a page."""
    for code in [*spans(name), *commands(name)]:
        yield from re.split(r"[\s,;]+", code.strip("()"))


def is_there(path, page):
    """Whether a path exists, from the root or the page on; `<name>`, `*` and `...` stand for anything."""
    pattern = re.sub(r"<[^>]+>|\.\.\.", "*", path.strip("/"))
    return any(REPOSITORY.glob(pattern)) or any((REPOSITORY / page).parent.glob(pattern))


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(name)):
        if not re.match(r"https?:|#", target):
            path = (REPOSITORY / name).parent / target.partition("#")[0]
            assert path.exists(), f"{name} links to {target}"


@pytest.mark.parametrize("name", PRESENT)
def test_files_and_folders_exist(name):
    """Under artifacts/ lies what make makes: there the last part has to be named in the sources."""
    for word in words(name):
        if SHOP in word or word in FORBIDDEN:
            continue
        first, slash, _ = word.partition("/")
        if slash and first in ROOMS and re.fullmatch(r"[\w./<>*+-]+", word):
            assert is_there(word, name), f"{name} names {word}"
        elif first == "artifacts" and re.search(r"\.\w+$", word):
            assert Path(word).name in SOURCE, f"{name} names {word}"
        elif re.fullmatch(r"[\w-]+\.(py|yaml|yml|json|md|toml|cff|html|npz|db|txt)", word):
            tracked = any(REPOSITORY.glob(word)) or any(
                any((REPOSITORY / room).rglob(word)) for room in ROOMS
            )
            assert tracked or word in SOURCE, f"{name} names {word}"


def make_words(name):
    """(targets, assignments) of every command that begins with make."""
    for code in [*spans(name), *commands(name)]:
        if code.split()[0] == "make":
            parts = shlex.split(code.replace("...", ""))[1:]
            targets = [part for part in parts if "=" not in part and not part.startswith("-")]
            yield targets, [part for part in parts if "=" in part]


@pytest.mark.parametrize("name", PRESENT)
def test_make_targets_exist(name):
    targets = set(re.findall(r"^([\w. -]+):(?!=)", MAKEFILE, re.M))
    targets = {target for group in targets for target in group.split()}
    for wanted, _ in make_words(name):
        for target in wanted:
            assert target in targets, f"{name}: make {target}"


def assignments(name):
    """(variable, value) of all words NAME=value in a page's code."""
    for code in [*spans(name), *commands(name)]:
        for variable, quoted, plain in re.findall(
            r"""\b([A-Z][A-Z_]+)=(?:["']([^"']*)["']|([^\s"'),;]*))""", code
        ):
            yield variable, (quoted or plain).strip()


FOLDERS = {
    "DATASET": ("dataset",),
    "CRM": ("stage1",),
    "SYSTEM": ("stage2", "stage3"),
    "LM": ("lm",),
    "EXPERIMENT": ("experiment",),
}
"""Variable -> folders of `conf/` that hold its values."""


OF_LAUNCHERS = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets, and whoever does without it."""


@pytest.mark.parametrize("name", PRESENT)
def test_make_variables_and_their_values_exist(name):
    known = set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.M))
    for variable, value in assignments(name):
        if variable in OF_LAUNCHERS:
            continue
        if variable.startswith("RECLLM_") or variable == "OMP_NUM_THREADS":
            assert variable in SOURCE, f"{name}: {variable}"
            continue
        assert variable in known, f"{name}: {variable}={value}"
        for choice in value.split() if variable in FOLDERS else ():
            files = [REPOSITORY / "conf" / folder / f"{choice}.yaml" for folder in FOLDERS[variable]]
            free = choice in (SHOP, "none", "...") or "<" in choice or (variable == "LM" and "/" in choice)
            assert free or any(file.exists() for file in files), f"{name}: {variable}={choice}"


@pytest.mark.parametrize("name", PRESENT)
def test_environment_variables_are_read(name):
    for variable in re.findall(r"RECLLM_[A-Z_]+", text_of(name)):
        assert variable in SOURCE, f"{name}: {variable}"


@pytest.mark.parametrize("name", PRESENT)
def test_modules_that_are_run_or_imported_exist(name):
    for module in re.findall(r"python -m ([\w.]+)", text_of(name)):
        path = REPOSITORY / module.replace(".", "/")
        there = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
        assert there or module.split(".")[0] not in ROOMS, f"{name}: python -m {module}"
    for word in spans(name):
        if re.fullmatch(r"recllm(\.\w+)+", word):
            resolve(word)


def keys(name):
    """Words of code that are keys of the configuration, with `=value` where they have one."""
    for code in [*spans(name), *commands(name)]:
        for word in re.findall(r"(?<![\w./-])([a-z][\w]*(?:\.\w+)+(?:=[^\s\"']*)?)", code):
            section = word.partition(".")[0]
            if section in SECTIONS and not re.search(r"\.(py|yaml|json|npz|html|md)\b", word):
                yield word


def defaults_at(key):
    """The default of a key: a value, or a section as a mapping."""
    value = dataclasses.asdict(Config())
    for part in key.split("."):
        value = value[part]
    return value


@pytest.mark.parametrize("name", PRESENT)
def test_configuration_keys_exist(name):
    for word in keys(name):
        key, equals, value = word.partition("=")
        try:
            defaults_at(key)
        except (KeyError, TypeError):
            pytest.fail(f"{name} names {key}")
        if equals and re.fullmatch(r"[\w.+-]+|\[[\w.,]*\]", value) and "..." not in value:
            parse_overrides([word])


def resolve(dotted):
    """The object of a dotted name."""
    parts = dotted.split(".")
    found = importlib.import_module(parts[0])
    for place, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:place]))
        found = getattr(found, part)
    return found


def dotted_name(node):
    """`a.b.c` of an attribute's node; empty where it does not begin with a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("name", PRESENT)
def test_python_blocks_import_what_exists(name):
    for content in (content for language, content in fenced(text_of(name)) if language == "python"):
        tree = ast.parse(content)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    assert hasattr(importlib.import_module(node.module), alias.name), (name, alias.name)
        for node in ast.walk(tree):
            dotted = dotted_name(node)
            if dotted.startswith("recllm."):
                resolve(dotted)


def test_readme_is_short_and_narrow():
    lines = text_of("README.md").splitlines()
    assert len(lines) <= LENGTH
    for line in lines:
        assert len(line) <= WIDTH, line


def test_every_page_of_docs_is_linked_from_another():
    for path in REPOSITORY.glob("docs/*.md"):
        others = [text_of(name) for name in PRESENT if name != f"docs/{path.name}"]
        assert any(f"{path.name})" in other for other in others), path.name


def test_tables_of_results_are_up_to_date():
    page = text_of("docs/results.md")
    wanted = fill(page, REPOSITORY / "results")
    assert page == wanted, "run: python -m stages.document results"
    assert [match[1] for match in MARKED.findall(page)] == list(BLOCKS)


def test_the_picture_of_the_rooms_is_up_to_date():
    drawn = text_of("docs/architecture.svg")
    assert drawn == document.picture(REPOSITORY), "run: python -m stages.document architecture"


ML, DEMO, POPULAR = "ml-1m", "demo", "popular20"
# Text of a README row's cell -> the row and the figure: data set, system, variant, row set, candidates, k,
# compared with; `p` for the largest p instead of the difference.
FIGURES = {
    "+.0096": (ML, "reclora", "paper", "test/first30000", None, None, "lora"),
    "+.0325": (DEMO, "reclora", None, "test/all", None, None, "lora"),
    "+.0038": (ML, "reclora", "paper", "test/first30000", None, None, "sim"),
    "-.0087": (DEMO, "reclora", None, "test/all", None, None, "sim"),
    "+.0020": (ML, "reclora", "paper", "test/first30000", None, None, "blend"),
    "-.0089": (DEMO, "reclora", None, "test/all", None, None, "blend"),
    "+.0008": (ML, "reclora", "paper", "test/first30000", None, None, "refit"),
    "-.0056": (DEMO, "reclora", None, "test/all", None, None, "refit"),
    "+.068": (ML, "s-dpo-item", "ranker+preference", "test/2000", POPULAR, 15, "sft"),
    "-.018": (ML, "s-dpo-item", "ranker+preference", "test/2000", POPULAR, 15, "crm-ranker"),
    "-.073": (DEMO, "s-dpo", None, "test/2000", "uniform20", 3, "crm-ranker"),
}
LARGEST_P = {"p up to .046": "blend", "p up to .28": "refit"}
"""Text in the README -> what RecLoRA is compared with at the paper's sizes."""


def result(dataset, system, variant, row_set, candidates, k):
    rows = read(REPOSITORY / "results" / dataset / "table.json")
    wanted = (system, variant, row_set, candidates, k)
    found = []
    for row in rows:
        got = (row.system, row.variant, row.row_set, row.candidates, row.k)
        if got == wanted and row.lm == "tiny":
            found.append(row)
    assert len(found) == 1, wanted
    return found[0]


def compared(row, other):
    """Difference and largest p of a row to another system."""
    if row.paired_with == other:
        return row.delta, row.p_value
    return row.against[other]["delta"], row.against[other]["p_value"]


@pytest.mark.parametrize("text", FIGURES)
def test_readme_s_figures_are_those_of_the_results(text):
    *where, other = FIGURES[text]
    delta, _ = compared(result(*where), other)
    places = len(text) - 2
    assert f"{delta:+.{places}f}".replace("0.", ".", 1) == text
    assert text in text_of("README.md")
    assert text in text_of("docs/results.md")


def test_readme_s_p_values_are_those_of_the_results():
    row = result(ML, "reclora", "paper", "test/first30000", None, None)
    for text, other in LARGEST_P.items():
        _, largest = compared(row, other)
        places = len(text.rpartition(".")[2])
        assert f"{largest:.{places}f}".removeprefix("0") == text.rpartition(" ")[2]
        assert text in text_of("README.md")


def test_readme_s_printed_table_is_that_of_the_results():
    """The lines that it shows of what the commands print: AUC and log loss of the demo."""
    for line in re.findall(r"^     (\S+) .*, 3 seeds +4,807 +(\S+) +(\S+)", text_of("README.md"), re.M):
        name, auc, logloss = line
        rows = read(REPOSITORY / "results" / DEMO / "table.json")
        row = next(row for row in rows if row.system == name.rstrip(",") and row.row_set == "test/all")
        assert (auc, logloss) == (number(row.metrics["auc"]), number(row.metrics["logloss"]))
