"""What holds of any system of the table, whatever it is made of."""

import math

import numpy as np
import pytest

from recllm.systems.system import Kind, System, Task

PARTS = 7
"""Rows of the first of two parts, no divisor of any batch."""


class SystemContract:
    """Tests that a new kind of system inherits; what it adds is how one is made.

        class TestMine(SystemContract):
            @pytest.fixture
            def make(self, new_run):
                return lambda: Mine(new_run())

    `make()` gives a new system each time, with nothing kept of what an earlier one was asked. Only the
    control whose gate reads other rows (`gate_input=shuffled`) breaks it: it depends on the rows of a call.
    """

    tolerance = 1e-4
    """Largest difference of two scores that are summed up in another order, relative or absolute."""

    @pytest.fixture
    def make(self):
        raise NotImplementedError("a contract is inherited; wanted a fixture `make` that gives `make()`")

    @pytest.fixture
    def system(self, make):
        return make()

    @pytest.fixture
    def rows(self, demo_log):
        """Liked and disliked test rows."""
        return np.asarray(demo_log.rows("test", "uniform20"))

    @pytest.fixture
    def listed(self, demo_log):
        """Liked test rows and their candidates."""
        rows, lists = demo_log.ranking("test", "uniform20")
        return rows[:12], lists[:12]

    def same(self, got, wanted):
        np.testing.assert_allclose(got, wanted, rtol=self.tolerance, atol=self.tolerance)

    def needs(self, system, task):
        if task not in system.tasks:
            pytest.skip(f"{system.name} is not asked for {task}")

    def test_it_says_what_it_is(self, system):
        assert isinstance(system, System)
        assert system.name
        assert system.table_name
        assert system.kind in Kind
        assert system.stage == system.kind.stage
        assert system.tasks
        assert set(system.tasks) <= set(Task)
        assert system.k is None or system.k >= 1
        assert system.name in repr(system)

    def test_its_figures_are_numbers(self, system):
        for figures in (system.cost(), system.labels_read(), system.forgetting()):
            assert all(math.isfinite(value) for value in figures.values())

    def test_it_answers_every_row(self, system, rows):
        self.needs(system, Task.CTR)
        logits = system.ctr(rows)
        assert logits.shape == rows.shape
        assert np.issubdtype(logits.dtype, np.floating)
        assert np.isfinite(logits).all()

    def test_answers_follow_the_rows(self, make, rows):
        """In whatever order they stand, and whichever stand beside them."""
        system = make()
        self.needs(system, Task.CTR)
        logits = system.ctr(rows)
        order = np.random.default_rng(0).permutation(len(rows))
        self.same(system.ctr(rows[order]), logits[order])
        parts = [system.ctr(part) for part in (rows[:PARTS], rows[PARTS:])]
        self.same(np.concatenate(parts), logits)

    def test_it_scores_every_candidate(self, system, listed):
        self.needs(system, Task.RANKING)
        rows, lists = listed
        scores = system.rank(rows, lists)
        assert scores.shape == lists.shape
        assert np.issubdtype(scores.dtype, np.floating)
        assert np.isfinite(scores).all()

    def test_scores_follow_the_rows(self, system, listed):
        self.needs(system, Task.RANKING)
        rows, lists = listed
        scores = system.rank(rows, lists)
        order = np.random.default_rng(0).permutation(len(rows))
        self.same(system.rank(rows[order], lists[order]), scores[order])
        parts = [system.rank(rows[part], lists[part]) for part in (slice(PARTS), slice(PARTS, None))]
        self.same(np.concatenate(parts), scores)

    def test_scores_follow_the_candidates(self, system, listed):
        """Where the row's own item stands tells nothing."""
        self.needs(system, Task.RANKING)
        rows, lists = listed
        order = np.random.default_rng(0).permuted(np.tile(np.arange(lists.shape[1]), (len(rows), 1)), axis=1)
        shuffled = system.rank(rows, np.take_along_axis(lists, order, 1))
        self.same(shuffled, np.take_along_axis(system.rank(rows, lists), order, 1))

    def test_asked_again_it_says_the_same(self, make, rows, listed):
        """To the bit: from what was kept, and computed anew."""
        systems = [make()]
        systems.append(systems[0])
        answers = [self.everything(system, rows, listed) for system in systems]
        answers.append(self.everything(make(), rows, listed))
        for again in answers[1:]:
            assert again.keys() == answers[0].keys()
            for task, scores in again.items():
                np.testing.assert_array_equal(scores, answers[0][task])

    def everything(self, system, rows, listed):
        answers = {}
        if Task.CTR in system.tasks:
            answers[Task.CTR] = np.array(system.ctr(rows))
        if Task.RANKING in system.tasks:
            answers[Task.RANKING] = np.array(system.rank(*listed))
        return answers

    def test_what_it_is_not_asked_is_one_line(self, system, rows, listed):
        asks = {Task.CTR: lambda: system.ctr(rows), Task.RANKING: lambda: system.rank(*listed)}
        for task in asks.keys() - set(system.tasks):
            with pytest.raises(NotImplementedError, match="wanted one of its tasks") as error:
                asks[task]()
            assert "\n" not in str(error.value)
