import copy

import numpy as np
import pytest
import torch

from recllm.lm.logprobs import candidate_logps
from recllm.lm.predict import answer_scores, candidate_scores
from recllm.lm.tasks import NextTitleLists, TowerPairs, YesNoCandidates, YesNoPrompts
from recllm.retrieval.neighbors import Neighbors
from recllm.retrieval.stored import Retrieval
from recllm.retrieval.vectors import normalize
from recllm.systems.crm import Crm
from recllm.systems.lm import Lm
from recllm.text.collate import pad_left
from recllm.text.pieces import Pieces
from recllm.text.prompts import Prompts


class Representations:
    """Stands for `parents.Crm`: the representation of a pair is a function of the pair and nothing else."""

    each = Crm.each

    def representations(self, rows, targets):
        rows = rows.reshape(-1, *[1] * (targets.ndim - 1))
        pairs = np.stack([np.broadcast_to(rows, targets.shape), targets], -1).reshape(-1, 2)
        flat = np.array([np.random.default_rng(pair).normal(size=5) for pair in pairs], np.float32)
        return torch.from_numpy(flat if targets.ndim == 1 else flat.reshape(*targets.shape, 5).mean(1))


@pytest.fixture(scope="module")
def ranking(demo_log):
    """Six rows of six users: none is part of another's history."""
    rows, candidates = demo_log.ranking("valid", "uniform20")
    _, first = np.unique(demo_log.user[rows], return_index=True)
    return rows[first[:6]], candidates[first[:6]]


def verdicts_of(log, config, tiny_lm, rows, candidates, retrieved):
    """The Yes/No task on candidates exactly as the stages build it."""
    prompts = copy.copy(tiny_lm.prompts)
    prompts.log = log
    vectors = np.random.default_rng(0).normal(size=(log.n_items, 8)).astype(np.float32)
    searcher = Neighbors(log, normalize(vectors))
    retrieval = Retrieval(np.zeros((0, 0), np.int32), searcher)
    lm = Lm(tiny_lm.model, tiny_lm.tokenizer, prompts, log, config, retrieval)
    return lm.verdicts(rows, candidates, Representations(), retrieved)


def titles_of(log, config, tiny_lm, rows, candidates, listed, each=False):
    """The next-title task exactly as the stages build it."""
    prompts = copy.copy(tiny_lm.prompts)
    prompts.log = log
    config = copy.copy(config)
    object.__setattr__(config, "prompt", copy.copy(config.prompt))
    object.__setattr__(config.prompt, "list_candidates", listed)
    lm = Lm(tiny_lm.model, tiny_lm.tokenizer, prompts, log, config, None)
    return lm.titles(rows, candidates, Representations(), each)


@pytest.mark.parametrize(("listed", "each"), [(False, False), (True, False), (False, True)])
def test_making_another_candidate_the_chosen_one_changes_nothing_but_the_choice(
    demo_log, demo_config, tiny_lm, ranking, listed, each
):
    """Prompt, gate input and order of the candidates do not tell which candidate is the chosen one."""
    rows, candidates = ranking
    before = titles_of(demo_log, demo_config, tiny_lm, rows, candidates, listed, each)
    other_place = (before.chosen + 1 + np.arange(len(rows))) % candidates.shape[1]
    changed = copy.copy(demo_log)
    changed.item = np.array(demo_log.item)
    changed.item[rows] = candidates[np.arange(len(rows)), other_place]
    after = titles_of(changed, demo_config, tiny_lm, rows, candidates, listed, each)

    assert (before.chosen != after.chosen).all()
    np.testing.assert_array_equal(after.chosen, other_place)
    one, two = before(np.arange(len(rows))), after(np.arange(len(rows)))
    assert torch.equal(one["representation"], two["representation"])
    assert one["prompt"].keys() == two["prompt"].keys()
    for name, value in one["prompt"].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(two["prompt"][name])), name
    assert not torch.equal(one["chosen"], two["chosen"])


def test_a_title_is_gated_by_its_own_item_and_the_prompt_by_the_mean(demo_log, demo_config, tiny_lm, ranking):
    rows, candidates = ranking
    task = titles_of(demo_log, demo_config, tiny_lm, rows, candidates, False, each=True)
    columns, indices = np.array([[3, 0], [19, 7]]), np.array([4, 1])
    got = task(indices, columns)["representation"]
    crm = Representations()
    mean = crm.representations(rows[indices], candidates[indices])
    torch.testing.assert_close(got[:, 0], mean)
    torch.testing.assert_close(task.prompt_representation(indices), mean)
    for row, (of, places) in enumerate(zip(indices, columns, strict=True)):
        own = crm.representations(np.repeat(rows[of], 2), candidates[of, places])
        assert torch.equal(got[row, 1:], own)
    assert torch.equal(task(indices)["representation"][:, 1:], task.representation[indices])
    half = task.keep(np.arange(len(rows)) % 2 == 1)
    assert torch.equal(half.representation, task.representation[1::2])


