"""Format strings over columns: names letter by letter, and what a gap leaves out."""

import math

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recllm.config.request import parse
from recllm.errors import ConfigError
from recllm.paths import FORMATS
from recllm.pipeline.graph import Plan
from recllm.pipeline.manifest import Manifest
from recllm.text.config import Wording
from recllm.text.formats import Format, check_formats, shortened
from recllm.text.pieces import fill, sentence_parts
from stages.plan import check_texts
from stages.plan import main as plan_main

names = st.text(st.sampled_from("ab.[]:! ö0_{'"), min_size=1, max_size=8).filter(
    lambda name: not name.startswith("{")  # {{ is a brace of the text
)
CARD = "{title}\nStore: {store}\nCategory: {main_category}"


def table(**columns):
    """A table by dense id: two reserved rows before those that are given."""
    return pl.DataFrame({name: [None, None, *values] for name, values in columns.items()})


def test_a_gap_leaves_out_its_line_only():
    items = table(
        title=["Amber Lamp", "Birch Stool", "Cedar Box", None, None],
        store=["Acme", None, "Acme", "Acme", None],
        main_category=[None, "Home", "Home", " ", None],
    )
    assert fill(CARD, items) == [
        "",
        "",
        "Amber Lamp\nStore: Acme",
        "Birch Stool\nCategory: Home",
        "Cedar Box\nStore: Acme\nCategory: Home",
        "Store: Acme",
        "",
    ]


def test_in_a_line_with_others_a_gap_reads_unknown_and_constant_lines_stay():
    users = table(gender=["woman", None, None], age=[40, None, 3], price=[1.5, math.nan, 2.0])
    template = "A {gender} of {age}.\nPays {price:.2f}.\nA customer.\n"
    assert fill(template, users)[2:] == [
        "A woman of 40.\nPays 1.50.\nA customer.\n",
        "A customer.\n",
        "A unknown of 3.\nPays 2.00.\nA customer.\n",
    ]


@given(
    columns=st.lists(names, min_size=1, max_size=4, unique=True),
    data=st.data(),
)
def test_whatever_a_column_is_called_its_name_within_braces_is_its_value(columns, data):
    order = data.draw(st.permutations(columns))
    form = Format.of("\n".join(f"<{{{{{{{name}}}" for name in order), columns, "wording.profile")
    values = {name: f"value {place}" for place, name in enumerate(columns)}
    assert form.text(values) == "\n".join("<{" + values[name] for name in order)
    assert set(form.columns) == set(columns)


@given(
    values=st.lists(
        st.one_of(st.none(), st.text("xy{}\n", min_size=1).map("v".__add__)), min_size=1, max_size=5
    )
)
def test_without_gaps_it_is_pythons_format_and_a_gap_takes_its_line(values):
    columns = [f"c{place}" for place in range(len(values))]
    lines = [f"{name}: {{{name}}}" for name in columns]
    row = dict(zip(columns, values, strict=True))
    full = [line for line, value in zip(lines, values, strict=True) if value is not None]
    assert Format.of("\n".join(lines), columns, "key").text(row) == "\n".join(full).format(**row)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("{titel}", r"dataset\.description names 'titel'; wanted of title, a\.b"),
        ("{title.x}", "names 'title.x'"),
        ("{title[0]}", r"names 'title\[0\]'"),
        ("{}", "names ''"),
        ("{title", "has a '{' that nothing closes"),
        ("title}", "has a '}' that nothing opens"),
    ],
)
def test_what_is_no_column_is_refused_in_a_line(template, wanted):
    with pytest.raises(ConfigError, match=wanted) as refused:
        Format.of(template, ["title", "a.b"], "dataset.description")
    assert "\n" not in str(refused.value)


def test_a_value_that_does_not_go_with_its_format_is_named():
    with pytest.raises(ValueError, match=r"wording.profile='{age:d}': .* of \('old',\)"):
        fill("{age:d}", table(age=["old"]), "wording.profile")


def test_every_other_wording_takes_its_own_names_only():
    assert Wording(item="<{{{title}}}>").names(["A {b}", None]) == ["<{A {b}}>", ""]
    assert Wording(rating=" ({rating}!)\n").ratings(["4.5"]) == ["\n", " (4.5!)\n"]
    assert Wording(liked="+", disliked="-").ratings(["4"], True) == ["\n", " (4 stars)\n", "-", "+"]
    with pytest.raises(
        ConfigError, match=r"wording\.liked='=' is not usable; wanted another text than .*disliked='='"
    ):
        Wording(liked="=", disliked="=")
    with pytest.raises(ConfigError, match=r"wording\.item names 'name'; wanted of title"):
        Wording(item="{name}")
    with pytest.raises(ConfigError, match=r"wording\.rating names 'rating\.x'; wanted of rating"):
        Wording(rating="{rating.x}")
    with pytest.raises(ConfigError, match=r"wording\.known names 'user_count\.real'"):
        sentence_parts("{user_count.real}")


def test_the_plan_checks_a_finished_log_and_leaves_another_to_prepare(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLLM_ARTIFACTS", str(tmp_path))
    words = ["stage1", "DATASET=demo", "dataset.description=A {job}"]
    assert plan_main(["write", *words]) == 0
    log = tmp_path / "demo" / "log"
    assert "A {job}" in (log / FORMATS).read_text()
    plan = Plan(parse(words))
    for node in plan.needed()[:2]:
        folder = plan.root / node.folder
        above = {parent.folder: Manifest.read(plan.root / parent.folder).identity for parent in node.above}
        made = Manifest(node.stage.name, "demo", "", above, node.file.sha256, [], {}, 0, "", "", 0.0)
        made.write(folder)
    table(item=[2], title=["A"]).write_parquet(log / "items.parquet")
    table(user=[2]).write_parquet(log / "users.parquet")
    with pytest.raises(ConfigError, match=r"dataset\.description names 'job'; wanted of item, title"):
        check_texts(plan)


def test_tables_are_checked_and_shortened_texts_counted(tmp_path):
    table(item=[2, 3, 4], title=["A", "B", None], **{"attributes.Price[0]": [1, None, 2]}).write_parquet(
        tmp_path / "items.parquet"
    )
    table(user=[2], age=[5]).write_parquet(tmp_path / "users.parquet")
    templates = {"dataset.description": "{title}\n{attributes.Price[0]}", "wording.profile": "{age}"}
    check_formats(templates, tmp_path)
    assert shortened(templates, tmp_path) == [("dataset.description", 2, 3)]
    with pytest.raises(ConfigError, match=r"wording\.profile names 'job'; wanted of user, age"):
        check_formats(templates | {"wording.profile": "{job}"}, tmp_path)
