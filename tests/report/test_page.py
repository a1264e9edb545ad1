"""The report: every system and number in it, what is missing is said, nothing from the network."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import numpy as np
import pytest

from recllm.evaluation import results
from recllm.evaluation.results import SYSTEMS, ResultRow
from recllm.report import write_report
from recllm.report.curves import POINTS, _thinned, draw, read_series
from recllm.report.forgetting import forgetting_tables
from tests.report.artifacts import write_stage


def fill(folder: Path) -> None:
    """Artifacts of a whole run, in miniature."""
    rows = []
    for number, system in enumerate(SYSTEMS):
        ranking = system in {"cooccurrence", "sft", "dpo", "s-dpo", "crm-ranker"}
        value = 0.6 + number / 1000
        row = ResultRow(
            system, "stage2", "ranking" if ranking else "ctr", "test/all", 12_345,
            {"hr@1": value, "mrr": 0.5} if ranking
            else {"auc": value, "logloss": 0.5, "ece": 0.0123, "auc/users_low": 0.3, "rows/users_low": 321},
            candidates="popular20" if ranking else None, delta=0.01, interval95=[-0.001, 0.02],
            paired_with="sim", commit="abc123", hardware="2 cores", command="make stage2 & <others>",
            date="2026-01-02",
        )  # fmt: skip
        rows.append(results.of_seed(row, 0))
    results.write(folder / "results.json", results.merge([], rows))
    for name in ("log", "lm/tiny/text", "neighbors/both", "stage1/sim", "stage2/reclora", "stage3/s-dpo"):
        (folder / name / "logs").mkdir(parents=True)
        with (folder / name / "x").open("wb") as output:
            output.truncate(3_000_000)
        write_stage(
            folder, name, seed=7, finished="2026-01-01", seconds=12.0, commit="def456",
            outputs=[{"path": "x", "bytes": 3_000_000, "sha256": ""}], metrics={"samples": 970_009, "x": None,
            "notes": ["ties=rows: <none>"]}, versions={"torch": "2.13"}, hardware="2 cores",
        )  # fmt: skip
    (folder / "stage1/sim/logs/metrics.csv").write_text(
        "step,epoch,train/loss,valid/auc\n0,0,0.7,\n10,0,0.6,\n10,0,,0.71\n20,1,0.5,\n20,1,,0.75\n"
    )


def test_everything_is_on_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "ml-1m"
    fill(folder)
    out = tmp_path / "deep" / "report.html"
    assert write_report(folder, out) == []
    page = out.read_text()
    for row in results.read(folder / "results.json"):
        value = row.metrics["auc" if row.task == "ctr" else "hr@1"]
        assert re.search(rf"<td[^>]*>{row.system}</td>.*{value:.4f}".replace("0.", r"\."), page), row.system
    for wanted in ("recllm on ml-1m", "abc123", "def456", "2 cores", "12,345", "torch 2.13", "samples 970009",
                   "make stage2 &amp; &lt;others&gt;", "stage3/s-dpo", "3.0 MB", "ties=rows: &lt;none&gt;",
                   "[-.0010, +.0200]", "ECE", ".0123", "user: few events, 321 rows", ".3000"):  # fmt: skip
        assert wanted in page, wanted
    assert "Not there" not in page
    assert len(re.findall(r'<td class="n best">', page)) >= 2
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]


def test_the_verdict_opens_the_page_and_facts_end_it(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    fill(folder)
    (folder / "stage3/s-dpo/logs/metrics.csv").write_text(
        "step,train/loss,valid/margin,valid/reward_chosen\n0,0.7,0,0\n5,0.6,0.25,-0.5\n"
    )
    (folder / "stage1/din" / "checkpoints").mkdir(parents=True)
    (missing,) = write_report(folder, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    order = (
        'id="verdict"', "<strong>", 'class="forest"', "1 part is missing", '<div class="wide">',
        "Training curves</h2>", "Calibration</h2>", "By user activity", "What tuning did", "Rewards</h2>",
        "What it cost</h2>", 'id="facts"', "What was run", "Stages</h2>", "Not there</h2>", missing,
    )  # fmt: skip
    places = [page.index(wanted) for wanted in order]
    assert places == sorted(places)
    assert page.count("<h1>") == 1
    # The aligned run: its rewards in a table and a picture of their own, its loss among the training curves.
    line = re.search(r'<td class="">stage3/s-dpo</td><td class="n">5</td>(.*)</tr>', page)
    assert line is not None
    assert re.findall(r">([^<]*)</td>", line[1]) == ["-.5000", "", ".2500", "", "", "", ""]
    panels = {
        alt: base64.b64decode(image).decode()
        for alt, image in re.findall(
            r'<img alt="([^"]*s-dpo)" src="data:image/svg\+xml;base64,([^"]+)"', page
        )
    }
    assert ">loss<" in panels["Training curves of stage3/s-dpo"]
    assert ">margin<" not in panels["Training curves of stage3/s-dpo"]
    assert ">margin<" in panels["Rewards of stage3/s-dpo"]
    assert '<td class="">all</td><td class="n">72</td>' in page  # six stages of 12 seconds


def test_every_system_of_the_verdict_is_in_the_picture_in_words_too(tmp_path: Path) -> None:
    fill(tmp_path / "demo")
    write_report(tmp_path / "demo", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    forests = re.findall(r'<table class="forest".*?</table>', page, re.S)
    assert len(forests) == 2  # CTR and ranking
    named = set(re.findall(r'role="rowheader">([^<]+)<', "".join(forests)))
    assert named == set(SYSTEMS)
    for forest in forests:
        lines = re.findall(r"<tr.*?</tr>", forest, re.S)[1:]
        assert all('aria-hidden="true"' in line for line in lines)  # words say what the picture shows
        assert sum('class="reference"' in line for line in lines) == 1


def test_what_tuning_did_by_system(tmp_path: Path) -> None:
    folder, rows = tmp_path / "ml-1m", []
    figures = {
        "reclora-milora": {"text_loss": 2.5, "forgotten": 0.125, "update": 0.03125, "update/v_proj": 0.0625},
        "lora": {"text_loss": 2.25, "forgotten": -0.125, "update": 0.5, "update/q_proj": 0.25},
        "lm": {"text_loss": 2.375},
        "sim": {},
    }
    for system, found in figures.items():
        row = ResultRow(system, "stage2", "ctr", "test/all", 10, {"auc": 0.75, **found})
        rows.append(results.of_seed(row, 0))
    (table,) = forgetting_tables(rows)
    assert table.heading[-2:] == ["q_proj", "v_proj"]
    assert table.cells == [
        ["lm", "2.3750", "", "", "", ""],
        ["lora", "2.2500", "-0.1250", "0.5000", "0.2500", ""],
        ["reclora-milora", "2.5000", "+0.1250", "0.0312", "", "0.0625"],
    ]
    folder.mkdir()
    results.write(folder / "results.json", rows)
    write_report(folder, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert all(f">{cell}<" in page for cells in table.cells for cell in cells if cell)


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    fill(tmp_path / "demo")
    write_report(tmp_path / "demo", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "http" not in page
    image = re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert image is not None
    svg = base64.b64decode(image[1]).decode()
    assert all(wanted in svg for wanted in (">auc<", ">loss<", ">valid<"))


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    (tmp_path / "demo" / "stage1" / "din" / "checkpoints").mkdir(parents=True)
    missing = write_report(tmp_path / "demo", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    text = " ".join(missing)
    for wanted in ("results.json", "prepare", "neighbors", "stage3", "stage1/din was begun"):
        assert wanted in text, wanted
    assert page.count("<li>") == len(missing)
    for wanted in (
        "No results of this task yet",
        "No training logs",
        "Nothing finished in stage",
        "not recorded",
    ):
        assert wanted in page, wanted
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        write_report(tmp_path / "nothing-here", tmp_path / "report.html")


@pytest.mark.parametrize("harm", ["manifest", "config", "layout", "output"])
def test_a_stage_that_cannot_be_read_is_said_and_the_rest_is_told(tmp_path: Path, harm: str) -> None:
    fill(tmp_path / "demo")
    folder = tmp_path / "demo" / "stage2" / "reclora"
    if harm == "manifest":
        (folder / "manifest.json").write_text('{"stage": ')
    if harm == "config":
        (folder / "config.yaml").unlink()
    if harm == "layout":
        (folder / "config.yaml").write_text("stage: stage2\n")
    if harm == "output":
        (folder / "x").unlink()
    (line,) = write_report(tmp_path / "demo", tmp_path / "r.html")
    assert line.startswith("stage2/reclora cannot be read: ")
    assert "\n" not in line
    page = (tmp_path / "r.html").read_text()
    assert ">stage2/reclora<" not in page
    assert ">stage3/s-dpo<" in page


def test_stages_that_are_only_read_elsewhere_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "shared" / "demo")
    own = tmp_path / "own" / "demo"
    write_stage(own, "stage2/lora", seed=3)
    write_stage(own, "stage1/sim", seed=4)
    monkeypatch.setenv("RECLLM_PARENTS", str(tmp_path / "shared"))
    missing = write_report(own, tmp_path / "r.html")
    assert missing == ["No results: results.json is missing or empty; `make evaluate` writes it."]
    page = (tmp_path / "r.html").read_text()
    for wanted in ("stage2/lora", "stage2/reclora", "log"):
        assert f"<td>{wanted}</td>" in page, wanted
    assert '<td>stage1/sim</td><td class="n">4</td>' in page  # its own comes first


def test_curves_skip_gaps_and_take_the_later_line_of_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train/loss,valid/auc\n0,5,0.5,\n0,1,0.9,nan\n0,5,0.4,\n0,5,,0.8\n0,,1,1\n")
    series = read_series(path)
    assert series["train/loss"][0].tolist() == [1, 5]
    assert series["train/loss"][1].tolist() == [0.9, 0.4]
    assert series["valid/auc"][0].tolist() == [5]
    assert draw(series) == draw(series)  # the same file from the same data


def test_rewards_of_chosen_and_rejected_share_a_panel() -> None:
    steps = np.arange(3.0)
    names = ("train/reward_chosen", "valid/reward_chosen", "train/reward_rejected", "valid/kl")
    svg = base64.b64decode(draw({name: (steps, steps) for name in names}).partition(",")[2]).decode()
    assert svg.count(">reward<") == 1
    for label in ("train chosen", "valid chosen", "train rejected", "kl"):
        assert f">{label}<" in svg, label


def test_an_unusable_log_is_said(tmp_path: Path) -> None:
    fill(tmp_path / "demo")
    (tmp_path / "demo/stage2/reclora/logs/metrics.csv").write_text("epoch,step,train/loss\n")
    assert write_report(tmp_path / "demo", tmp_path / "r.html") == [
        "stage2/reclora/logs/metrics.csv holds no curve."
    ]
    assert "stage2/reclora/logs/metrics.csv holds no curve." in (tmp_path / "r.html").read_text()


def test_long_curves_are_averaged_not_sampled() -> None:
    noisy = np.tile([0.0, 1.0], 3000)
    thin = _thinned(noisy)
    assert len(thin) == POINTS
    np.testing.assert_allclose(thin, 0.5)
    np.testing.assert_allclose(_thinned(noisy[:10]), noisy[:10])
