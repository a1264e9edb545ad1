"""CRMs as ONNX files, for servers without PyTorch.

    python -m stages.onnx DATASET=demo CRM="din sim" key=value ...
    python -m stages.onnx check

`check` only says whether the packages are there. `make onnx` trains the CRMs first, where they are not there
yet. Each one's files go to `artifacts/<dataset>/onnx/<crm>`, with `onnx.json`, which says what goes in and
what comes out, and are compared with the model on rows of the test split.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from recllm import paths
from recllm.config.request import parse
from recllm.crm import load
from recllm.crm.onnx import check_onnx, check_packages, export_onnx
from recllm.errors import ConfigError, StageError
from recllm.eventlog.log import EventLog
from recllm.pipeline.finished import Finished
from recllm.pipeline.graph import Plan
from recllm.pipeline.stage_file import Role
from recllm.retrieval.stored import Retrieval
from recllm.systems.crm import crm_inputs

ROWS = 256
"""Rows of the test split that the files are compared on, in batches of 1, of half of them, of the rest."""


def export(folder: Path, out: Path) -> None:
    """Write a finished CRM's ONNX files, compare them with the model, and print what was written.

    Args:
        folder: of the finished stage 1.
        out: folder of the files, made if absent.
    """
    stage = Finished.open(folder)
    log = EventLog.open(stage.parent(Role.LOG).folder)
    reads = stage.config.stage1.inputs
    retrieval = (
        Retrieval.open(stage.parent(Role.NEIGHBORS).folder, log) if reads["search"] == "semantic" else None
    )
    inputs = crm_inputs(log, reads, retrieval)
    model = load(stage.export)
    description = export_onnx(model, out)
    rows = log.rows("test", f"last{ROWS}")
    batches = [
        inputs(part) for part in (rows[:1], rows[1 : len(rows) // 2], rows[len(rows) // 2 :]) if len(part)
    ]
    for output, difference in check_onnx(model, out, batches).items():
        print(f"{out / output}: {difference:.1e} from the model at most, over {len(rows)} rows")
    print(description)


def main(arguments: Sequence[str]) -> int:
    """Export; what cannot be done is one line and status 2."""
    try:
        check_packages()
        if list(arguments) == ["check"]:
            return 0
        plan = Plan(parse(["stage1", *arguments]))
        for node in plan.goals["stage1"]:
            if node.stage.name == "stage1":
                out = plan.root / paths.ONNX / Path(node.folder).name
                export(paths.stage(plan.root, node.folder), out)
    except (ConfigError, StageError, ValueError, FileNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
