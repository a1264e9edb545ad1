"""Nothing at or below a sample's row reaches what is made of it, and no held-out event reaches training.

For every split, with sampled negatives, with strict ties and without times. Where the log is altered, id
maps, splits, counts and vectors are held fixed.
"""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from recllm.crm.inputs import CrmInputs
from recllm.eventlog.build import build_log
from recllm.eventlog.candidates import KINDS, negatives
from recllm.eventlog.log import EventLog, chronological
from recllm.eventlog.statistics import Statistics
from recllm.retrieval.neighbors import Neighbors
from recllm.retrieval.stored import Retrieval
from recllm.retrieval.vectors import cooccurrence_vectors
from recllm.systems.counting import Cooccurrence, popularity_ctr, popularity_rank
from recllm.systems.texts import build_pieces, tiny_tokenizer
from recllm.text.prompts import Prompts
from stages import lm as lm_stage

CASES = {
    "time": {"split": "time"},
    "time, strict": {"split": "time", "ties": "strict"},
    "last": {"split": "last", "last_n": 2},
    "last, strict": {"split": "last", "ties": "strict"},
    "user": {"split": "user"},
    "items": {"split": "items", "held_items": [0.2, 0.2]},
    "items, strict": {"split": "items", "held_items": [0.2, 0.2], "ties": "strict"},
    "random": {"split": "random"},
    "last, no times": {"split": "last"},
    "random, no times": {"split": "random"},
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request, tmp_path_factory, demo_log, demo_config):
    """Tables, configuration and log of one case, sampled negatives among the rows."""
    folder = tmp_path_factory.mktemp("case")
    tables = demo_log.folder.parent / "tables"
    if "no times" in request.param:
        for path in tables.glob("*.parquet"):
            (folder / path.name).write_bytes(path.read_bytes())
        events = pl.read_parquet(tables / "events.parquet").sort("timestamp")
        events.with_columns(timestamp=pl.lit(None, pl.Int64)).write_parquet(folder / "events.parquet")
        tables = folder
    config = dataclasses.replace(demo_config.prepare, sampled_negatives=1, **CASES[request.param])
    build_log(tables, folder / "log", config)
    return SimpleNamespace(tables=tables, config=config, log=EventLog.open(folder / "log"))


