"""`make describe`: after prepare alone, and when more is there."""

import shutil

import numpy as np
import polars as pl
import pytest

from recllm.config.request import parse
from recllm.pipeline.graph import Plan
from recllm.pipeline.manifest import Manifest
from recllm.report import prompt_examples
from stages import describe


@pytest.fixture(scope="module")
def nodes():
    """Stage -> node of the plan; to resolve it takes a second or more, so it is done once."""
    return {node.stage.name: node for node in Plan(parse(["stage2"])).nodes.values()}


@pytest.fixture
def prepared(demo_log, nodes, tmp_path, monkeypatch):
    """A data set's artifacts with nothing but a log of 40 users."""
    monkeypatch.setenv("RECLLM_ARTIFACTS", str(tmp_path))
    shutil.copytree(demo_log.folder, tmp_path / "demo" / "log")
    done(tmp_path / "demo", nodes["tables"], {"dropped_events_no_time": 1_234})
    done(tmp_path / "demo", nodes["log"], {"notes": ["a <note>"]})
    return tmp_path / "demo"


def done(root, node, metrics):
    """Pretend that a stage was done; returns its folder."""
    folder = root / node.folder
    folder.mkdir(parents=True, exist_ok=True)
    parents = {p.folder: Manifest.read(root / p.folder).identity for p in node.above}
    digest = node.file.sha256
    Manifest(node.stage.name, "demo", "", parents, digest, [], metrics, 0, "", "", 0.0).write(folder)
    return folder


def test_prepare_alone_is_enough(prepared, capsys):
    assert describe.main(["DATASET=demo"]) == 0
    out, page = capsys.readouterr().out, (prepared / "describe.html").read_text()
    assert out.splitlines()[-1] == str(prepared / "describe.html")
    assert "a &lt;note&gt;" in page
    assert "neighbors are not there yet" in page
    for shown in (out, page):
        assert "events dropped: no time" in shown
        assert "1,234" in shown
        assert "yes or no" in shown
        assert "next title" in shown
    assert "(1 stars)" in page or "(5 stars)" in page
    assert "<b> Yes</b>" in page
    assert "<b> No</b>" in page
    assert "&lt;/s&gt;</b>" in page  # a title and EOS


def test_texts_that_a_gap_shortens_are_counted(prepared, capsys):
    path = prepared / "log" / "items.parquet"
    items = pl.read_parquet(path)
    gone = (pl.col("item") >= 2) & (pl.col("item") < 9)
    items.with_columns(genre=pl.when(gone).then(None).otherwise("genre")).write_parquet(path)
    assert describe.main(["DATASET=demo"]) == 0
    out, page = capsys.readouterr().out, (prepared / "describe.html").read_text()
    for shown in (out, page):
        assert "shortened by an empty column (dataset.description)" in shown
        assert f"7 of {items.height - 2:,}" in shown
        assert "(wording.profile)" not in shown


def test_prompts_show_the_neighbors_once_they_are_there(prepared, nodes, demo_log):
    row = demo_log.rows("test", prompt_examples.SAMPLE)
    row = row[demo_log.label[row] == 1][0]
    nearest = np.full((len(demo_log.user), 30), -1, np.int32)
    oldest = demo_log.history(np.array([row]))[0][0]
    nearest[row, :2] = oldest + 1, oldest
    done(prepared, nodes["lm-text"], {})
    folder = done(prepared, nodes["neighbors"], {})
    np.save(folder / "neighbors.npy", nearest)
    assert describe.main(["DATASET=demo"]) == 0
    page = (prepared / "describe.html").read_text()
    assert "neighbors are not there yet" not in page
    example = page.partition("<h3>Yes or no, liked")[2].partition("</pre>")[0]
    titles = pl.read_parquet(demo_log.folder / "items.parquet")["title"]
    first, second = (titles[int(demo_log.item[oldest + place])] for place in (0, 1))
    assert f"rated them:\n{first} (" in example
    assert f"{second} (" in example
    assert example.count(" stars)") == 2


def test_without_the_lms_tokenizer_the_rest_is_told(prepared):
    assert describe.main(["DATASET=demo", "LM=nobody/nothing-of-this-name"]) == 0
    page = (prepared / "describe.html").read_text()
    assert "Prompts: lm.model.path &#39;nobody/nothing-of-this-name&#39;" in page
    assert "Not counted: see above." in page
    assert "cold users" in page


def test_without_a_log_it_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RECLLM_ARTIFACTS", str(tmp_path))
    assert describe.main(["DATASET=demo"]) == 2
    assert capsys.readouterr().err.startswith("error: no event log in ")
    assert describe.main(["DATASET=dmo"]) == 2
    assert "DATASET=dmo is not known" in capsys.readouterr().err