@pytest.mark.parametrize("retrieved", [False, True])
def test_prompts_and_gates_of_verdicts_do_not_tell_the_chosen_one_either(
    demo_log, demo_config, tiny_lm, ranking, retrieved
):
    rows, candidates = ranking
    before = verdicts_of(demo_log, demo_config, tiny_lm, rows, candidates, retrieved)
    other_place = (before.chosen + 1 + np.arange(len(rows))) % candidates.shape[1]
    changed = copy.copy(demo_log)
    changed.item = np.array(demo_log.item)
    changed.item[rows] = candidates[np.arange(len(rows)), other_place]
    after = verdicts_of(changed, demo_config, tiny_lm, rows, candidates, retrieved)

    np.testing.assert_array_equal(after.chosen, other_place)
    np.testing.assert_array_equal(before.history, after.history)
    assert before.history.max() < rows.max()
    one, two = before(np.arange(len(rows))), after(np.arange(len(rows)))
    assert torch.equal(one["representation"], two["representation"])
    assert torch.equal(one["prompt"]["input_ids"], two["prompt"]["input_ids"])
    assert not torch.equal(one["chosen"], two["chosen"])
    # Each candidate's history is its own where it is retrieved, and the same for all where it is recent.
    differs = (before.history != before.history[:, :1]).any()
    assert differs == retrieved


def test_verdicts_ask_what_answers_ask(demo_log, demo_config, tiny_lm, ranking):
    """The chosen candidate's log P(Yes) is log sigmoid of the logit that the Yes/No task gives the row."""
    rows, candidates = ranking
    task = verdicts_of(demo_log, demo_config, tiny_lm, rows, candidates, False)
    task.representation = None
    scores = torch.from_numpy(candidate_scores(tiny_lm.model, task, 4))
    assert scores.shape == candidates.shape
    k = task.history.shape[2]
    answers = YesNoPrompts(tiny_lm.prompts, rows, demo_log.recent(rows, k), None)
    wanted = torch.from_numpy(answer_scores(tiny_lm.model, answers)).sigmoid().log()
    own = scores[torch.arange(len(rows)), torch.from_numpy(task.chosen)]
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)
    # Some of the candidates, in another order, one of them missing.
    columns = np.stack([task.chosen, (task.chosen + 5) % 20, (task.chosen + 2) % 20], 1)
    present = np.ones(columns.shape, bool)
    present[1, 2] = False
    batch = task(np.arange(len(rows)), columns, present)
    assert batch["chosen"].tolist() == [0] * len(rows)
    assert batch["lengths"].tolist() == present.astype(int).tolist()
    assert len(batch["prompt"]["input_ids"]) == present.sum()
    with torch.no_grad():
        part = candidate_logps(tiny_lm.model, batch)
    assert part[1, 2].isnan()
    expected = scores.gather(1, torch.from_numpy(columns))
    torch.testing.assert_close(part[present], expected[present], rtol=1e-4, atol=1e-5)


def test_verdicts_give_each_prompt_the_gate_input_of_its_candidate(demo_log, demo_config, tiny_lm, ranking):
    rows, candidates = ranking
    task = verdicts_of(demo_log, demo_config, tiny_lm, rows, candidates, True)
    indices = np.array([4, 1])
    columns = np.array([[3, 0], [9, 8]])
    batch = task(indices, columns)
    pairs = zip(rows[indices].repeat(2), candidates[indices[:, None], columns].ravel(), strict=True)
    for place, (row, item) in enumerate(pairs):
        wanted = Representations().representations(np.array([row]), np.array([item]))[0]
        assert torch.equal(batch["representation"][place], wanted)
        pieces = tiny_lm.pieces
        tail = [*pieces.table[pieces.item[item]], *pieces.table[pieces.ask], *pieces.table[pieces.answer]]
        assert batch["prompt"]["input_ids"][place, -len(tail) :].tolist() == tail
    alone = task.keep(np.arange(len(rows)) == 4)(np.array([0]), columns[:1])
    assert torch.equal(alone["representation"], batch["representation"][:2])
    every, longest = task.lengths(), task.lengths(scored=False)
    assert (longest * 20 >= every).all()
    assert (longest < every).all()
    candidates_without = candidates.copy()
    candidates_without[2] = 1
    with pytest.raises(ValueError, match=f"row {rows[2]} has its own item 0 times"):
        YesNoCandidates(tiny_lm.prompts, demo_log, rows, task.history, candidates_without, None)


