"""A key is described once, under its field: the document is generated, and conf/ repeats no default."""

from pathlib import Path

import pytest

from recllm.config.documentation import all_keys, as_text, document, field_docstrings, type_in_words
from recllm.config.merge import LEAVES, SCHEMA, keys, load_yaml, value_at
from recllm.config.tune import Range
from stages.config import readers

REPOSITORY = Path(__file__).parents[2]
CONF = REPOSITORY / "conf"

NAMING = ("dataset.name", "lm.model.name", "stage1.crm.name", "stage2.adapter.kind", "stage3.loss")
"""Keys that say which one a file is; they stand in it whatever the default is."""


def strength(path):
    """Where in the order of merging a file stands; 3 are those of a choice on one data set."""
    folder, *rest = path.relative_to(CONF).parts
    places = {"dataset": 0, "lm": 1, "stage1": 2, "stage2": 2, "stage3": 2, "experiment": 4}
    return places[folder] + (len(rest) == 2)


def stated(path):
    """Dotted key -> value of what a file says."""
    content = load_yaml(path)
    return {key: value_at(content, key) for key in keys(content) if key in LEAVES}


FILES = {path: stated(path) for path in sorted(CONF.rglob("*.yaml"))}


def repeated(path):
    """Keys that a file sets to their default, though nothing that it is merged over says otherwise."""
    weaker = [values for other, values in FILES.items() if strength(other) < strength(path)]
    return [
        key
        for key, value in FILES[path].items()
        if value == value_at(SCHEMA, key) and all(values.get(key, value) == value for values in weaker)
    ]


# What a search found on a data set (conf/stage1/<dataset>/) stands whole: its score is that of all values.
@pytest.mark.parametrize(
    "path", [path for path in FILES if strength(path) != 3], ids=lambda path: str(path.relative_to(CONF))
)
def test_no_file_repeats_a_default(path):
    assert [key for key in repeated(path) if key not in NAMING] == []


def test_what_a_file_repeats_is_seen(monkeypatch):
    over, under = CONF / "experiment" / "x.yaml", CONF / "lm" / "y.yaml"
    files = {
        over: {"seed": 0, "stage2.gate_first": 0.0, "prompt.history": 11},
        under: {"stage2.gate_first": 3.0},
    }
    monkeypatch.setitem(globals(), "FILES", files)
    assert repeated(over) == ["seed"]


@pytest.mark.parametrize("key", all_keys(), ids=lambda key: key.name)
def test_every_key_says_what_it_means(key):
    assert key.meaning
    assert key.meaning.endswith(".")
    assert "\n" not in key.meaning


def test_every_key_is_described():
    assert sorted(key.name for key in all_keys()) == sorted(LEAVES)
    assert {key.name for key in all_keys() if key.default != value_at(SCHEMA, key.name)} == {"tune.space"}
    assert set(field_docstrings(Range)) == set(Range.__dataclass_fields__)


def test_the_document_is_what_the_generator_writes():
    text = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert text == document(readers), "run `python -m stages.config write`"
    assert "python -m stages.config write" in text.splitlines()[0]
    for key in LEAVES:
        assert f"\n| `{key}` |" in text


def test_inherited_fields_have_their_docstrings():
    described = {key.name: key.meaning for key in all_keys()}
    assert described["source.items.path"] == described["source.events.path"]
    assert described["source.items.title"] == "Column of the title."


def test_values_are_written_as_yaml_reads_them():
    values = ("none", "32-true", "", "0.1", "true", "a b", 1e-3, None, False, [1, 2], ["1", "x"])
    assert [as_text(value) for value in values] == [
        "none", "32-true", '""', '"0.1"', '"true"', '"a b"', "0.001", "null", "false", "[1, 2]", '["1", x]',
    ]  # fmt: skip
    assert as_text(Range("k", low=1.0, high=2.0, log=True)) == "{key: k, low: 1.0, high: 2.0, log: true}"


def test_types_are_words():
    types = {key.name: key.type for key in all_keys()}
    assert types["stage3.gate"] == "one of list, item"
    assert types["lm.model.context"] == "integer or null"
    assert types["prepare.shares"] == "list of numbers"
    assert type_in_words(list[str]) == "list of text"


def test_readers_follow_the_table_of_stages():
    assert readers("prepare.split") == ["log", "log-all"]
    assert readers("lm.tiny.hidden") == ["lm-text", "lm-prompts"]  # all others know the LM by its weights
    assert readers("lm.training.prompt_tokens") == ["lm-prompts", "evaluate", "next"]
    assert "neighbors" in readers("lm.model.path")
    assert "towers" not in readers("stage2.adapter.r")
