"""Where the time of a command went, against manifests written by hand."""

import os
from dataclasses import replace
from datetime import UTC, datetime

from recllm.pipeline.manifest import Manifest
from recllm.pipeline.spent import spent

BEGUN = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
LOG = Manifest(
    stage="log",
    dataset="demo",
    choice="log",
    parents={},
    config_sha256="",
    outputs=[],
    metrics={},
    seed=0,
    started=BEGUN.isoformat(),
    finished=BEGUN.replace(minute=1).isoformat(),
    seconds=30.0,
    peak_memory_gb=1.25,
    hardware="a processor",
    commit="",
)


def write_rules(root, *folders):
    rules = root / "plans" / "1a2b.mk"
    rules.parent.mkdir()
    rules.write_text("".join(f"{root / folder}/manifest.json: config\n\t@made\n" for folder in folders))
    os.utime(rules, (BEGUN.timestamp(), BEGUN.timestamp()))
    return rules


def write_manifest(root, folder, **figures):
    (root / folder).mkdir(parents=True)
    replace(LOG, **figures).write(root / folder)


def test_a_line_for_each_stage_that_the_command_made(tmp_path):
    rules = write_rules(tmp_path, "tables", "log", "stage1/din")
    late = BEGUN.replace(minute=5).isoformat()
    write_manifest(tmp_path, "stage1/din", finished=late, seconds=90.0, peak_gpu_memory_gb=2.0)
    write_manifest(tmp_path, "log")
    # Done before the command began, and made by another command.
    write_manifest(tmp_path, "tables", finished=BEGUN.replace(hour=11).isoformat())
    write_manifest(tmp_path, "stage1/sim")
    assert spent(rules) == [
        "where the time went",
        "  log               30 s   25%    1.2 GB",
        "  stage1/din        90 s   75%    1.2 GB  2.0 GB of the GPU",
        "2 stages, 2 min one after another, 1.2 GB at most",
    ]


def test_where_all_was_done_before_nothing_is_told(tmp_path):
    rules = write_rules(tmp_path, "log")
    write_manifest(tmp_path, "log", finished=BEGUN.replace(hour=11).isoformat())
    assert spent(rules) == []
