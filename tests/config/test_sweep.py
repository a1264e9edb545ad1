"""Keys and values of a sweep."""

import pytest

from recllm.config.sweep import covering, fewest, parse_sweep, short


def test_a_point_is_named_by_the_end_of_its_key_that_is_its_own():
    assert short("stage2.adapter.num_meta") == "num_meta"
    assert short("subsample") == "subsample"
    assert short("prompt.history") == "history"
    # Stages 1 to 3 have a learning rate each, and so has the LM; prompts and CRMs both retrieve.
    assert short("stage2.fit.lr") == "stage2.fit.lr"
    assert short("stage1.retrieved") == "stage1.retrieved"


def test_points_of_a_key():
    points = parse_sweep("stage2.adapter.num_meta", " 4  16 4 ")
    assert [(point.tag, point.value) for point in points] == [("num_meta-4", 4), ("num_meta-16", 16)]
    assert points[0].settings(("prompt", "stage2")) == {"stage2.adapter.num_meta": 4}
    assert points[0].settings(("prompt", "stage1")) == {}
    assert parse_sweep("", "") == ()


@pytest.mark.parametrize(
    ("key", "values", "told"),
    [
        ("stage2.adapter.r", "", "half a sweep"),
        ("", "4 8", "half a sweep"),
        ("stage2.adapter.rr", "4", "the nearest is stage2.adapter.r"),
        ("stage2.adapter", "4", "no configuration key"),
        ("seed", "1 2", "KEY=seed cannot be swept"),
        ("lm.tiny.hidden", "32", "KEY=lm.tiny.hidden cannot be swept"),
        ("stage2.adapter.target_modules", "[q_proj]", "can name no folder"),
        ("stage2.adapter.kind", "a/b", "can name no folder"),
        ("subsample", "0.1 uniform200", "do not nest"),
        ("subsample", "last100 uniform200", "do not nest"),
        ("subsample", "0.1max500 0.05", "neither 0.1max500 nor 0.05 holds the other"),  # of 20,000 rows
        ("subsample", "first300", "VALUES=first300"),  # no prefix of the permutation: it does not nest
        ("subsample", "none", "VALUES=none"),
    ],
)
def test_what_is_no_sweep_is_refused(key, values, told):
    with pytest.raises(ValueError, match=told):
        parse_sweep(key, values)


def test_subsamples_nest_so_the_largest_covers_all():
    shares = parse_sweep("subsample", "0.05 0.001 0.01")
    assert fewest(shares) == "0.001"
    assert covering(shares, "0.1") == "0.1"  # the configured one is larger, and its CRM may be there already
    assert covering(shares, "0.02") == "0.05"
    assert covering(shares, "uniform20000") == "0.05"  # not comparable before the rows are counted
    counts = parse_sweep("subsample", "uniform900 uniform1000")
    assert fewest(counts) == "uniform900"  # by number, not by letter
    assert covering(counts, "uniform20000") == "uniform20000"
    assert covering(counts, "first20000") == "uniform1000"
    assert covering(counts, "last20000") == "uniform1000"
    latest = parse_sweep("subsample", "last900 last1000")
    assert fewest(latest) == "last900"
    assert covering(latest, "last20000") == "last20000"
    assert fewest(parse_sweep("prompt.history", "5 10")) is None
    at_most = parse_sweep("subsample", "0.1max70000 0.05max70000")
    assert fewest(at_most) == "0.05max70000"
    assert covering(at_most, "0.1max60000") == covering(at_most, "none") == "0.1max70000"
    assert covering(at_most, "0.1") == "0.1"
    assert fewest(parse_sweep("subsample", "0.1 0.05max70000")) == "0.05max70000"
    mixed = parse_sweep("subsample", "uniform70000 0.1max70000 uniform90000")
    assert (fewest(mixed), covering(mixed, "0.2max99999")) == ("0.1max70000", "uniform90000")
