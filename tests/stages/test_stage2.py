"""Which gates stage 2 takes."""

from types import SimpleNamespace

import pytest

from recllm.parents import Crm
from recllm.run import StageError
from stages.stage2 import check_out_of_fold


def crm(hold_out):
    return Crm(None, None, SimpleNamespace(metrics={"hold_out": hold_out}))


def run(representation):
    stage2 = SimpleNamespace(representation=representation)
    return SimpleNamespace(config=SimpleNamespace(stage2=stage2, subsample="uniform300"))


def test_an_out_of_fold_gate_has_seen_no_tuning_row(demo_log):
    check_out_of_fold(run("out_of_fold"), demo_log, crm("uniform300"))
    check_out_of_fold(run("out_of_fold"), demo_log, crm("uniform301"))
    wanted = r"trained on 1 of 300 tuning rows \(stage1.hold_out=uniform299\)"
    with pytest.raises(StageError, match=wanted):
        check_out_of_fold(run("out_of_fold"), demo_log, crm("uniform299"))
    with pytest.raises(StageError, match="trained on 300 of 300"):
        check_out_of_fold(run("out_of_fold"), demo_log, crm("none"))
    check_out_of_fold(run("crm"), demo_log, crm("none"))
