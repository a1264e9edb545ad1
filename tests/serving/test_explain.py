"""Why a list: every step's list is the recommender's own, and an event more or less is that history asked."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from recllm.eventlog.queries import without_events
from recllm.serving.explain import Change, ListedItem, Move, explain, moves
from recllm.serving.finding import find_items
from recllm.serving.recommender import Recommender

HISTORY = pl.DataFrame({"item": [5, 7, 9, 12], "rating": [5.0, 1.0, 4.0, 5.0]})


def of_user(history, user=900):
    """A history as `histories` of the recommender."""
    return history.with_columns(user=pl.lit(user))


def as_lists(steps):
    return [[(listed.item, listed.score) for listed in step.items] for step in steps]


def as_list(table):
    return list(zip(table["item"].to_list(), table["score"].to_list(), strict=True))


def test_the_list_after_each_step_is_that_of_a_cascade_that_ends_there(recommender):
    explanation = explain(recommender, 1, k=8)
    parts = recommender.parts
    lists = []
    for count in range(len(parts.cascade.rerankers) + 1):
        cascade = replace(parts.cascade, rerankers=list(parts.cascade.rerankers)[:count])
        shorter = Recommender(replace(parts, cascade=cascade), recommender.name, recommender.dataset)
        lists.append(as_list(shorter.recommend([1], k=8)))
    assert as_lists(explanation.steps) == lists
    assert [step.name for step in explanation.steps] == ["popularity", "crm", "lm"]
    assert explanation.source == "cascade"
    table = recommender.recommend([1], k=8)
    for listed, line in zip(explanation.steps[-1].items, table.to_dicts(), strict=True):
        assert (listed.item, listed.title, listed.rank) == (line["item"], line["title"], line["rank"])
        assert listed.steps == {name: line[name] for name in ("popularity", "crm", "lm")}
    assert explanation.target == table["item"][0]


def test_an_item_says_where_it_stood_before(recommender):
    first, *others = explain(recommender, 1, k=20).steps
    assert all(listed.before is None for listed in first.items)
    ranks = {listed.item: listed.rank for listed in first.items}
    for step in others:
        known = [listed for listed in step.items if listed.item in ranks]
        assert known
        assert all(listed.before == ranks[listed.item] for listed in known)
        ranks = {listed.item: listed.rank for listed in step.items}
    # Six titles are ranked by the LM, so that nothing below them moves.
    assert others[-1].scored == 6
    assert all(listed.before == listed.rank for listed in others[-1].items[6:])
    assert list(others[-1].weights) == ["popularity", "crm", "lm"]


@pytest.mark.parametrize("place", range(4))
def test_a_history_without_an_event_is_the_shorter_history(recommender, place):
    changed = explain(recommender, 900, HISTORY, change=Change(remove=place), k=6)
    shorter = HISTORY.filter(pl.int_range(pl.len()) != place)
    table = recommender.recommend([900], k=6, histories=of_user(shorter))
    assert as_lists(changed.steps)[-1] == as_list(table)
    assert [event.place for event in changed.history] == [other for other in range(4) if other != place]
    assert changed.effect.event.item == HISTORY["item"][place]
    before = recommender.recommend([900], k=6, histories=of_user(HISTORY))["item"].to_list()
    was = sorted((move.before, move.item) for move in changed.effect.moves if move.before is not None)
    assert [item for _, item in was] == before
    assert changed.effect.gate_before == explain(recommender, 900, HISTORY, k=6).gate
    # Removed from the start it is the same, but that nothing is compared.
    again = explain(recommender, 900, HISTORY, removed=[place], k=6)
    assert again == replace(changed, effect=None)


def test_an_added_event_is_one_of_the_request(recommender):
    added = pl.DataFrame({"item": [20], "rating": [5.0]})
    changed = explain(recommender, 1, change=Change(add=added), k=6)
    table = recommender.recommend([1], k=6, histories=of_user(added, 1))
    assert as_lists(changed.steps)[-1] == as_list(table)
    event = changed.effect.event
    assert (event.item, event.rating, event.liked) == (20, 5.0, True)
    assert changed.length == explain(recommender, 1).length + 1
    assert changed.recent[-1] == event.place == changed.history[-1].place
    # Taken away again, it never was.
    alone = explain(recommender, 1, k=6)
    assert explain(recommender, 1, added, removed=[event.place], k=6) == alone


def test_an_added_event_may_be_dated_before_removed_ones(recommender):
    log = recommender.log
    (dense,) = recommender.maker.users.dense([1])
    first = int(log.offsets[dense])
    removed = explain(recommender, 1, most=7).length - 2
    item = recommender.maker.items.external(log.item[first + removed : first + removed + 1])[0]
    added = pl.DataFrame({"item": [20], "rating": [5.0], "timestamp": [int(log.timestamp[first]) - 10]})
    before = explain(recommender, 1, removed=[removed], most=100)
    changed = explain(recommender, 1, removed=[removed], change=Change(add=added), most=100)
    assert (changed.effect.event.item, changed.effect.event.place) == (20, 0)
    kept = [(event.item, event.second) for event in before.history[-20:]]
    assert [(event.item, event.second) for event in changed.history[-20:]] == kept
    assert (item, int(log.timestamp[first + removed])) not in kept
    places = [event.place + 1 for event in before.history[-20:]]
    assert [event.place for event in changed.history[-20:]] == places


def test_an_item_that_is_not_known_changes_nothing(recommender):
    unknown = pl.DataFrame({"item": [999_999], "rating": [5.0]})
    changed = explain(recommender, 1, change=Change(add=unknown), k=4)
    assert changed.effect.event is None
    assert all(move.before == move.after for move in changed.effect.moves)


def test_the_history_is_that_of_the_log(recommender):
    explanation = explain(recommender, 1, most=7)
    log = recommender.log
    (dense,) = recommender.maker.users.dense([1])
    rows = np.arange(log.offsets[dense], log.offsets[dense + 1])
    assert explanation.length == explanation.read == len(rows)
    assert [event.place for event in explanation.history] == list(range(len(rows) - 7, len(rows)))
    assert [event.second for event in explanation.history] == log.timestamp[rows[-7:]].tolist()
    assert [event.liked for event in explanation.history] == (log.label[rows[-7:]] == 1).tolist()
    levels = [float(level) for level in log.meta["rating_levels"]]
    assert [event.rating for event in explanation.history] == [
        levels[code - 1] for code in log.rating[rows[-7:]]
    ]
    size = recommender.parts.lm.config.prompt.history
    assert explanation.recent == list(range(len(rows) - size, len(rows)))


def test_retrieved_events_are_the_most_similar_of_all(recommender):
    explanation = explain(recommender, 1, target=5)
    assert (explanation.target, explanation.is_known) == (5, True)
    (user,) = recommender.maker.users.dense([1])
    log = recommender.log
    searcher = recommender.parts.retrieval.searcher
    vectors = searcher.vectors[int(searcher.fold[user]) * log.n_items :][: log.n_items]
    (target,) = recommender.maker.items.dense([5])
    items = log.item[log.offsets[user] : log.offsets[user + 1]]
    cosine = vectors[items] @ vectors[target]
    count = len(explanation.retrieved)
    assert count == recommender.parts.lm.config.prompt.history
    found = [event.similarity for event in explanation.retrieved]
    np.testing.assert_allclose(found, np.sort(cosine)[::-1][:count], atol=1e-6)
    np.testing.assert_allclose(found, cosine[[event.place for event in explanation.retrieved]], atol=1e-6)


def test_prompts_show_the_short_history_and_what_was_retrieved(recommender):
    explanation = explain(recommender, 1, target=5)
    title, answer = explanation.prompts
    assert (title.question, answer.question) == ("next title", "yes or no")
    assert (title.is_of_list, answer.is_of_list) == (True, False)
    recent = [explanation.history[place].title for place in explanation.recent]
    nearest = sorted(explanation.retrieved, key=lambda event: event.place)
    asked = [event.title for event in nearest] if recommender.parts.lm.opened.retrieved else recent
    for prompt, shown in ((title, recent), (answer, [*asked, explanation.target_title])):
        assert not prompt.is_cut
        places = []
        for text in shown:
            places.append(prompt.text.index(text, places[-1] if places else 0))
        assert places == sorted(places)
    tokenizer = recommender.parts.lm.opened.lm.tokenizer
    assert title.tokens == len(tokenizer(title.text, add_special_tokens=False)["input_ids"])


def test_the_gate_is_the_adapters_own(recommender):
    explanation = explain(recommender, 1, k=6)
    gate = explanation.gate
    assert sum(gate.alpha) == pytest.approx(1)
    assert sum(gate.mean) == pytest.approx(1)
    by_hand = sum(abs(a - b) for a, b in zip(gate.alpha, gate.mean, strict=True)) / 2
    assert gate.distance == pytest.approx(by_hand)
    opened = recommender.parts.lm.opened
    queries = recommender.ask([1], None, None).queries(recommender.maker, range(1))
    ranked = recommender.maker.items.dense([listed.item for listed in explanation.steps[-1].items])
    representation = opened.crm.for_queries(queries).representations(queries.rows, ranked[None])
    with torch.no_grad():
        alpha = opened.model.base_model.alpha(representation)[0]
        mean = opened.model.base_model.alpha(opened.model.base_model.reclora_gate["default"].mean[None])[0]
    np.testing.assert_allclose(gate.alpha, alpha.numpy().reshape(-1, len(gate.alpha)).mean(0), atol=1e-6)
    np.testing.assert_allclose(gate.mean, mean.numpy().reshape(-1, len(gate.mean)).mean(0), atol=1e-6)


def test_who_brings_nothing_gets_what_is_popular(recommender):
    explanation = explain(recommender, None, k=5)
    assert (explanation.source, explanation.is_known, explanation.history) == ("popularity", False, [])
    assert as_lists(explanation.steps) == [as_list(recommender.recommend([900], k=5))]
    assert (explanation.prompts, explanation.gate, explanation.retrieved) == ([], None, [])
    taste = explain(recommender, None, change=Change(add=HISTORY[:1]), k=5)
    assert taste.source == "cascade"
    assert as_lists(taste.steps)[-1] == as_list(
        recommender.recommend([900], k=5, histories=of_user(HISTORY[:1]))
    )


def test_a_cascade_without_an_lm_has_no_prompt_and_no_gate(retrieving):
    explanation = explain(retrieving, 1, k=5)
    assert [step.name for step in explanation.steps] == retrieving.cascade.names
    assert as_lists(explanation.steps)[-1] == as_list(retrieving.recommend([1], k=5))
    assert (explanation.prompts, explanation.gate) == ([], None)


def test_moves_are_told_in_the_order_of_what_is_there_now():
    def listed(*items):
        return [ListedItem(item, f"title {item}", rank, None, 0.0, {}) for rank, item in enumerate(items, 1)]

    assert moves(listed(1, 2, 3), listed(3, 4, 1)) == [
        Move(3, "title 3", 3, 1),
        Move(4, "title 4", None, 2),
        Move(1, "title 1", 1, 3),
        Move(2, "title 2", 2, None),
    ]


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"removed": [4]}, "event 4 is removed; wanted 0 to 3"),
        ({"change": Change(remove=-1)}, "event -1 is removed; wanted 0 to 3"),
        ({"removed": [1], "change": Change(remove=1)}, "event 1 is removed already"),
        ({"k": 0}, "k is 0; wanted 1 to"),
        ({"target": 999_999}, "item 999999 is not in the log"),
        ({"time": 0, "history": HISTORY.with_columns(timestamp=pl.lit(5))}, "has an event at second 5"),
    ],
)
def test_what_cannot_be_explained_is_one_line(recommender, asked, line):
    with pytest.raises(ValueError, match=line) as error:
        explain(recommender, 900, **{"history": HISTORY, **asked})
    assert "\n" not in str(error.value)


def test_queries_without_events_are_those_of_a_shorter_history(recommender):
    maker = recommender.maker
    users = pl.Series("user", [1, 900])
    own = pl.DataFrame({"query": [0, 1, 1], "item": [5, 7, 9], "rating": [4.0, 2.0, 5.0]})
    queries = maker.make(users, None, own)
    start, end = queries.all_events()
    shorter = without_events(queries, np.array([end[0] - 1, start[1]]))
    wanted = maker.make(users, None, own[2:])
    for name in ("user", "item", "rating", "label", "timestamp", "offsets", "user_fields"):
        np.testing.assert_array_equal(getattr(shorter.log, name), getattr(wanted.log, name), err_msg=name)
    np.testing.assert_array_equal(shorter.rows, wanted.rows)
    with pytest.raises(ValueError, match="wanted events of the 2 queries"):
        without_events(queries, queries.rows[:1])


def test_items_are_found_by_words_and_by_id(recommender):
    titles = recommender.item_titles
    title = titles[2]
    (item,) = recommender.maker.items.external(np.array([2])).to_list()
    assert item in [found.item for found in find_items(recommender, title.upper(), most=100)]
    backwards = " ".join(reversed(title.split()))
    assert item in [found.item for found in find_items(recommender, backwards, most=100)]
    assert find_items(recommender, f" {item} ")[0].title == title
    assert find_items(recommender, "no such words at all") == []
    everything = find_items(recommender, "", most=50)
    assert len(everything) == 50
    counts = recommender.log.item_count[recommender.maker.items.dense([found.item for found in everything])]
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)
    for characters in ("(", "[", "\\", ".*"):
        assert all(characters in found.title for found in find_items(recommender, characters) if found.title)
