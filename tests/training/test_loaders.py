import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.errors import StageError
from recllm.training.loaders import Course, Loaders, NewestLast, RowLoader, StepLoader, Stream, plan_steps

sizes = st.integers(1, 40)


@given(count=sizes, batch=sizes, seed=st.integers(0, 3))
def test_every_pass_visits_each_row_once(count, batch, seed):
    stream = Stream(count, batch, seed)
    passes = 3
    steps = -(-passes * count // batch)
    seen = np.concatenate([stream.indices(step) for step in range(steps)])
    for number in range(passes):
        assert sorted(seen[number * count : (number + 1) * count]) == list(range(count))


def test_passes_and_seeds_have_orders_of_their_own():
    orders = [Stream(50, 50, seed).indices(step).tolist() for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] != list(range(50))


@given(count=sizes, per_rank=st.integers(1, 9), world=st.integers(1, 4), step=st.integers(0, 30))
def test_ranks_partition_the_global_batch(count, per_rank, world, step):
    whole = Stream(count, per_rank * world, 7).indices(step)
    shares = [Stream(count, per_rank * world, 7).indices(step, rank, world) for rank in range(world)]
    assert [len(share) for share in shares] == [per_rank] * world
    together = np.empty(per_rank * world, np.int64)
    for rank, share in enumerate(shares):
        together[rank::world] = share
    np.testing.assert_array_equal(together, whole)


@given(steps=st.lists(st.integers(0, 60), max_size=20))
def test_a_batch_is_a_function_of_its_step(steps):
    used = Stream(17, 5, 3)
    for step in steps:  # in any order, with steps left out
        np.testing.assert_array_equal(used.indices(step), Stream(17, 5, 3).indices(step))


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="larger subsample"):
        Stream(0, 4, 0)


@given(count=st.integers(1, 5000), batch=sizes, epochs=st.floats(0.01, 5), validations=st.integers(1, 20))
def test_the_last_step_is_a_validation(count, batch, epochs, validations):
    steps, interval = plan_steps(count, batch, epochs, validations)
    assert steps >= 1
    assert steps % interval == 0
    assert steps // interval <= validations
    assert steps * batch >= min(epochs * count, steps * batch)
    assert steps - interval < max(1, epochs * count / batch) + 1  # at most a part of an interval is added


@given(count=st.integers(1, 20), batch=st.integers(1, 30), world=st.integers(1, 3))
def test_every_index_knows_its_pass(count, batch, world):
    stream = Stream(count, batch, 0)
    seen = {}
    for step in range(5):
        shares = np.full((2, batch), -1)
        for rank in range(world):
            shares[0, rank::world] = stream.passes(step, rank, world)
            shares[1, rank::world] = stream.indices(step, rank, world)
        for number, index in shares.T.tolist():
            seen.setdefault(number, []).append(index)
    assert sorted(seen) == list(range(len(seen)))
    for number in range(len(seen) - 1):  # whole passes: each row once
        assert sorted(seen[number]) == list(range(count))


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ((1000, 10, 1.0, 4), (100, 25)),
        ((1000, 10, 1.0, 3), (102, 34)),  # ceil(100 / 3) = 34, 3 * 34
        ((5, 10, 1.0, 4), (1, 1)),
        ((1000, 10, 0.5, 1), (50, 50)),
    ],
)
def test_steps_by_hand(arguments, wanted):
    assert plan_steps(*arguments) == wanted


def test_a_step_loader_goes_on_from_its_state():
    def loader():
        return StepLoader(lambda step, rank, world: (step, rank, world), 6, 1, 2)

    first = loader()
    iterator = iter(first)
    assert [next(iterator) for _ in range(4)] == [(step, 1, 2) for step in range(4)]
    state = first.state_dict()
    second = loader()
    second.load_state_dict(state)
    assert list(second) == [(4, 1, 2), (5, 1, 2)]
    assert list(second) == []
    assert len(second) == 6


def test_parts_of_a_step_are_what_as_many_processes_would_have():
    def loader(parts):
        return StepLoader(lambda step, rank, world: (step, rank, world), 3, 1, 2, parts)

    parts = loader(3)
    assert len(parts) == 9
    iterator = iter(parts)
    assert [next(iterator) for _ in range(6)] == [(step, rank, 6) for step in (0, 1) for rank in (1, 3, 5)]
    assert parts.state_dict() == {"next": 2}
    next(iterator)  # a step that is begun is the one that comes next
    assert parts.state_dict() == {"next": 2}
    fewer = loader(2)
    fewer.load_state_dict(parts.state_dict())
    assert list(fewer) == [(2, 1, 4), (2, 3, 4)]


