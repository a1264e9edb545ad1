"""What users call: external ids in, tables out; every filter, every rule, every refusal in a line."""

import re
import shutil
import subprocess
import sys
from datetime import UTC, date, datetime

import numpy as np
import polars as pl
import pytest

from recllm.errors import StageError
from recllm.serving.bundle import LAYOUT, check_bundle, write_bundle
from recllm.serving.recommender import Recommender, second_of

USERS = [1, 2, 3, 40]


def items_by_user(table):
    return {user[0]: group["item"].to_list() for user, group in table.group_by("user", maintain_order=True)}


def test_a_table_of_external_ids(recommender):
    table = recommender.recommend(USERS, k=8)
    assert table.columns == ["user", "item", "score", "rank", "title", "popularity", "crm", "lm"]
    assert table["user"].to_list() == [user for user in USERS for _ in range(8)]
    assert table["rank"].to_list() == list(range(1, 9)) * 4
    assert table.schema["item"] == pl.Int64
    for _, group in table.group_by("user"):
        assert group["item"].n_unique() == 8
        assert (group["score"].diff().drop_nulls() <= 0).all()
    # Six titles are ranked by the LM; the two below keep the CRM's order, and have no score of it.
    assert table.filter(pl.col("rank") <= 6)["lm"].null_count() == 0
    assert table.filter(pl.col("rank") > 6)["lm"].null_count() == 8
    assert table["crm"].null_count() == 0
    assert recommender.counts["known_users"] == 4
    assert recommender.counts["shorter_lists"] == 0
    again = recommender.recommend(USERS, k=8)
    assert again.equals(table)


def test_what_was_seen_is_left_out(recommender):
    log = recommender.log
    dense = recommender.maker.users.dense([1])[0]
    seen = log.item[log.offsets[dense] : log.offsets[dense + 1]]
    seen = set(recommender.maker.items.external(seen).to_list())
    new = recommender.recommend([1], k=20)["item"].to_list()
    assert not seen & set(new)
    with_seen = recommender.recommend([1], k=20, filter_viewed=False)["item"].to_list()
    assert seen & set(with_seen)
    excluded = recommender.recommend([1, 2], k=5, exclude=new[:3])
    assert not set(excluded["item"]) & set(new[:3])
    own = pl.DataFrame({"user": [2] * 3, "item": new[:3]})
    of_one = items_by_user(recommender.recommend([1, 2], k=5, exclude=own))
    assert of_one[1] == new[:5] or set(of_one[1]) <= set(new)
    assert not set(of_one[2]) & set(new[:3])


def test_only_some_items_and_shorter_lists(recommender):
    allowed = recommender.recommend([1], k=4, filter_viewed=False)["item"].to_list()
    table = recommender.recommend([1, 2], k=10, items_to_recommend=[*allowed, 987654], filter_viewed=False)
    assert set(table["item"]) <= set(allowed)
    assert table.height == 8
    assert recommender.counts["shorter_lists"] == 2


def test_strangers_with_and_without_a_history(recommender):
    histories = pl.DataFrame(
        {"user": [900, 900, 901, 1], "item": [5, 7, 999999, 5], "rating": [5.0, 1.0, 3.0, 4.0]}
    )
    table = recommender.recommend([900, 901, 902, 1], k=6, histories=histories)
    lists = items_by_user(table)
    assert not {5, 7} & set(lists[900])
    assert table.filter(pl.col("user") == 900)["crm"].null_count() == 0
    # Nothing is known of 901, whose only item is unknown, or of 902: the most popular items.
    assert lists[901] == lists[902]
    assert table.filter(pl.col("user") == 902)["crm"].null_count() == 6
    counts = recommender.counts
    assert (counts["answered_by_popularity"], counts["unknown_users"]) == (2, 3)
    assert counts["skipped_unknown_items"] == 1
    alone = recommender.recommend(None, k=6, histories=histories.filter(pl.col("user") == 900))
    assert alone["item"].to_list() == lists[900]
    assert recommender.recommend([902, 1], k=3, on_unknown="skip")["user"].unique().to_list() == [1]
    assert recommender.counts["skipped_users"] == 1


def test_any_time(recommender):
    log = recommender.log
    dense = recommender.maker.users.dense([1])[0]
    at = int(log.timestamp[log.offsets[dense] + 10])
    early = recommender.recommend([1], k=5, time=at)
    frame = pl.DataFrame({"user": [1], "time": [datetime.fromtimestamp(at, UTC)]})
    assert recommender.recommend(frame, k=5).equals(early)
    before_all = recommender.recommend([1], k=5, time=0)
    assert before_all["crm"].null_count() == 5  # no history yet
    assert second_of("1970-01-02") == second_of(date(1970, 1, 2)) == second_of("86400") == 86400


def test_scores_of_pairs(recommender):
    pairs = pl.DataFrame({"user": [1, 1, 900, 2], "item": [5, 6, 5, 888888]})
    table = recommender.score(pairs)
    assert table["user"].to_list() == [1, 1, 900, 2]
    assert table["item"].to_list() == [5, 6, 5, 888888]
    assert table["score"].null_count() == 1
    assert table["score"][3] is None
    assert table["score"].drop_nulls().is_between(0, 1).all()
    assert table["score"].to_list() == table["lm"].to_list()
    assert recommender.counts["unknown_items"] == 1