@pytest.fixture(scope="module")
def vectors(demo_log):
    """Two folds of vectors, and the users' folds."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2, demo_log.n_items, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors, rng.integers(0, 2, demo_log.n_users)


@pytest.fixture(scope="module")
def pieces(demo_log, demo_config, tiny_lm):
    """Texts of prompts that say the statistics too."""
    prompt = dataclasses.replace(demo_config.prompt, statistics=True)
    return build_pieces(dataclasses.replace(demo_config, prompt=prompt), demo_log, tiny_lm.tokenizer)


def altered(log, rows):
    """The log with other items, ratings and labels in these rows."""
    rng = np.random.default_rng(len(rows))
    changed = copy.copy(log)
    for name, low, high in (("item", 2, log.n_items), ("rating", 1, 6), ("label", 0, 2)):
        values = np.array(getattr(log, name))
        values[rows] = low + (values[rows] - low + rng.integers(1, high - low, len(rows))) % (high - low)
        setattr(changed, name, values)
    return changed


def stands_at(log, row):
    """The event whose history the row has: itself, or what a row behind the events stands at."""
    return row if row < log.n_events else int(np.load(log.folder / "anchor.npy")[row - log.n_events])


def first_hidden(case, row):
    """The topmost row of the user that the sample may not read: its own, or the first of its second."""
    log, at = case.log, stands_at(case.log, row)
    while case.config.ties == "strict" and at > log.offsets[log.user[row]]:
        if log.timestamp[at - 1] < log.timestamp[row]:
            break
        at -= 1
    return at


def sample_rows(log):
    """A few samples of every split: liked, disliked and sampled ones, alone in their second and not."""
    samples = np.flatnonzero(log.split >= 0)
    above = log.anchors(samples) - 1
    tied = (log.user[above] == log.user[samples]) & (log.timestamp[above] == log.timestamp[samples])
    traits = np.stack([log.split[samples], log.label[samples], samples >= log.n_events, tied], 1)
    _, group = np.unique(traits, axis=0, return_inverse=True)
    return np.concatenate([samples[group == g][:: (group == g).sum() // 3 + 1] for g in np.unique(group)])


def made_of(log, row, target, vectors, pieces):
    """Everything that is computed of a sample before its outcome is known."""
    rows, targets = np.array([row]), np.array([target], np.int32)
    searcher = Neighbors(log, *vectors)
    inputs = CrmInputs(log, recent=20, retrieved=10, searcher=searcher, statistics=Statistics(log))
    batch = inputs(rows, targets)
    batch.pop("label")
    nearest = searcher.search(rows, targets, 10)
    prompts = Prompts(log, pieces, 512)
    asked = prompts.ctr(rows, chronological(nearest), targets)
    listed = prompts.ranking(rows, log.recent(rows, 10), np.array([[2, 3, target]]))
    return [*(batch[name].numpy() for name in sorted(batch)), nearest, asked.tokens, listed.tokens]


def test_nothing_at_or_below_a_sample_reaches_it(case, vectors, pieces):
    rows = sample_rows(case.log)
    assert len(rows) >= 15
    for row in rows:
        target = case.log.item[row]
        end = case.log.offsets[case.log.user[row] + 1]
        below = np.arange(first_hidden(case, row), end)
        drawn = np.arange(case.log.n_events, len(case.log.user))  # no history holds one
        changed = altered(case.log, np.concatenate([below, drawn]))
        if case.log.timed:  # the sample's own time is known when it is asked; later ones are not
            changed.timestamp = np.array(case.log.timestamp)
            changed.timestamp[stands_at(case.log, row) + 1 : end] += 1_000_000
        before = made_of(case.log, row, target, vectors, pieces)
        after = made_of(changed, row, target, vectors, pieces)
        for ours, theirs in zip(before, after, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_nothing_at_or_below_a_sample_reaches_its_negatives(case):
    """Whatever stands above was met, and is out; with strict ties too what is of the sample's second."""
    for row in sample_rows(case.log)[::2]:
        at = stands_at(case.log, row)
        below = np.arange(at, len(case.log.user))
        held_above = np.isin(below, case.log.held_rows) & (case.log.anchors(below) < at)
        changed = altered(case.log, below[(below != row) & ~held_above])
        for kind in KINDS:
            before, after = (negatives(log, np.array([row]), kind, 20, 0) for log in (case.log, changed))
            np.testing.assert_array_equal(before, after)


def test_the_last_event_of_a_history_does_reach_its_sample(case, vectors, tiny_lm):
    """The test above can fail: one row further up, and features, text and neighbors move."""
    row = sample_rows(case.log)[0]
    target = case.log.item[row]
    changed = altered(case.log, np.array([first_hidden(case, row) - 1]))
    assert not np.array_equal(changed.item, case.log.item)
    before = made_of(case.log, row, target, vectors, tiny_lm.pieces)
    after = made_of(changed, row, target, vectors, tiny_lm.pieces)
    same = [np.array_equal(ours, theirs) for ours, theirs in zip(before, after, strict=True)]
    assert same.count(False) >= 3


def text_of(run, log, prompts, retrieval):
    """All text that the tiny LM reads, as pieces."""
    text_rows = lm_stage.TextRows.open(run, log)
    kinds = [
        *lm_stage.first_phase(run, log, prompts, text_rows),
        *lm_stage.second_phase(run, log, prompts, text_rows, retrieval),
    ]
    return [matrix for matrix, _ in kinds]


def learnt(log, config, pieces, stored):
    """What training counts, factorizes or reads as text; `stored` are the neighbors of the log's rows."""
    run = SimpleNamespace(config=config)
    prompts = Prompts(log, pieces, 512)
    texts = text_of(run, log, prompts, Retrieval(stored, None))
    counts = [Cooccurrence(log, directed) for directed in (False, True)]
    return [
        *texts,
        *(table._left.toarray() for table in counts),
        cooccurrence_vectors(log, 8),
        popularity_rank(log),
        popularity_ctr(log),
        np.array(tiny_tokenizer(config, log, config.lm.tiny).get_vocab()),
    ]


