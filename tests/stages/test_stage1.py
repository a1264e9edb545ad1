"""Which samples stage 1 trains on."""

import numpy as np

from stages.stage1 import training_rows


def test_held_out_rows_are_left_out_and_the_order_is_kept(demo_log):
    every, held = demo_log.rows("train", "all"), demo_log.rows("train", "uniform300")
    rows = training_rows(demo_log, "all", "uniform300")
    assert len(rows) == len(every) - 300
    assert not set(rows.tolist()) & set(held.tolist())
    np.testing.assert_array_equal(rows, [row for row in every if row not in set(held.tolist())])
    np.testing.assert_array_equal(training_rows(demo_log, "all", "none"), every)
    assert set(training_rows(demo_log, "1.0", "uniform300").tolist()) == set(rows.tolist())
