"""Whether texts fit an LM, before anything is trained on them."""

from dataclasses import replace

import numpy as np
import pytest

from recllm.errors import StageError
from recllm.systems.texts import check_fit
from recllm.text.collate import Ragged
from recllm.text.prompts import Prompts


def test_a_title_that_does_not_fit_is_named_with_its_length(demo_log, tiny_lm):
    pieces = tiny_lm.pieces
    check_fit(demo_log, pieces, 256)
    item = pieces.item.copy()
    item[7] = len(pieces.table)
    table = Ragged(
        np.append(pieces.table.tokens, np.full(257, 9, np.int32)),
        np.append(pieces.table.offsets, pieces.table.offsets[-1] + 257),
    )
    outlier = replace(pieces, table=table, item=item, kind=np.append(pieces.kind, 1))
    wanted = r"item \S+ \('.+'\) makes a prompt of \d+ tokens, 257 of them its title, .*; wanted 256 at most"
    with pytest.raises(StageError, match=wanted) as refused:
        check_fit(demo_log, outlier, 256)
    # What it says fits does fit: the rows that ask for the item, without their history.
    whole = int(str(refused.value).partition(" tokens")[0].rpartition(" ")[2])
    check_fit(demo_log, outlier, whole)
    rows = np.flatnonzero((demo_log.item == 7) & (demo_log.split >= 0))
    none = np.zeros((len(rows), 0), np.int64)
    prompts = Prompts(demo_log, outlier, whole)
    assert prompts.ctr(rows, none).lengths.max() == whole
    prompts.ranking(rows, none)
