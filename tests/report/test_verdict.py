"""The verdict: which table, which CRM, what is above it, and where the picture puts it."""

import pytest

from recllm.evaluation.results import ResultRow
from recllm.report.verdict import Answer, difference, reference_of, verdicts


def row(system, value, stage="stage2", task="ctr", rows=1000, **others):
    name = {"ctr": "auc", "ranking": "hr@1", "next": "ndcg@10"}[task]
    lm = "tiny" if stage in ("lm", "stage2", "stage3") else None
    row_set = others.pop("row_set", "test/all")
    return ResultRow(system, stage, task, row_set, rows, {name: value}, lm=lm, **others)


def to(delta, low, high, p=0.001):
    return {"delta": delta, "interval95": [low, high], "p_value": p}


POPULARITY = row("popularity", 0.70, "none")
SIM = row("sim", 0.80, "stage1", paired_with="popularity", **to(0.10, 0.08, 0.12))


def test_an_lm_above_the_crm_is_a_yes_with_its_figures():
    lora = row("lora", 0.79, paired_with="sim", **to(-0.01, -0.02, -0.005))
    reclora = row(
        "reclora", 0.82, paired_with="lora", **to(0.03, 0.02, 0.04), against={"sim": to(0.02, 0.01, 0.03)}
    )
    (verdict,) = verdicts([POPULARITY, SIM, lora, reclora])
    assert verdict.answer is Answer.YES
    assert verdict.sentence == (
        "reclora (tiny) is above the CRM sim: AUC .8200 against .8000, a difference of "
        "+.0200 [+.0100, +.0300], p <= .002."
    )
    assert verdict.details == [
        "Of 2 LM systems 1 are above the CRM, 1 below it, and 0 cannot be told apart from it."
    ]
    assert [mark.label for mark in verdict.marks] == ["reclora (tiny)", "sim", "lora (tiny)", "popularity"]
    assert [mark.sign for mark in verdict.marks] == [1, 0, -1, -1]


@pytest.mark.parametrize(
    ("found", "answer", "word"),
    [
        (to(-0.01, -0.02, -0.005), Answer.NO, "is below it"),
        (to(-0.01, -0.02, 0.005, 0.3), Answer.NOT_SHOWN, "cannot be told apart"),
        # Over seeds the interval is a mean of bounds and p the largest: both must agree.
        (to(0.01, 0.002, 0.02, 0.2), Answer.NOT_SHOWN, "cannot be told apart"),
    ],
)
def test_what_is_not_above_is_said_as_no_or_not_shown(found, answer, word):
    (verdict,) = verdicts([POPULARITY, SIM, row("lora", 0.8 + found["delta"], paired_with="sim", **found)])
    assert verdict.answer is answer
    assert word in verdict.sentence


def test_nothing_is_asked_where_no_lm_stands_beside_a_crm():
    (verdict,) = verdicts([POPULARITY, SIM])
    assert (verdict.answer, verdict.reference) == (Answer.NOT_ASKED, "sim")
    assert "Best of all is sim with AUC .8000." in verdict.details
    (verdict,) = verdicts(
        [POPULARITY, row("ease", 0.75, "none", paired_with="popularity", **to(0.05, 0.04, 0.06))]
    )
    assert (verdict.answer, verdict.reference) == (Answer.NOT_ASKED, "popularity")


def test_the_line_is_the_crm_that_lms_are_compared_with():
    retriever = row("retriever", 0.19, "stage1", "next")
    reranked = row("retriever+sim", 0.18, "stage1", "next", paired_with="retriever", **to(-0.01, -0.02, 0.0))
    lm = row(
        "retriever+sim+lora",
        0.181,
        "stage2",
        "next",
        paired_with="retriever+sim",
        **to(0.001, -0.002, 0.004, 0.5),
    )
    assert reference_of([retriever, reranked, lm]) is reranked
    assert reference_of([retriever, reranked]) is retriever


def test_a_difference_is_read_from_either_side():
    assert difference(POPULARITY, SIM) == (-0.10, (-0.12, -0.08), 0.001)
    assert difference(SIM, POPULARITY) == (0.10, (0.08, 0.12), 0.001)
    assert difference(row("din", 0.79, "stage1"), SIM) is None


def test_the_table_with_most_rows_that_compares_lms_counts():
    few = [
        row("sim", 0.8, "stage1", rows=100, row_set="test/first100"),
        row("lora", 0.81, rows=100, row_set="test/first100", paired_with="sim", **to(0.01, 0.001, 0.02)),
    ]
    (verdict,) = verdicts([POPULARITY, SIM, *few])
    assert verdict.title == "CTR, rows test/first100"


def test_places_are_percent_of_the_picture_and_far_systems_are_cut():
    lora = row("lora", 0.81, paired_with="sim", **to(0.01, 0.0, 0.02, 0.3))
    (verdict,) = verdicts([POPULARITY, SIM, lora])
    places = {mark.label: mark for mark in verdict.marks}
    # Three times the farthest bound of an LM, .02, is .06: -.06 to +.02, and 4 % of that on both sides.
    width = 0.08 * 1.08
    assert verdict.line == pytest.approx(100 * 0.0632 / width, abs=0.01)
    assert places["lora (tiny)"].point == pytest.approx(100 * 0.0732 / width, abs=0.01)
    assert places["lora (tiny)"].bounds == pytest.approx((verdict.line, 100 * 0.0832 / width), abs=0.01)
    assert places["popularity"].is_outside
    assert places["popularity"].bounds is None
    assert (verdict.line, "0") in verdict.ticks
    assert all(0 <= place <= 100 for place, _ in verdict.ticks)


def test_rows_without_a_figure_are_left_out():
    assert verdicts([row("sim", None, "stage1")]) == []
