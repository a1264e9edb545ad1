"""The report's section on gates: groups, neighbors in alpha, and what is logged while training."""

import base64
import shutil
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from recllm.evaluation.gates import GateRecord
from recllm.pipeline.stage_file import Role
from recllm.report import write_report
from recllm.report.gate import gate_sections, user_groups
from recllm.report.stages import finished_stages
from tests.report.artifacts import write_stage


@pytest.fixture
def artifacts(tmp_path, demo_log, demo_config):
    """A finished stage 2 whose gate gives users with an even id the first meta-LoRA, others the second."""
    shutil.copytree(demo_log.folder, tmp_path / "log")
    write_stage(tmp_path, "log")
    config = {"wording": asdict(demo_config.wording)}
    folder = write_stage(tmp_path, "stage2/reclora", parents={Role.LOG: "log"}, config=config)
    (folder / "logs").mkdir()
    (folder / "logs/metrics.csv").write_text("step,valid/auc,valid/gate_entropy\n0,0.5,1.0\n9,0.6,0.8\n")
    valid = demo_log.rows("valid", "all")
    rows = valid[np.argsort(demo_log.user[valid], kind="stable")]
    even = demo_log.user[rows] % 2 == 0
    alpha = np.where(even[:, None], [0.7, 0.2, 0.1], [0.2, 0.7, 0.1])[:, None].astype(np.float32)
    # One user stands apart from all others.
    alpha[demo_log.user[rows] == demo_log.user[rows[0]]] = [0.0, 0.0, 1.0]
    GateRecord(rows, alpha).save(folder / "gate.npz")
    return tmp_path


def sections(artifacts):
    return gate_sections(finished_stages(artifacts, []).values(), [])


def test_users_are_told_by_their_weights(artifacts, demo_log):
    (section,) = sections(artifacts)
    assert section.title == "stage2/reclora"
    record = GateRecord.read(artifacts / "stage2/reclora/gate.npz")
    users, alpha, _ = record.by_user(demo_log)
    assert section.divergent.cells[0][1] == f"user {users[0]}"
    # The distance from the mean by hand: half the sum of |(0, 0, 1) - mean|, so 1 less the mean's third.
    assert section.divergent.cells[0][0] == f"{1 - alpha.mean(0)[2]:.4f}"
    told = section.nearest.cells
    assert [line[0] == "" for line in told] == [True, False, False] * 3
    # The second user's neighbors have its very weights, and so its parity.
    assert [line[0] for line in told[4:6]] == ["at 0.0000"] * 2
    assert {int(line[1].split()[1]) % 2 for line in told[3:6]} == {int(users[1]) % 2}
    titles = pl.read_parquet(demo_log.folder / "items.parquet")["title"].to_list()
    assert all(title in titles for title in told[0][3].split("; "))
    assert len(told[0][3].split("; ")) == 5
    assert any("between users" in line for line in section.summary)
    assert any("100 % is between users" in line for line in section.summary)  # a user's rows are alike
    svg = base64.b64decode(section.image.partition(",")[2]).decode()
    for word in ("entropy over training", "alpha of all = 1, by activity", "meta-LoRA"):
        assert f">{word}<" in svg, word


def test_groups_hold_every_user_once_a_field(artifacts, demo_log):
    users = np.unique(demo_log.user[demo_log.rows("valid", "all")])
    groups = user_groups(demo_log, users)
    fields = list(dict.fromkeys(group.field for group in groups))
    assert fields[0] == "activity"
    assert len(fields) > 1
    for field in fields:
        assert (sum(group.members.astype(int) for group in groups if group.field == field) == 1).all(), field
    active = np.bincount(demo_log.user[demo_log.train_events()], minlength=demo_log.n_users)[users]
    thirds = [active[group.members] for group in groups if group.field == "activity"]
    for lower, upper in pairwise(thirds):
        assert lower.max() < upper.min()
    table = pl.read_parquet(demo_log.folder / "users.parquet")
    for group in groups:
        if group.field != "activity":
            own = table[group.field].cast(pl.String).to_numpy()[users]
            assert ((own == group.value) == group.members).all()


def test_the_page_has_the_section(artifacts):
    write_report(artifacts, artifacts / "report.html")
    page = (artifacts / "report.html").read_text()
    for wanted in (
        "What the gate does",
        "Nearest users by alpha",
        "Most divergent users",
        "distance from all",
    ):
        assert wanted in page, wanted


def test_an_unfinished_stage_or_none_has_no_section(artifacts):
    (artifacts / "stage2/reclora/manifest.json").unlink()
    assert sections(artifacts) == []
    shutil.rmtree(artifacts / "stage2")
    assert sections(artifacts) == []


def test_a_gate_whose_log_is_gone_is_said(artifacts):
    (artifacts / "log/manifest.json").unlink()
    missing = []
    assert gate_sections(finished_stages(artifacts, []).values(), missing) == []
    (line,) = missing
    assert "the gate of stage2/reclora" in line
