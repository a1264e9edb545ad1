"""What holds of every recipe of a data set, as a class of tests that the tests of each one inherit."""

from __future__ import annotations

import importlib.util
import numbers
import re
import shutil
import sys
from pathlib import Path
from string import Formatter
from types import ModuleType

import polars as pl
import pytest

from recllm.config.merge import load_yaml, merge
from recllm.tables import canonical

REPOSITORY = Path(__file__).parents[2]


def load_recipe(name: str) -> ModuleType:
    """The module `data/<name>/recipe.py`, which is run by its path and is no package's."""
    path = REPOSITORY / "data" / name / "recipe.py"
    spec = importlib.util.spec_from_file_location(f"{name}_recipe", path)
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = recipe
    spec.loader.exec_module(recipe)
    return recipe


def read_tables(folder: Path) -> list[pl.DataFrame]:
    """Events, items and users."""
    return [pl.read_parquet(folder / f"{name}.parquet") for name in canonical.NAMES]


def columns_in(template: str) -> set[str]:
    """The columns that a format string names."""
    return {name for _, name, _, _ in Formatter().parse(template) if name}


class RecipeContract:
    """What must hold of any recipe; the tests of each one inherit it.

    A recipe is `data/<name>/recipe.py` with `make(out, raw, config) -> counts`, which writes the canonical
    tables (`recllm.tables.canonical`) to the folder `out`, and `work(task)`, which does it as a stage. It

    - reads the folder or zip `raw`; None downloads what there is to download (not tested here);
    - writes nothing but `events.parquet`, `items.parquet` and `users.parquet` to `out`, all three or none;
    - writes the same to the bit from the same files;
    - refuses what it cannot read with a ValueError of one line that names the file;
    - returns counts, numbers all, which stand in the stage's manifest.

    Its configuration `conf/dataset/<name>.yaml` names columns of these tables only. Its tests inherit this:

        class TestMine(RecipeContract):
            recipe = load_recipe("mine")
            configured = "mine"

            def write_raw(self, folder):
                (folder / "ratings.csv").write_text(...)

    Attributes:
        recipe: the module.
        configured: name of `conf/dataset/<name>.yaml`; None for a recipe that files of its user's describe.
        reads_raw: whether there are raw files; False for a data set that is generated.
    """

    recipe: ModuleType
    configured: str | None
    reads_raw = True

    def write_raw(self, folder: Path) -> None:
        """Writes raw files, as few rows as make tables, each file one that the recipe cannot do without."""
        raise NotImplementedError

    def make(self, out: Path, raw: Path | None) -> dict[str, int | float]:
        """Runs the recipe on those files."""
        return self.recipe.make(out, raw)

    @pytest.fixture
    def raw_files(self, tmp_path):
        """The folder of the raw files; None where nothing is read."""
        if not self.reads_raw:
            return None
        folder = tmp_path / "raw files"
        folder.mkdir()
        self.write_raw(folder)
        return folder

    def test_it_writes_the_canonical_tables(self, raw_files, tmp_path):
        out = tmp_path / "set" / "tables"
        self.make(out, raw_files)
        assert {path.name for path in out.iterdir()} == {f"{name}.parquet" for name in canonical.NAMES}
        canonical.check(canonical.read(out)[0])
        events, items, users = read_tables(out)
        assert events.columns == ["user", "item", *canonical.EVENTS]
        assert {name: events.schema[name] for name in canonical.EVENTS} == canonical.EVENTS
        for name, table in (("user", users), ("item", items)):
            assert table.columns[0] == name
            assert table.schema[name] == events.schema[name]
            assert table.schema[name] in canonical.EXTERNAL_IDS
            assert events.join(table, on=name, how="anti").is_empty()
        assert items.columns[1] == "title"
        assert items.schema["title"] == pl.String

    def test_it_counts_in_numbers(self, raw_files, tmp_path):
        counts = self.make(tmp_path / "set" / "tables", raw_files)
        assert counts
        assert all(isinstance(count, numbers.Real) for count in counts.values())

    def test_the_same_files_give_the_same_tables(self, raw_files, tmp_path):
        first = self.make(tmp_path / "one" / "tables", raw_files)
        again = self.make(tmp_path / "two" / "tables", raw_files)
        assert first == again
        tables = [read_tables(tmp_path / name / "tables") for name in ("one", "two")]
        for one, two in zip(*tables, strict=True):
            assert one.schema == two.schema
            assert one.equals(two)

    def test_tables_that_are_there_already_are_replaced(self, raw_files, tmp_path):
        out = tmp_path / "set" / "tables"
        self.make(out, raw_files)
        tables = read_tables(out)
        for name in canonical.NAMES:
            pl.DataFrame({"stale": [1]}).write_parquet(out / f"{name}.parquet")
        self.make(out, raw_files)
        for table, again in zip(tables, read_tables(out), strict=True):
            assert table.equals(again)

    def test_a_missing_file_is_refused_in_one_line_and_nothing_is_left(self, raw_files, tmp_path):
        if not self.reads_raw:
            pytest.skip("reads no files")
        out = tmp_path / "set" / "tables"
        names = sorted(path.name for path in raw_files.iterdir())
        assert names
        for name in names:
            others = tmp_path / "others"
            shutil.copytree(raw_files, others)
            (others / name).unlink()
            with pytest.raises(ValueError, match=re.escape(name)) as error:
                self.make(out, others)
            assert "\n" not in str(error.value)
            assert not list(out.glob("*"))
            shutil.rmtree(others)

    def test_a_folder_that_is_not_there_is_refused_in_one_line(self, tmp_path):
        if not self.reads_raw:
            pytest.skip("reads no files")
        with pytest.raises(ValueError, match="nowhere") as error:
            self.make(tmp_path / "set" / "tables", tmp_path / "nowhere")
        assert "\n" not in str(error.value)
        assert not list((tmp_path / "set" / "tables").glob("*"))

    def test_its_configuration_names_columns_that_are_there(self, raw_files, tmp_path):
        if self.configured is None:
            pytest.skip("is configured by whoever brings the files")
        self.make(tmp_path / "set" / "tables", raw_files)
        _, items, users = read_tables(tmp_path / "set" / "tables")
        path = REPOSITORY / "conf" / "dataset" / f"{self.configured}.yaml"
        config = merge([(str(path), load_yaml(path))], {})
        assert config.dataset.name == self.configured
        assert set(config.prepare.item_fields) <= set(items.columns)
        assert config.prepare.category in config.prepare.item_fields
        assert set(config.prepare.user_fields) <= set(users.columns)
        assert columns_in(config.dataset.description) <= set(items.columns)
        assert columns_in(config.wording.profile) <= set(users.columns)

    def test_it_can_be_run_as_a_stage(self):
        assert callable(self.recipe.work)
        assert (self.recipe.work.__doc__ or "").strip()