def test_similar_items(recommender):
    table = recommender.similar_items([5, 6], k=3)
    assert table["target_item"].to_list() == [5] * 3 + [6] * 3
    assert table["rank"].to_list() == [1, 2, 3] * 2
    assert (table["item"] != table["target_item"]).all()
    assert table["score"].is_between(-1.001, 1.001).all()
    empty = recommender.similar_items([], k=3)
    assert empty.is_empty()
    assert empty.columns == table.columns


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"users": [1, 12345], "on_unknown": "error"}, "12345.*not in the log"),
        ({"users": [1, 2, 1]}, "user 1: stands there more than once"),
        ({"users": [1], "k": 0}, "k is 0; wanted 1 to"),
        ({"users": [1], "k": 10**6}, "k is 1000000; wanted 1 to"),
        ({"users": [1], "items_to_recommend": [10**9]}, "none of the 1 items_to_recommend"),
        ({"users": [1], "time": "soon"}, "time='soon'; wanted Unix seconds or ISO text"),
        ({"users": [1], "on_unknown": "guess"}, "on_unknown='guess'; wanted one of"),
        ({"users": None}, "neither users nor histories"),
        ({"users": [None, 1]}, "no user id"),
        ({"users": pl.DataFrame({"name": [1]})}, "columns name; wanted one named user"),
        (
            {
                "users": [1],
                "time": 1000,
                "histories": pl.DataFrame({"user": [1], "item": [5], "timestamp": [2000]}),
            },
            "second 2000, after the query's own, 1000",
        ),
    ],
)
def test_bad_input_is_one_line(recommender, asked, line):
    with pytest.raises(ValueError, match=line) as raised:
        recommender.recommend(**asked)
    assert "\n" not in str(raised.value)


def test_nothing_to_exclude_everything(recommender):
    every = recommender.maker.items.by_dense_id[2:].to_list()
    with pytest.raises(ValueError, match="exclude leaves no item"):
        recommender.recommend([1], exclude=every)


def test_nobody_is_an_empty_table(recommender):
    table = recommender.recommend(pl.Series("user", [], dtype=pl.Int64))
    assert table.height == 0
    assert table.columns[:5] == ["user", "item", "score", "rank", "title"]


@pytest.fixture(scope="module")
def bundle(cascades, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "bundle" / "reclora"
    write_bundle(cascades["reclora"], folder)
    return folder


def test_a_bundle_recommends_the_same_read_only(bundle, recommender, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(bundle, copy)
    for path in sorted(copy.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    loaded = Recommender.load(copy)
    assert loaded.recommend(USERS, k=8).equals(recommender.recommend(USERS, k=8))
    assert loaded.score(pl.DataFrame({"user": [1], "item": [5]})).height == 1
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    for path in copy.rglob("*"):
        path.chmod(0o755)
    card = (bundle / "README.md").read_text()
    assert "they are no test figures" in card
    names = {path.name for path in bundle.rglob("*")}
    assert "neighbors.npy" not in names
    assert not any(name.startswith(("order_", "permutation_", "candidates_")) for name in names)


def test_whoever_opens_a_bundle_tokenizes_nothing(bundle, recommender, monkeypatch):
    monkeypatch.setattr("recllm.systems.lm.build_pieces", lambda *_: pytest.fail("titles are tokenized"))
    table = Recommender.load(bundle).recommend([1], k=8)
    assert table["lm"].null_count() == 2
    assert table.equals(recommender.recommend([1], k=8))


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda folder: (folder / "log/item.npy").unlink(), "log/item.npy is missing"),
        (lambda folder: (folder / "log/meta.json").write_text("{}"), "log/meta.json has 2 bytes"),
        (lambda folder: _flip(folder / "log/item.npy"), "log/item.npy has changed"),
        (lambda folder: _relabel(folder, 99), f"layout 99.*wanted layout {LAYOUT}"),
        (lambda folder: (folder / "bundle.json").write_text("["), "cannot be read"),
    ],
)
def test_a_spoiled_bundle_is_refused(bundle, tmp_path, spoil, line):
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    assert check_bundle(copy) == "cascade/reclora" or check_bundle(copy).startswith("cascade/reclora")
    spoil(copy)
    with pytest.raises(StageError, match=line):
        check_bundle(copy)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def _relabel(folder, layout):
    path = folder / "bundle.json"
    path.write_text(re.sub(r'"layout": \d+', f'"layout": {layout}', path.read_text(), count=1))


def test_a_pointwise_system_ranks_too(cascades):
    recommender = Recommender.load(cascades["s-dpo-pointwise"].folder)
    table = recommender.recommend([1, 2], k=6)
    assert table["lm"].null_count() == 0
    assert (table["lm"] <= 0).all()


def test_import_takes_no_models():
    """`import recllm` and naming the class wait for torch only when something is loaded."""
    code = "import recllm, sys; assert 'torch' not in sys.modules; print(recllm.__all__)"
    assert (
        "Recommender"
        in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


def test_lists_do_not_depend_on_who_else_asks(recommender):
    alone = recommender.recommend([3], k=8)
    together = recommender.recommend(USERS, k=8).filter(pl.col("user") == 3)
    assert alone["item"].to_list() == together["item"].to_list()
    np.testing.assert_allclose(alone["score"], together["score"], atol=1e-4)
