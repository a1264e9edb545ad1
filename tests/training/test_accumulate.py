"""Gradient accumulation: a step in parts is the step, whatever is trained and wherever it is killed."""

import copy
import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from recllm.config.merge import merge
from recllm.config.schema import TrainerConfig
from recllm.config.stages import FitConfig, Stage2Config, Stage3Config
from recllm.crm import build
from recllm.crm.inputs import table_sizes
from recllm.crm.sequences import Sequences
from recllm.errors import ConfigError, StageError
from recllm.eventlog.rowsets import drawn_lists
from recllm.lm.adapters import add_adapter
from recllm.lm.config import AdapterConfig, EncoderTrainingConfig
from recllm.lm.encoder import add_mask_token, build_encoder
from recllm.lm.predict import candidate_scores
from recllm.lm.tasks import TowerPairs
from recllm.lm.towers import TwoTowers
from recllm.systems.crm import crm_inputs
from recllm.systems.lm import Lm
from recllm.systems.texts import tiny_tokenizer, tower_prompts
from recllm.training.callbacks import Curves
from recllm.training.checkpoints import smaller
from recllm.training.fit import check_parts, memory_keys
from recllm.training.loaders import Loaders, Stream
from stages import encoder, lm, retriever, stage1, stage2, stage3, towers
from tests.training import test_fit as whole


class Captured(BaseException):
    """Ends a stage where its training would begin."""


@pytest.fixture
def captured(monkeypatch):
    """`captured(stage, call)` -> the module and the loaders that a stage hands to `fit`."""

    def capture(stage, call):
        handed = []

        def fit(run, module, loaders, *_, **__):
            handed.extend((module, loaders))
            raise Captured

        with monkeypatch.context() as patch:
            patch.setattr(stage, "fit", fit)
            with pytest.raises(Captured):
                call()
        return handed

    return capture


def wide(batch):
    return pytree.tree_map(
        lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, batch
    )


def gradients(module, loaders, parts, step, step_rows):
    """Loss and gradients of a step in parts, float64, without draws, as Lightning adds them up."""
    module = module.double()
    model = module.model.eval()
    model.train = lambda *_: model  # dropout is drawn a part at a time
    module.zero_grad()
    loss = 0.0
    for part in range(parts):
        batch = loaders.on_after_batch_transfer(wide(loaders.train(step, part, parts)), 0)
        if step_rows is not None:  # a CRM's, rounded to float32
            batch["loss_scale"] = batch["loss_scale"].mul(step_rows).round() / step_rows
        for micro_batch in batch if isinstance(batch, list) else [batch]:
            computed = module.loss(wide(micro_batch)) if isinstance(batch, list) else None
            computed = computed or module.training_step(wide(micro_batch), 0)
            part_loss = computed["loss"] / parts
            part_loss.backward()
            loss += part_loss.item()
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    return loss, {name: value.grad.to_dense().clone() for name, value in trained.items()}


def check_micro_batches(module, make, rtol=1e-8, atol=1e-11):
    """Forwards of few tokens and of many: the loss and the gradients of the whole batch, in parts too.

    Args:
        module: of a stage.
        make: most tokens of a forward (0: all) -> the stage's loaders.
    """
    counts = set()
    for step in (0, 3):
        loss, wanted = gradients(module, make(0), 1, step, None)
        assert len(make(0).train(step, 0, 1)) == 1
        for tokens in (1, 300, 1_000):
            for parts in (1, 2):
                loaders = make(tokens)
                counts.add(len(loaders.train(step, 0, parts)))
                got_loss, got = gradients(module, loaders, parts, step, None)
                assert got_loss == pytest.approx(loss, rel=rtol)
                for name, value in wanted.items():
                    torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=name)
    assert len(counts) > 2


