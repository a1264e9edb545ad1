"""Runs one stage: reads what its folder says, verifies its parents, and calls the stage's `work(run)`.

Of a study (`make tune`) it is `tune(run)` in the module that trains the CRM.

    python -m stages artifacts/demo/stage1/din [trainer.devices=2 ...] [raw=FOLDER]

Make does it in the right order, e.g. `make stage1`. The stage's module, with all that it needs, is imported
only where there is something to do.
"""

from __future__ import annotations

import importlib
import sys

from recllm.pipeline.run import Run, main


def work(run: Run) -> None:
    """Do the stage's own work."""
    module = importlib.import_module(run.file.module)
    if run.stage == "tune":
        module.tune(run)
    else:
        module.work(run)


if __name__ == "__main__":
    sys.exit(main(work, sys.argv[1:]))
