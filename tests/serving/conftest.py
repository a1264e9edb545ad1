"""A cascade of the demo, made by its own stage from finished stages, and the recommender of it."""

import pytest

from recllm import paths
from recllm.pipeline.finished import Finished
from recllm.pipeline.run import Run
from recllm.serving.recommender import Recommender
from stages.cascade import work
from tests.systems.finished_demo import FinishedDemo

CASCADES = (
    "cascade",
    "CRM=sim",
    "SYSTEM=reclora s-dpo-pointwise",
    "cascade.first=popularity",
    "cascade.retrieved=30",
    "cascade.ranked=6",
    "cascade.valid_rows=25",
)


RETRIEVER = (
    "cascade",
    "CRM=sim",
    "SYSTEM=none",
    "cascade.retrieved=40",
    "cascade.ranked=6",
    "cascade.valid_rows=25",
)


@pytest.fixture(scope="session")
def make_cascades(tmp_path_factory, demo_log, demo_config, tiny_lm):
    """`make_cascades(words)`: the finished cascades of a command, in the order of their folders' names."""

    def make(words):
        root = tmp_path_factory.mktemp("cascades") / "artifacts"
        made = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RECLLM_ARTIFACTS", str(root))
            demo = FinishedDemo(root / "demo", demo_log, demo_config, tiny_lm, words)
            for folder in sorted((demo.root / "cascade").iterdir()):
                (folder / paths.MANIFEST).unlink()
                (folder / "out").unlink()
                run = Run.start([str(folder), "trainer.accelerator=cpu"])
                work(run)
                run.close()
                made.append(Finished.open(folder))
        return made

    return make


@pytest.fixture(scope="session")
def cascades(make_cascades):
    """`cascades["reclora"]`: the finished stage."""
    return {stage.folder.name.partition("+")[0]: stage for stage in make_cascades(CASCADES)}


@pytest.fixture(scope="session")
def recommender(cascades):
    """Popularity -> SIM -> RecLoRA."""
    return Recommender.load(cascades["reclora"].folder)


@pytest.fixture(scope="session")
def retrieving(make_cascades):
    """Retriever -> SIM."""
    (stage,) = make_cascades(RETRIEVER)
    return Recommender.load(stage.folder)


@pytest.fixture(scope="session")
def reading_texts(make_cascades):
    """Retriever that reads texts -> SIM."""
    (stage,) = make_cascades((*RETRIEVER, "stage1.crm.text_dim=4"))
    return Recommender.load(stage.folder)