def check_step(module, loaders, step_rows=None, rtol=1e-8, atol=1e-11):
    """2, 3 and 5 parts, of unequal numbers of rows among them."""
    for step in (0, 3):
        loss, wanted = gradients(module, loaders, 1, step, step_rows)
        assert max(float(value.abs().max()) for value in wanted.values()) > 1e-6
        for parts in (2, 3, 5):
            got_loss, got = gradients(module, loaders, parts, step, step_rows)
            assert got_loss == pytest.approx(loss, rel=rtol)
            for name, value in wanted.items():
                torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("objective", ["ctr", "rank"])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_crm(demo_log, objective, sparse):
    config = merge([], {
        "stage1.crm.embedding_dim": 4, "stage1.crm.event_dim": 2, "stage1.crm.mlp": [8], "stage1.recent": 5,
        "stage1.crm.attention_mlp": [4], "stage1.fit.batch_size": 57, "stage1.crm.l2": 0.1,
        "stage1.objective": objective, "stage1.sparse_tables": sparse,
    })  # fmt: skip
    run = SimpleNamespace(config=SimpleNamespace(stage1=config.stage1, seed=0))
    inputs = crm_inputs(demo_log, config.stage1.inputs, None)
    rows = demo_log.rows("train", "uniform300")
    if objective == "rank":
        rows = rows[demo_log.label[rows] == 1]
    make = stage1.ctr_loaders if objective == "ctr" else stage1.rank_loaders
    torch.manual_seed(0)
    module = stage1.CrmModule(build(table_sizes(demo_log), config.stage1.crm), config.stage1, 10)
    loaders = make(run, inputs, rows, 10)
    assert loaders.step_rows == (None if objective == "ctr" else 57 // 8)
    check_step(module, loaders, step_rows=loaders.step_rows or 57)


def test_a_retriever(demo_log):
    config = merge([], {
        "stage1.crm.name": "retriever", "stage1.objective": "next", "stage1.recent": 7,
        "stage1.crm.hidden": 8, "stage1.crm.heads": 2, "stage1.fit.batch_size": 17,
    }).stage1  # fmt: skip
    run = SimpleNamespace(config=SimpleNamespace(stage1=config, seed=0))
    inputs = crm_inputs(demo_log, config.inputs, None)
    sequences = Sequences(demo_log, config.recent, retriever.target_events(demo_log, config))
    torch.manual_seed(0)
    model = build(table_sizes(demo_log), config.crm)
    candidates = torch.from_numpy(np.flatnonzero(demo_log.item_count))
    counts = torch.from_numpy(sequences.counts())
    module = retriever.RetrieverModule(model, config, 10, candidates, counts, candidates)
    loaders = retriever.loaders(run, inputs, sequences, demo_log.rows("valid", "uniform20"), 10)
    # Parts differ in events to find; their share of them is rounded to float32.
    check_step(module, loaders, rtol=1e-5, atol=1e-7)


def lm_run(demo_config):
    return SimpleNamespace(config=demo_config)


def test_the_tiny_lm(demo_config, tiny_lm, captured):
    rng = np.random.default_rng(0)
    block = demo_config.lm.training.block
    ids = rng.integers(0, 1000, (40, block)).astype(np.int32)
    weights = rng.choice([0.0, 1.0, 5.0], (40, block)).astype(np.float32)
    config = copy.deepcopy(demo_config)
    object.__setattr__(config.lm.training, "batch_tokens", 7 * block)
    model = copy.deepcopy(tiny_lm.model)
    given = (lm_run(config), model, (ids, weights), 50_000, 1e-3)
    module, loaders = captured(lm, lambda: lm.pretrain(*given))
    check_step(module, loaders)


def test_the_encoder(demo_log, demo_config, tiny_lm, captured):
    config = copy.deepcopy(demo_config)
    object.__setattr__(config.encoder, "training", EncoderTrainingConfig(tokens=20_000, batch_tokens=300))
    tokenizer = add_mask_token(tiny_tokenizer(config, demo_log, config.encoder.tiny), 256)
    matrix = encoder.texts_of(demo_log, tiny_lm.pieces, 10, 256)
    lengths = tiny_lm.pieces.lengths[matrix].sum(1)
    texts = encoder.Texts(tiny_lm.pieces, matrix, config.encoder.training, tokenizer)
    torch.manual_seed(0)
    bert = build_encoder(config.encoder.tiny, tokenizer)
    module, loaders = captured(encoder, lambda: encoder.pretrain(lm_run(config), bert, texts, lengths))
    check_step(module, loaders)


def test_two_towers(demo_log, demo_config):
    tokenizer = add_mask_token(tiny_tokenizer(demo_config, demo_log, demo_config.encoder.tiny), 256)
    prompts = tower_prompts(demo_config, demo_log, tokenizer, 256)
    torch.manual_seed(0)
    model = TwoTowers(build_encoder(demo_config.encoder.tiny, tokenizer).base_model, demo_config.towers)
    rows = demo_log.rows("train", "uniform60")
    pairs = TowerPairs(prompts, rows, demo_log.recent(rows, 10), tokenizer.pad_token_id)
    config = Stage2Config(fit=FitConfig(batch_size=13))
    run = SimpleNamespace(config=SimpleNamespace(stage2=config, seed=0, trainer=None))
    module = towers.TowersModule(model, config.fit, 10)

    def loaders(tokens):
        run.config.trainer = TrainerConfig(accelerator="cpu", tokens_per_forward=tokens)
        return towers.loaders(run, pairs, pairs, model, 10)

    precision = {"rtol": 1e-5, "atol": 1e-7}  # its logits are float32
    check_step(module, loaders(0), **precision)
    check_micro_batches(module, loaders, **precision)


def adapted(tiny_lm, kind):
    model = add_adapter(copy.deepcopy(tiny_lm.model), AdapterConfig(kind=kind, r=2), None, 0, 10)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(0, 0.3)
    return model


def open_lm(demo_log, demo_config, tiny_lm):
    return Lm(tiny_lm.model, tiny_lm.tokenizer, tiny_lm.prompts, demo_log, demo_config, None)


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_stage_2(demo_log, demo_config, tiny_lm, kind):
    config = Stage2Config(title_share=0.4, fit=FitConfig(batch_size=17))  # 10 answers and 7 titles
    run = SimpleNamespace(config=SimpleNamespace(stage2=config, seed=0, trainer=None))
    opened = open_lm(demo_log, demo_config, tiny_lm)
    rows = demo_log.rows("train", "uniform80")
    liked = rows[demo_log.label[rows] == 1]
    answers = opened.answers(rows, None, False)
    titles = opened.titles(liked, drawn_lists(demo_log, liked, 0), None)
    model = adapted(tiny_lm, kind)

    def loaders(tokens):
        run.config.trainer = TrainerConfig(accelerator="cpu", tokens_per_forward=tokens)
        return stage2.loaders(run, stage2.Data(answers, titles, answers, None), model, 10)

    pieces = tiny_lm.pieces
    module = stage2.TuneModule(model, (pieces.yes_id, pieces.no_id), run, 10, answers)
    check_step(module, loaders(0))
    check_micro_batches(module, loaders)


@pytest.mark.parametrize("loss", ["softmax-dpo", "sft"])
def test_stage_3(demo_log, demo_config, tiny_lm, loss):
    config = Stage3Config(loss=loss, fit=FitConfig(batch_size=7))
    run = SimpleNamespace(config=SimpleNamespace(stage3=config, seed=0, trainer=None))
    rows = demo_log.rows("train", "uniform60")
    rows = rows[demo_log.label[rows] == 1][:20]
    task = open_lm(demo_log, demo_config, tiny_lm).titles(rows, drawn_lists(demo_log, rows, 0), None)
    logps = torch.from_numpy(candidate_scores(tiny_lm.model, task))
    compared = stage3.Compared(logps, torch.ones(logps.shape, dtype=torch.bool))
    module = stage3.AlignModule(adapted(tiny_lm, "lora"), config, 10, compared)

    def loaders(tokens):
        run.config.trainer = TrainerConfig(accelerator="cpu", tokens_per_forward=tokens)
        return stage3.loaders(run, task, None, logps, task, module.model, 10)

    check_step(module, loaders(0))  # step 3 reaches over into a pass
    check_micro_batches(module, loaders)


# ---- the whole of `fit`, with parts of 3, 3 and 2 rows


class Parts(whole.Small):
    """The small module, whose mean counts a part by its rows, with or without dropout."""

    def __init__(self, dropout=0.0, kill_part=None, **keys):
        super().__init__(**keys)
        self.net[2].p = dropout
        self.kill_part = kill_part

    def training_step(self, batch, index):
        parts = self.trainer.accumulate_grad_batches
        if self.kill_part == (self.trainer.global_step, index % parts):
            raise whole.Killed
        out = super().training_step(batch, index)
        return {
            "loss": out["loss"] * batch["scale"],
            "data": out["data"],
            "weights": {"data": batch["scale"]},
        }


def loaders():
    x, y = whole.data()
    stream = Stream(whole.ROWS, whole.FIT.batch_size, 0)

    def rows(indices):
        return {"x": x[indices], "y": y[indices]}

    def train(step, rank, world):
        return rows(stream.indices(step, rank, world)) | {"scale": stream.loss_scale(rank, world)}

    return Loaders(train=train, steps=whole.STEPS, valid=[(rows, whole.ROWS)], valid_batch=16)


@pytest.fixture
def train(make_stage, monkeypatch):
    monkeypatch.setattr(whole, "loaders", loaders)

    def one(name, module, parts=1, **keys):
        folder = make_stage(f"stage1/{name}")
        run = whole.train(folder, module, True, accumulate=parts, **keys)
        return whole.ended(run, module)

    return one


def table(ended):
    return [
        {name: float(value) for name, value in row.items() if value}
        for row in csv.DictReader(ended["curve"].splitlines())
    ]


def check_like(got, wanted):
    """The same training but for rounding: weights, moments, rates, curve and checkpoints."""
    assert got["files"] == wanted["files"]
    for one, other in zip(table(got), table(wanted), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    for name in ("valid/auc", "valid/hr@1"):
        assert got[name][1] == wanted[name][1]
    assert got["last"]["global_step"] == wanted["last"]["global_step"]
    # The learning rates stand there to the bit: they are functions of the step.
    assert whole.same(got["last"]["lr_schedulers"], wanted["last"]["lr_schedulers"])
    for name, value in wanted["weights"].items():
        torch.testing.assert_close(got["weights"][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_a_training_in_parts_is_the_training(train, parts):
    wanted = train("whole", Parts())
    check_like(train("parts", Parts(), parts), wanted)


@pytest.mark.parametrize("killed_in", [(9, 0), (9, 1), (10, 2), (6, 0), (18, 1), (23, 2)])
def test_killed_within_a_step_it_ends_the_same_to_the_bit(train, killed_in):
    wanted = train("whole", Parts(0.5), 3)
    with pytest.raises(whole.Killed):
        train("killed", Parts(0.5, killed_in), 3)
    module = Parts(0.5)
    got = train("killed", module, 3)
    assert module.steps_done[0] == {9: 8, 10: 10, 6: 6, 18: 18, 23: 22}[killed_in[0]]
    for name, value in wanted.items():
        assert whole.same(got[name], value), name


@pytest.mark.parametrize(("before", "behind"), [(1, 4), (4, 1), (2, 3), (3, 8)])
@pytest.mark.parametrize("step", [9, 12, 18])
def test_it_goes_on_in_other_parts(train, before, behind, step):
    """As after a kill for want of memory: the step is the checkpoint's, and all that follows."""
    wanted = train("whole", Parts())
    with pytest.raises(whole.Killed):
        train("killed", Parts(kill_part=(step, 0)), before)
    module = Parts()
    got = train("killed", module, behind)
    assert module.steps_done[0] == step - step % 2
    assert len(module.steps_done) == (whole.STEPS - step + step % 2) * behind
    check_like(got, wanted)


def test_one_part_draws_as_ever_and_parts_draw_each_their_own(train):
    seeds = []

    class Draws(Parts):
        def training_step(self, batch, index):
            seeds.append(torch.initial_seed())
            return super().training_step(batch, index)

    train("one", Draws())
    ones = seeds[:]
    seeds.clear()
    train("three", Draws(), 3)
    assert seeds[::3] == ones
    assert len(set(seeds)) == 3 * len(ones)


def test_more_parts_than_rows_are_refused(train):
    wanted = r"trainer.accumulate=9 parts of a step of 8 rows leave some without any; wanted at most 8"
    with pytest.raises(StageError, match=wanted):
        train("many", Parts(), 9)
    check_parts(8, TrainerConfig(accumulate=4, devices=2))
    with pytest.raises(StageError, match="wanted at most 4"):
        check_parts(8, TrainerConfig(accumulate=5, devices=2))
    with pytest.raises(ConfigError, match=r"trainer\.accumulate"):
        TrainerConfig(accumulate=0)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, None])
def test_out_of_memory_in_a_step_names_the_key_that_helps(train, error):
    class Large(Parts):
        def training_step(self, batch, index):
            if self.trainer.global_step == 9 and self.trainer.accumulate_grad_batches < 4:
                raise error("CUDA out of memory") if error else allocation()
            return super().training_step(batch, index)

    with pytest.raises(
        StageError, match=r"^out of memory in step 10; add ARGS=trainer.accumulate=2, [^\n]*$"
    ):
        train("large", Large())
    with pytest.raises(StageError, match=r"add ARGS=trainer\.accumulate=4"):
        train("large", Large(), 2)
    module = Large()
    train("large", module, 4)
    assert module.steps_done[0] == 8


def allocation():
    try:
        torch.empty(1 << 60)
    except RuntimeError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize("place", ["validation", "one row a part"])
def test_no_key_is_named_that_does_not_help(train, place):
    class Large(Parts):
        def validation_step(self, batch, index):
            if place == "validation" and self.trainer.global_step:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().validation_step(batch, index)

        def training_step(self, batch, index):
            if place != "validation":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().training_step(batch, index)

    with pytest.raises(torch.OutOfMemoryError):
        train("large", Large(), 8)


def test_which_keys_need_less_memory():
    assert memory_keys(64, TrainerConfig(), recomputes=True) == [
        "trainer.accumulate=2",
        "trainer.recompute=true",
    ]
    assert memory_keys(64, TrainerConfig(accumulate=16, devices=2), False) == ["trainer.accumulate=32"]
    assert memory_keys(64, TrainerConfig(accumulate=32, devices=2, recompute=True), True) == []


def test_a_smaller_batch_is_told_of_parts(make_stage, capsys):
    def batch(size):
        return {"seed": 0, "stage1": {"fit": {"batch_size": size}}}

    for size, less in ((8, False), (16, False), (8, True)):
        folder = make_stage("stage1/din", batch(size))
        capsys.readouterr()
        with pytest.raises(whole.Killed):
            whole.train(folder, whole.Small(kill_step=9 if size == 8 else 5))
        said = capsys.readouterr().out
        assert ("(trainer.accumulate needs less memory for the same steps)" in said) == less
    assert "stage1.fit.batch_size was 16, is 8" in said


@pytest.mark.parametrize(
    ("before", "now", "less"),
    [
        ({"lm": {"training": {"batch_tokens": 8}}}, {"lm": {"training": {"batch_tokens": 4}}}, True),
        ({"lm": {"training": {"batch_tokens": 4}}}, {"lm": {"training": {"batch_tokens": 8}}}, False),
        (
            {"stage2": {"fit": {"batch_size": 8, "lr": 1}}},
            {"stage2": {"fit": {"batch_size": 8, "lr": 0}}},
            False,
        ),
        ({"stage2": {}}, {"stage2": {"fit": {"batch_size": 8}}}, False),
    ],
)
def test_what_makes_a_step_smaller(before, now, less):
    assert smaller({"config": before}, {"config": now}) == less
    assert not smaller({}, {"config": now})


def test_the_curve_of_a_checkpoint_of_an_earlier_version_goes_on(tmp_path):
    curves = Curves(tmp_path / "metrics.csv", 1)
    curves.load_state_dict({"rows": [], "sums": {"loss": 2.0, "data": 1.0}, "count": 4})
    assert curves.state_dict()["counts"] == {"loss": 4, "data": 4}
