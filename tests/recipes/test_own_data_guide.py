"""docs/own-data.md, literally: its files and its YAML are written out, its command is planned and run."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from recllm import paths
from recllm.pipeline import run
from recllm.pipeline.stage_file import StageFile
from recllm.tables import config
from stages import plan, prepare
from tests.stages.plans import rules

REPOSITORY = Path(__file__).parents[2]
GUIDE = (REPOSITORY / "docs" / "own-data.md").read_text()
COMMAND = re.search(r"^    make prepare (.+)$", GUIDE, re.M)[1].split()


def write_files(folder):
    """Every block of the guide that has a file's name goes there."""
    blocks = re.findall(r"^```\w+ (\S+)\n(.*?)^```$", GUIDE, re.M | re.S)
    for name, content in blocks:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return {name for name, _ in blocks}


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A repository with the guide's YAML in conf/dataset, in whose folder the shop's files lie."""
    for room in ("conf", "data"):
        shutil.copytree(REPOSITORY / room, tmp_path / room)
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "repository", lambda: tmp_path)
    monkeypatch.setenv("RECLLM_ARTIFACTS", str(tmp_path / "artifacts"))
    return tmp_path


def planned(*words):
    return plan.main(["write", "prepare", *COMMAND, *words])


def execute(folder):
    """Runs what Make would: the recipe, then prepare, as the rules name them."""
    text = rules(folder / "artifacts" / "corner-shop").read_text()
    made = re.findall(r"-m (\S+) (\S+) \$\(EXECUTION\)(?: (raw=\S+))?$", text, re.M)
    assert [module for module, _, _ in made] == ["stages", "stages"]
    modules = [StageFile.read(Path(where)).module for _, where, _ in made]
    assert modules == ["data.own.recipe", "stages.prepare"]
    for module, (_, where, raw) in zip(modules, made, strict=True):
        work = prepare.work if module == "stages.prepare" else importlib.import_module(module).work
        code = run.main(work, [where, *([raw] if raw else [])])
        if code:
            return code
    return 0


def test_the_guide_s_files_are_all_there(tmp_path):
    assert write_files(tmp_path) == {
        "corner-shop/ratings.csv",
        "corner-shop/products.csv",
        "corner-shop/customers.csv",
        "conf/dataset/corner-shop.yaml",
    }


def test_the_guide_s_example_runs(shop, capsys):
    assert planned() == 0
    assert execute(shop) == 0
    root = shop / "artifacts" / "corner-shop"
    tables = json.loads((root / "tables" / "manifest.json").read_text())["metrics"]
    # By hand: 22 lines of ratings, one of them without stars; dia is in no file of customers.
    assert tables == {
        "read_items": 5, "read_events": 22, "read_users": 3, "users_without_attributes": 1,
        "events": 22, "events_without_label": 1, "items": 5, "users": 4,
    }  # fmt: skip
    events, items, users = (
        pl.read_parquet(root / "tables" / f"{name}.parquet") for name in ("events", "items", "users")
    )
    assert events["label"].sum() == 12  # 4 or 5 stars
    assert events.row(0) == ("ann", "101", 5.0, 1, 1_709_284_320)
    assert items.row(0) == ("101", 'Black tea, "strong"', "drinks", "hot, breakfast", "hot")
    assert users.rows() == [("ann", "2019"), ("bob", "2023"), ("cem", "2021"), ("dia", None)]
    log = json.loads((root / "log" / "manifest.json").read_text())["metrics"]
    # 4 first events have no history, one other has no label: 17 samples, 13 train, 1 valid, 3 test.
    assert (log["samples"], log["train"], log["valid"], log["test"]) == (17, 13, 1, 3)
    said = capsys.readouterr().out
    assert "22 events, 22 rows read; left out: none" in said
    days = "train 2024-03-01 to 2024-03-07, valid 2024-03-07 to 2024-03-07, test 2024-03-08 to 2024-03-09"
    assert f"days (UTC) of the samples: {days}" in said
    assert "customers.csv, column 'customer': 1 of 4 users, with 22.7% of the events, are not there" in said


def test_a_fault_in_the_shop_s_files_stops_it_in_one_line(shop, capsys):
    ratings = shop / "corner-shop" / "ratings.csv"
    ratings.write_text(ratings.read_text().replace("bob,102,2,", "bob,102,two,"))
    assert planned() == 0
    capsys.readouterr()
    assert execute(shop) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: ratings.csv line 3, column 'stars': found 'two', wanted a number from 1 to 5"
    )
    assert said.count("\n") == 1
    assert not list((shop / "artifacts" / "corner-shop" / "tables").glob("*.parquet"))
    assert planned("source.faulty=drop") == 0
    assert execute(shop) == 0
    assert "21 events, 22 rows read; left out: 1 rating_no_number" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "instead", "problem"),
    [
        ("timestamp: when", "timestmap: when", "the nearest is source.events.timestamp"),
        ("threshold: 3 ", "threshold: three ", "source.label.threshold"),
        ("threshold: 3 ", "rule: stars ", "Invalid value 'stars', expected one of ['rating', 'column'"),
        ("path: products.csv", 'path: ""', "source.items.path=''"),
        (
            "path: ratings.csv",
            'path: ""',
            "has no data/corner_shop/recipe.py of its own and no source",
        ),
        ("  description:", "  #", "dataset.description=''"),
        ("min_history: 1", "label_threshold: 4", "prepare.label_threshold=4.0"),
        ("threshold: 3 ", "rule: clicks ", "prepare.sampled_negatives=0"),
        ("timestamp: when", "nulls: []", "prepare.split=time"),
        ("min_history: 1", "split: given", "prepare.split=given"),
        ("path: customers.csv", 'path: ""', "prepare.user_fields=['since']"),
    ],
)
def test_a_wrong_yaml_is_told_before_anything_runs(shop, capsys, line, instead, problem):
    yaml = shop / "conf" / "dataset" / "corner-shop.yaml"
    assert line in yaml.read_text()
    yaml.write_text(yaml.read_text().replace(line, instead))
    assert planned() == 2
    said = capsys.readouterr().err
    assert problem in said
    assert said.count("\n") == 1
    assert not (shop / "artifacts").exists()


def keys():
    """Rows of the table of keys: what the schema says of itself."""
    for prefix, cls in (
        ("", config.FileSource),
        ("events", config.EventsSource),
        ("valid", config.HeldOutSource),
        ("items", config.ItemsSource),
        ("users", config.UsersSource),
        ("label", config.LabelSource),
        ("", config.SourceConfig),
    ):
        body = ast.parse(inspect.getsource(cls)).body[0].body
        meaning = {
            a.target.id: b.value.value
            for a, b in itertools.pairwise(body)
            if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)
        }
        default = dataclasses.asdict(cls())
        for name in meaning:
            key = ".".join(part for part in (prefix, name) if part)
            value = json.dumps(default[name]).replace("|", "\\|")
            yield f"| `{key}` | `{value}` | {meaning[name]} |"


def test_the_guide_tells_every_key_as_the_schema_does():
    table = GUIDE.partition("<!-- keys -->\n")[2].partition("<!-- /keys -->")[0].splitlines()
    assert table[2:] == list(keys())


@pytest.mark.slow
def test_the_guide_s_command_by_make(tmp_path):
    """In a copy of the repository, word for word."""
    files = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in files.stdout.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    write_files(tmp_path)
    line = ["make", "prepare", *COMMAND, f"PYTHON={sys.executable}"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "17 samples of 22 events: 13 train, 1 valid, 3 test" in done.stdout
    assert (tmp_path / "artifacts" / "corner-shop" / "log" / "manifest.json").exists()