@given(count=st.integers(0, 50), batch=st.integers(1, 9), world=st.integers(1, 4))
def test_validation_sees_each_row_once_over_all_processes(count, batch, world):
    def loader(rank):
        return RowLoader(lambda indices: indices, count, batch, rank, world)

    if count % world and (count < world or batch == 1):  # a process would have nothing for one of the batches
        for rank in range(world):  # all refuse, none waits for the others
            with pytest.raises(StageError, match=f"{count} validation rows cannot be dealt to {world}"):
                loader(rank)
        return
    loaders = [loader(rank) for rank in range(world)]
    batches = [list(loader) for loader in loaders]
    # As many batches, none empty or too large: a forward of a sharded LM waits for all processes.
    assert {len(part) for part in batches} == {math.ceil(math.ceil(count / world) / batch)}
    assert all(1 <= len(indices) <= batch for part in batches for indices in part)
    if world == 1:  # one process: the rows in order, as ever
        assert [len(indices) for indices in batches[0]][:-1] == [batch] * max(0, len(batches[0]) - 1)
    assert [len(loader) for loader in loaders] == [len(part) for part in batches]
    seen = [row for part in batches for indices in part for row in indices]
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize(("rank", "wanted"), [(0, [[0, 2], [4]]), (1, [[1], [3]])])
def test_one_row_more_than_the_batches_of_all_processes(rank, wanted):
    loader = RowLoader(lambda indices: indices.tolist(), 5, 2, rank, 2)
    assert list(loader) == wanted


def test_loaders_take_their_place_from_the_trainer():
    class Trainer:
        global_rank, world_size, accumulate_grad_batches = 1, 3, 1

    loaders = Loaders(lambda *place: place, steps=2, valid=[(lambda rows: rows, 4)], valid_batch=5)
    loaders.trainer = Trainer
    assert list(loaders.train_dataloader()) == [(0, 1, 3), (1, 1, 3)]
    (valid,) = loaders.val_dataloader()
    assert [rows.tolist() for rows in valid] == [[1]]


def test_rows_of_like_length_share_a_batch():
    lengths = np.random.default_rng(0).integers(10, 200, 1003)
    plain, sorted_ = Stream(1003, 8, 5), Stream(1003, 8, 5, lengths)

    def padding(stream: Stream, first: int) -> float:
        batches = [lengths[stream.indices(step)] for step in range(first, first + 125)]
        return sum(int((batch.max() - batch).sum()) for batch in batches) / sum(map(np.sum, batches))

    for first in (0, 125):  # the second reaches over into the next pass
        assert padding(sorted_, first) < 0.12 < 0.5 < padding(plain, first)
    # A pass is still every row once, and the batches do not grow from short to long.
    one = [sorted_.indices(step) for step in range(126)]
    assert sorted(np.concatenate(one)[:1003].tolist()) == list(range(1003))
    means = [lengths[batch].mean() for batch in one[:16]]
    assert (np.diff(means) < 0).any()
    # A window's rows are those of the plain order: what a row meets is still drawn by the seed.
    window = 16 * 8
    assert set(sorted_.indices(0)) <= set(np.concatenate([plain.indices(step) for step in range(16)]))
    assert set(np.concatenate(one)[:window]) == set(np.concatenate([plain.indices(s) for s in range(16)]))


def test_the_last_steps_are_over_the_newest_rows_by_hand():
    """10 rows in batches of 2: after 6 steps, one pass and a fifth, 2 steps over the rows 6, 7, 8 and 9."""
    stream = NewestLast(count=10, newest=4, first=6, batch_size=2, seed=5)
    plain = Stream(10, 2, 5)
    for step in range(6):
        np.testing.assert_array_equal(stream.indices(step), plain.indices(step))
    assert sorted(stream.indices(6).tolist() + stream.indices(7).tolist()) == [6, 7, 8, 9]
    assert sorted(stream.indices(8).tolist() + stream.indices(9).tolist()) == [6, 7, 8, 9]  # and over again


@settings(deadline=None)
@given(
    count=st.integers(1, 40),
    share=st.floats(0, 1),
    first=st.integers(0, 20),
    per_rank=st.integers(1, 9),
    world=st.integers(1, 3),
)
def test_no_batch_behind_the_first_stream_holds_an_older_row(count, share, first, per_rank, world):
    newest = round(share * count)
    whole = NewestLast(count, newest, first, per_rank * world, 7)
    plain = Stream(count, per_rank * world, 7)
    for step in range(first + 3):
        indices = whole.indices(step)
        if step < first or not newest:
            np.testing.assert_array_equal(indices, plain.indices(step))
        else:
            assert indices.min() >= count - newest
            assert indices.max() < count
        shares = [whole.indices(step, rank, world) for rank in range(world)]
        for rank, of_rank in enumerate(shares):
            np.testing.assert_array_equal(of_rank, indices[rank::world])


def test_a_course_by_hand():
    """1,000 rows and then 250 of them: 125 steps of 10, rounded up to 4 times 32, 25 of them the last."""
    course = Course.plan(1000, 250, 10, 1.0, 4)
    assert course == Course(steps=128, interval=32, newest_steps=25)
    assert course.stops_after == 103
    plain = Course.plan(1000, 0, 10, 1.0, 4)
    assert (plain.steps, plain.interval) == plan_steps(1000, 10, 1.0, 4)
    assert plain.newest_steps == plain.stops_after == 0
    assert Course.plan(1000, 1000, 10, 0.001, 4).newest_steps == 100  # of 101: a step before them there is