@pytest.mark.parametrize("kind", ["uniform", "popular"])
def test_the_order_of_the_candidates_is_a_function_of_their_set(demo_log, kind):
    """A list made anew around another chosen one of the same set has the same order."""
    from recllm.eventlog import candidates as module

    rows, lists = demo_log.ranking("valid", f"{kind}20")
    rows, lists = rows[:5], lists[:5]
    shifted = np.roll(lists, 3, axis=1)
    changed = copy.copy(demo_log)
    changed.item = np.array(demo_log.item)
    changed.item[rows] = shifted[:, 0]
    original = module.negatives
    try:
        module.negatives = lambda *_, **__: shifted[:, 1:]
        np.testing.assert_array_equal(module.candidate_lists(changed, rows, kind), lists)
    finally:
        module.negatives = original


def test_the_list_is_in_the_prompt_where_it_is_wanted_only(demo_log, demo_config, tiny_lm, ranking):
    rows, candidates = ranking
    lengths = {}
    for listed in (False, True):
        task = titles_of(demo_log, demo_config, tiny_lm, rows, candidates, listed)
        prompts = task.prompts.ranking(rows, task.history, candidates if listed else None)
        batch = task(np.arange(len(rows)))
        for place, tokens in enumerate(prompts[i] for i in range(len(rows))):
            assert batch["prompt"]["input_ids"][place, : len(tokens)].tolist() == tokens.tolist()
        lengths[listed] = prompts.lengths
    pieces = tiny_lm.pieces
    spelled = (pieces.lengths[pieces.item[candidates]] + pieces.lengths[pieces.newline]).sum(1)
    expected = lengths[False] + spelled + pieces.lengths[pieces.choose]
    np.testing.assert_array_equal(lengths[True], expected)


