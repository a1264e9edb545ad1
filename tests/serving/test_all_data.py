"""A cascade of models that were trained on all data: what it takes over, and what its card says."""

from types import SimpleNamespace

import pytest

from recllm import paths
from recllm.errors import StageError
from recllm.evaluation.context import Evaluation
from recllm.evaluation.next import NextEvaluation
from recllm.pipeline.stage_file import Role, StageFile
from recllm.serving.bundle import _training_lengths, model_card, write_bundle
from recllm.serving.opening import Fitted
from recllm.serving.recommender import Recommender
from tests.serving.conftest import RETRIEVER


@pytest.fixture(scope="module")
def both(make_cascades):
    """The cascade whose weights were fitted, and the one that repeats it."""
    return make_cascades((*RETRIEVER, "ALL_DATA=1"))


def test_its_weights_are_those_that_validation_chose(both, demo_log):
    chosen, whole = both
    assert whole.file.parents[Role.CHOSEN] == chosen.name
    assert Fitted.read(whole.export / paths.CASCADE) == Fitted.read(chosen.export / paths.CASCADE)
    # Nothing is measured, but by the index.
    assert set(whole.manifest.metrics) == {"index", "index/items", "index/recall", "index/by_text"}
    # Items that were met in held-out events alone are recommended, too.
    met = len(set(demo_log.item.tolist()))
    assert whole.manifest.metrics["index/items"] == met > chosen.manifest.metrics["index/items"]


def test_a_bundle_of_it_is_whole_and_says_what_it_is(both, tmp_path):
    chosen, whole = both
    write_bundle(whole, tmp_path / "bundle")
    made = {str(path.parent.relative_to(tmp_path / "bundle")) for path in tmp_path.rglob(paths.CONFIG)}
    assert all("+all-data" in name for name in made)
    recommender = Recommender.load(tmp_path / "bundle")
    assert recommender.recommend([1, 2], k=5).height == 10
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "all " in card
    assert "No test figure is of these models: they have read the test split." in card
    assert f"What follows is of `{chosen.name}`" in card
    assert "crm/hr@10" in card
    assert "trained on the training split only" not in card
    plain = model_card(chosen, [chosen, chosen.parent(Role.LOG)])
    assert "Models were trained on the training split only" in plain
    assert "How long" not in plain


def test_the_card_says_how_long_each_model_was_trained():
    file = StageFile("stage2", "demo", "stage2/reclora+all-data", "", {"chosen": "stage2/reclora"}, {})
    metrics = {"step": 1200.0, "ranking": {"step": 600.0}, "steps": 2400}
    stage = SimpleNamespace(name=file.folder, file=file, manifest=SimpleNamespace(metrics=metrics))
    lines = _training_lengths([stage])
    assert lines[-1] == "| stage2/reclora+all-data | 1,200 and 600 | 2,400 | stage2/reclora |"


@pytest.mark.parametrize("kind", [Evaluation, NextEvaluation])
def test_an_evaluation_refuses_its_log(both, kind):
    _, whole = both
    run = SimpleNamespace(parents={Role.LOG: whole.parent(Role.LOG)})
    with pytest.raises(StageError, match="trains on its test split, too"):
        kind.open(run)