def test_no_held_out_event_is_learnt_from(case, vectors, demo_config, tiny_lm):
    log = case.log
    stored = Neighbors(log, *vectors).search(np.arange(len(log.user)), k=10)
    held_out = np.flatnonzero(~log.train_events()[: log.n_events])
    assert set(np.flatnonzero(log.split[: log.n_events] > 0)) <= set(held_out)
    before = learnt(log, demo_config, tiny_lm.pieces, stored)
    for ours, theirs in zip(
        before, learnt(altered(log, held_out), demo_config, tiny_lm.pieces, stored), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    training = np.flatnonzero(log.train_events())[::50]
    after = learnt(altered(log, training), demo_config, tiny_lm.pieces, stored)
    assert not np.array_equal(before[-4], after[-4])  # the vectors, of what may be learnt from


@pytest.mark.parametrize("rows", ["last300", "0.2"])
def test_the_lm_reads_nothing_of_the_events_that_it_holds_out(case, vectors, demo_config, tiny_lm, rows):
    """Neither as targets nor in histories; as many other samples are asked in the subsample's place."""
    log = case.log
    training = dataclasses.replace(demo_config.lm.training, hold_out=rows)
    lm = dataclasses.replace(demo_config.lm, training=training)
    config = dataclasses.replace(demo_config, subsample=rows, lm=lm)
    run, prompts = SimpleNamespace(config=config), Prompts(log, tiny_lm.pieces, 512)
    retrieval = Retrieval(Neighbors(log, *vectors).search(np.arange(len(log.user)), k=10), None)
    held = log.rows("train", rows)
    questions = lm_stage.TextRows.open(run, log).questions
    assert len(questions) == len(np.unique(questions)) == len(held)
    assert not np.isin(questions, held).any()
    assert np.isin(questions, log.rows("train", "1.0")).all()
    before = text_of(run, log, prompts, retrieval)
    events = held[held < log.n_events]
    prompts.log = altered(log, events)
    for ours, theirs in zip(before, text_of(run, prompts.log, prompts, retrieval), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    run.config = dataclasses.replace(
        config, lm=demo_config.lm
    )  # the same exchange, where nothing is held out
    texts = [
        text_of(run, other, Prompts(other, tiny_lm.pieces, 512), retrieval) for other in (log, prompts.log)
    ]
    assert any(not np.array_equal(*pair) for pair in zip(*texts, strict=True))


def test_held_out_opinions_leave_the_rest_of_the_log_as_it_is(case, tmp_path):
    """Through `prepare` itself: ratings of held-out events are exchanged in the tables."""
    log = case.log
    n = log.n_events
    held_out = ~log.train_events()[:n]
    names = {name: pl.read_parquet(log.folder / f"{name}s.parquet")["external"] for name in ("user", "item")}
    keys = pl.DataFrame({name: names[name].gather(getattr(log, name)[:n]) for name in names})
    for path in case.tables.glob("*.parquet"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    events = pl.read_parquet(case.tables / "events.parquet").with_row_index("place")
    chosen = events.join(keys.filter(pl.Series(held_out)).unique(), on=["user", "item"], how="semi")["place"]
    rating = pl.when(pl.col("place").is_in(chosen.implode())).then(6 - pl.col("rating")).otherwise("rating")
    events.with_columns(rating.cast(pl.Float32).alias("rating")).drop("place").write_parquet(
        tmp_path / "events.parquet"
    )
    build_log(tmp_path, tmp_path / "log", case.config)
    other = EventLog.open(tmp_path / "log")
    assert (np.asarray(other.rating)[:n][held_out] != np.asarray(log.rating)[:n][held_out]).mean() > 0.5
    names = ("split", "training", "offsets", "user_fields", "item_fields", "item_count", "item_likes")
    for name in names:
        size = n if name in ("split", "training") else None
        np.testing.assert_array_equal(getattr(other, name)[:size], getattr(log, name)[:size], name)
    trains = log.train_events()[:n]
    for name in ("item", "rating", "label"):
        np.testing.assert_array_equal(getattr(other, name)[:n][trains], getattr(log, name)[:n][trains])