def test_columns_select_candidates_and_the_chosen_place_follows(demo_log, tiny_lm, ranking):
    rows, candidates = ranking
    recent = demo_log.recent(rows, 4)
    task = NextTitleLists(tiny_lm.prompts, demo_log, rows, recent, candidates, None)
    indices = np.array([4, 1])
    others = (task.chosen[indices][:, None] + np.array([3, 7])) % 20
    columns = np.stack([others[:, 0], task.chosen[indices], others[:, 1]], 1)
    batch = task(indices, columns)
    assert batch["chosen"].tolist() == [1, 1]
    assert batch["index"].tolist() == [4, 1]
    assert batch["representation"] is None
    assert batch["prompt"]["present"].shape == (2, 3)
    wanted = np.take_along_axis(candidates[indices], columns, 1)
    pieces = tiny_lm.pieces
    titles = [[*pieces.table[pieces.item[item]], *pieces.table[pieces.eos]] for item in wanted.ravel()]
    prompt = batch["prompt"]
    owner = prompt["cell"]
    assert [prompt["target"][owner == place].tolist() for place in range(6)] == titles
    # Scored alone or among all of them, a candidate has the same log-probability.
    from recllm.lm.logprobs import title_logps

    whole = title_logps(tiny_lm.model, task(indices)["prompt"])
    part = title_logps(tiny_lm.model, prompt)
    torch.testing.assert_close(part, whole.gather(1, torch.from_numpy(columns)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("harm", ["without", "twice"])
def test_a_list_that_does_not_hold_the_chosen_one_once_is_refused(demo_log, tiny_lm, ranking, harm):
    rows, candidates = ranking
    wrong = candidates.copy()
    place = int(np.flatnonzero(wrong[2] == demo_log.item[rows[2]])[0])
    if harm == "without":
        wrong[2, place] = 1
    else:
        wrong[2, place - 1] = demo_log.item[rows[2]]
    wanted = rf"row {rows[2]} has its own item {0 if harm == 'without' else 2} times"
    with pytest.raises(ValueError, match=wanted):
        NextTitleLists(tiny_lm.prompts, demo_log, rows, demo_log.recent(rows, 4), wrong, None)


def test_no_rows_are_an_empty_task(demo_log, tiny_lm):
    empty = np.zeros(0, np.int64)
    task = NextTitleLists(
        tiny_lm.prompts, demo_log, empty, empty.reshape(0, 4), np.zeros((0, 20), np.int32), None
    )
    assert len(task) == 0


def test_answers_ask_for_the_rows_own_item(demo_log, tiny_lm):
    rows = demo_log.rows("valid", "uniform5")
    representation = torch.arange(10.0).view(5, 2)
    task = YesNoPrompts(tiny_lm.prompts, rows, demo_log.recent(rows, 6), representation)
    indices = np.array([3, 0])
    batch = task(indices)
    assert len(task) == 5
    assert batch["label"].tolist() == demo_log.label[rows[indices]].tolist()
    assert batch["representation"].tolist() == [[6.0, 7.0], [0.0, 1.0]]
    assert task.count_cut() == 0
    pieces = tiny_lm.pieces
    for place, row in enumerate(rows[indices]):
        tail = [*pieces.table[pieces.question], *pieces.table[pieces.item[demo_log.item[row]]]]
        tail += [*pieces.table[pieces.ask], *pieces.table[pieces.answer]]
        assert batch["prompt"]["input_ids"][place, -len(tail) :].tolist() == tail  # left padded
    alone = pad_left(tiny_lm.prompts.ctr(rows[[3]], task.history[[3]]))["input_ids"]
    assert batch["prompt"]["input_ids"][0, -alone.shape[1] :].tolist() == alone[0].tolist()


def test_rows_that_memory_does_not_do_for_are_scored_in_halves(demo_log, tiny_lm, capsys):
    rows = demo_log.rows("valid", "uniform13")
    task = YesNoPrompts(tiny_lm.prompts, rows, demo_log.recent(rows, 10), None)
    whole = answer_scores(tiny_lm.model, task)
    capsys.readouterr()
    forwards = []

    def lacks_memory(module, args, keywords):
        forwards.append(len(keywords["input_ids"]))
        if forwards[-1] > most:
            raise torch.OutOfMemoryError("tried to allocate")

    handle = tiny_lm.model.register_forward_pre_hook(lacks_memory, with_kwargs=True)
    try:
        most = 4
        halved = answer_scores(tiny_lm.model, task)
        assert forwards == [13, 6, 3, 3, 7, 3, 4]
        np.testing.assert_allclose(halved, whole, atol=1e-5)
        out = capsys.readouterr().out
        assert [line.split("memory: ")[1] for line in out.splitlines() if "memory" in line] == [
            f"{count} rows are scored in two halves" for count in (13, 6, 7)
        ]
        most = 0
        with pytest.raises(torch.OutOfMemoryError):
            answer_scores(tiny_lm.model, task)
    finally:
        handle.remove()


def test_cut_prompts_are_counted(demo_log, tiny_lm):
    rows = demo_log.rows("valid", "uniform5")
    short = Prompts(demo_log, tiny_lm.pieces, 48)
    task = YesNoPrompts(short, rows, demo_log.recent(rows, 10), None)
    lengths = tiny_lm.prompts.ctr(rows, task.history).lengths
    assert task.count_cut() == (lengths > 48).sum() > 0


@pytest.mark.parametrize("limit", [40, 1000])
def test_lengths_and_cuts_are_those_of_the_texts_of_which_no_token_is_gathered(
    demo_log, tiny_lm, ranking, monkeypatch, limit
):
    rows, candidates = ranking
    prompts = Prompts(demo_log, tiny_lm.pieces, limit)
    history = demo_log.recent(rows, 10)
    flat = np.repeat(rows, 20)
    each = np.repeat(history, 20, 0)
    room = prompts.room(candidates)
    titles = prompts.pieces.lengths[prompts.pieces.item[candidates]].sum(1)
    answers = prompts.ctr(rows, history)
    users = prompts.users(rows, history)
    items = prompts.items(demo_log.item[rows])
    next_titles = prompts.ranking(rows, history, None, room)
    verdicts = prompts.ctr(flat, each, candidates.ravel())
    texts = [answers, users, next_titles, verdicts]
    assert [bool(text.cut.any()) for text in texts] == [limit == 40] * 4

    def gathered(*_):
        raise AssertionError("a token was gathered")

    monkeypatch.setattr(Pieces, "assemble", gathered)
    towers = TowerPairs(prompts, rows, history, 0)
    ranked = NextTitleLists(prompts, demo_log, rows, history, candidates, None)
    asked = YesNoCandidates(prompts, demo_log, rows, each.reshape(len(rows), 20, -1), candidates, None)
    tasks = [YesNoPrompts(prompts, rows, history, None), towers, ranked, asked]
    assert [task.count_cut() for task in tasks] == [int(text.cut.sum()) for text in texts]
    wanted = [answers.lengths, users.lengths, next_titles.lengths + titles]
    wanted.append(verdicts.lengths.reshape(-1, 20).sum(1))
    for task, lengths in zip(tasks, wanted, strict=True):
        assert task.lengths().dtype == np.int64
        np.testing.assert_array_equal(task.lengths(), lengths)
    np.testing.assert_array_equal(ranked.lengths(scored=False), next_titles.lengths)
    np.testing.assert_array_equal(asked.lengths(scored=False), verdicts.lengths.reshape(-1, 20).max(1))
    np.testing.assert_array_equal(towers.item_lengths(), items.lengths)
