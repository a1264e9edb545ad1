"""What several test files share: a quiet offline process, a small event log, a tiny LM, a stage's folder."""

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from recllm.systems.texts import build_pieces, texts

# Before torch and transformers are imported: threads that wait must not spin, and nothing goes online.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("RECLLM_TRACEBACK", None)

import pytest
import torch

from recllm import console
from recllm.config.merge import load_yaml, merge
from recllm.eventlog.build import build_log
from recllm.eventlog.log import EventLog
from recllm.pipeline.stage_file import StageFile
from tests.postgres import run_postgres

REPOSITORY = Path(__file__).parents[1]

torch.set_num_threads(1)
pytest.register_assert_rewrite("tests.lm.contract", "tests.loss_contract")  # they hold assertions of tests


@pytest.fixture(autouse=True)
def nobody_speaks(monkeypatch):
    """Lines carry no name of a stage that an earlier test, or a fixture, ran in this process."""
    monkeypatch.setattr(console, "_speaker", "")


@pytest.fixture(scope="session")
def demo_config():
    """The demo's configuration, with an LM that is built in a second."""
    names = ("dataset/demo.yaml", "lm/tiny.yaml")
    small = {"lm.tiny.hidden": 32, "lm.tiny.layers": 2, "lm.tiny.heads": 2, "lm.tiny.intermediate": 64}
    sizes = {"lm.tiny.vocabulary": 1024, "prepare.ranking_valid_rows": 40, "prepare.ranking_test_rows": 40}
    layers = [(name, load_yaml(REPOSITORY / "conf" / name)) for name in names]
    return merge(layers, {**small, **sizes, "subsample": "0.2"})


@pytest.fixture(scope="session")
def demo_log(tmp_path_factory, demo_config):
    """The event log of 40 users of the demo, some 4,000 events."""
    name = "demo_recipe_of_conftest"
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "data" / "demo" / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[name] = recipe
    spec.loader.exec_module(recipe)
    folder = tmp_path_factory.mktemp("demo")
    recipe.make(folder / "tables", config=recipe.RecipeConfig(users=40))
    build_log(folder / "tables", folder / "log", demo_config.prepare)
    return EventLog.open(folder / "log")


@pytest.fixture(scope="session")
def tiny_lm(demo_log, demo_config):
    """An untrained tiny LM for the demo: `model`, `tokenizer`, `pieces`, `prompts`."""
    from recllm.lm.tiny import build_model, train_tokenizer
    from recllm.text.prompts import Prompts

    titles, descriptions, profiles = texts(demo_config, demo_log)
    pieces = [*titles, *descriptions, *profiles]
    levels = demo_log.meta["rating_levels"]
    tokenizer = train_tokenizer(demo_config.lm.tiny, demo_config.wording, levels, pieces, [1] * len(pieces))
    torch.manual_seed(0)
    model = build_model(demo_config.lm.tiny, tokenizer).requires_grad_(False).eval()
    pieces = build_pieces(demo_config, demo_log, tokenizer)
    prompts = Prompts(demo_log, pieces, demo_config.lm.tiny.context)
    return SimpleNamespace(model=model, tokenizer=tokenizer, pieces=pieces, prompts=prompts)


@pytest.fixture(scope="session")
def postgres():
    """A database server of this session's own; a test that wants it is skipped where there is none."""
    yield from run_postgres()


@pytest.fixture
def make_stage(tmp_path, monkeypatch):
    """`make_stage("stage1/sim", {"seed": 1}, {"log": "log"})` -> the stage's folder, with `config.yaml`."""
    monkeypatch.setenv("RECLLM_ARTIFACTS", str(tmp_path))

    def make(name, config=None, parents=None, **others):
        folder = tmp_path / "demo" / name
        folder.mkdir(parents=True, exist_ok=True)
        stage = others.pop("stage", name.partition("/")[0])
        config = {"seed": 0} if config is None else config
        file = StageFile(stage, "demo", name, f"stages.{stage}", parents or {}, config, **others)
        (folder / "config.yaml").write_text(file.text())
        return folder

    return make


@pytest.fixture(scope="session")
def finished_demo(tmp_path_factory, demo_log, demo_config, tiny_lm):
    """Finished stages with a system of every kind; nobody writes into them."""
    from tests.systems.finished_demo import FinishedDemo

    root = tmp_path_factory.mktemp("finished") / "artifacts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLLM_ARTIFACTS", str(root))
        return FinishedDemo(root / "demo", demo_log, demo_config, tiny_lm)


@pytest.fixture
def new_run(finished_demo, tmp_path, monkeypatch):
    """`new_run()` -> an evaluation at work with an empty cache; the one before is done."""
    count = 0

    def make(**measured):
        nonlocal count
        count += 1
        monkeypatch.setenv("RECLLM_CACHE", str(tmp_path / f"cache-{count}"))
        return finished_demo.run(**measured)

    return make
