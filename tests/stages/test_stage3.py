"""Stage 3: the cached reference, rows that teach nothing, what is drawn, and numbers that are none."""

import copy
import dataclasses
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recllm.cache import Cache
from recllm.config.schema import TrainerConfig
from recllm.config.stages import FitConfig, Stage3Config
from recllm.errors import StageError
from recllm.eventlog import draws
from recllm.eventlog.rejected import draw, usable
from recllm.eventlog.rowsets import drawn_lists
from recllm.lm.adapters import add_adapter
from recllm.lm.config import AdapterConfig
from recllm.lm.layout import SEPARATE
from recllm.lm.logprobs import candidate_logps
from recllm.lm.predict import candidate_scores
from recllm.lm.tasks import YesNoCandidates
from recllm.losses import preference_loss
from recllm.pipeline.stage_file import Role
from recllm.systems.lm import Lm
from stages import stage3
from stages.stage3 import (
    AlignModule,
    Compared,
    answerable,
    check_comparable,
    check_negatives,
    loaders,
    reference,
)


@pytest.fixture
def task(demo_log, demo_config, tiny_lm):
    """Forty next-title rows, as the stage builds them."""
    rows = demo_log.rows("train", "uniform200")
    rows = rows[demo_log.label[rows] == 1][:40]
    lm = Lm(tiny_lm.model, tiny_lm.tokenizer, tiny_lm.prompts, demo_log, demo_config, None)
    return lm.titles(rows, drawn_lists(demo_log, rows, 0), None)


@pytest.fixture
def model(tiny_lm):
    """A plain LoRA with weights that matter, on the tiny LM."""
    model = add_adapter(copy.deepcopy(tiny_lm.model), AdapterConfig(kind="lora", r=2), None, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.3)
    return model.eval()


def run_of(folder, config=None, identity="one"):
    """What the stage's functions read of a run."""
    return SimpleNamespace(
        config=SimpleNamespace(
            stage3=config or Stage3Config(), seed=0, trainer=TrainerConfig(accelerator="cpu")
        ),
        file=SimpleNamespace(config={"prompt": {"history": 10}}),
        cache=Cache(folder),
        parents={
            role: SimpleNamespace(name=f"{role}/reclora", identity=f"{role}-{identity}") for role in Role
        },
    )


def test_the_cached_reference_equals_a_fresh_one_and_separate_sequences(tmp_path, task, model, monkeypatch):
    fresh = reference(run_of(tmp_path), model, task)
    files = list(tmp_path.rglob("*.npy"))
    assert len(files) == 1
    alone = copy.copy(task)
    alone.layout = SEPARATE
    np.testing.assert_allclose(fresh.logps.numpy(), candidate_scores(model, alone), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(stage3, "candidate_scores", lambda *_: pytest.fail("computed again"))
    cached = reference(run_of(tmp_path), model, task)
    assert torch.equal(cached.logps, fresh.logps)
    assert torch.equal(cached.allowed, fresh.allowed)


def test_whatever_shapes_the_reference_is_in_its_name(tmp_path, task, model):
    made = {reference(run_of(tmp_path), model, task).logps.numpy().tobytes()}

    def count():
        return len(list(tmp_path.rglob("*.npy")))

    reference(run_of(tmp_path, identity="another adapter"), model, task)
    assert count() == 2
    reference(run_of(tmp_path, Stage3Config(fit=FitConfig(precision="bf16-mixed"))), model, task)
    assert count() == 3
    reference(run_of(tmp_path), model, task.keep(np.arange(len(task)) < 30))
    assert count() == 4
    tokens = task.prompts.pieces.table.tokens.copy()
    tokens[-1] += 1  # another tokenizer
    reference(run_of(tmp_path), model, with_table(task, tokens=tokens))
    assert count() == 5
    others = copy.copy(task)
    others.candidates = task.candidates.copy()
    others.candidates[-1, [0, 1]] = others.candidates[-1, [1, 0]]
    reference(run_of(tmp_path), model, others)
    assert count() == 6
    shorter = copy.copy(task)
    shorter.prompts = copy.copy(task.prompts)
    shorter.prompts.max_length -= 1
    reference(run_of(tmp_path), model, shorter)
    assert count() == 7
    # K, loss and draws are not.
    again = reference(run_of(tmp_path, Stage3Config(loss="dmpo", negatives=7, beta=0.1)), model, task)
    assert count() == 7
    assert again.logps.numpy().tobytes() in made


def with_table(task, **arrays):
    """The task with other arrays of its pieces' table; the pieces' lengths stay."""
    changed = copy.copy(task)
    changed.prompts = copy.copy(task.prompts)
    changed.prompts.pieces = copy.copy(task.prompts.pieces)
    table = dataclasses.replace(task.prompts.pieces.table, **arrays)
    object.__setattr__(changed.prompts.pieces, "table", table)
    return changed


def test_text_of_the_same_tokens_with_other_boundaries_is_another_reference(tmp_path, task, monkeypatch):
    monkeypatch.setattr(stage3, "candidate_scores", lambda *_: np.zeros(task.candidates.shape, np.float32))
    offsets = np.array(task.prompts.pieces.table.offsets)
    offsets[3] += 1
    for given in (task, with_table(task, offsets=offsets)):
        reference(run_of(tmp_path), torch.nn.Linear(1, 1), given)
    assert len(list(tmp_path.rglob("*.npy"))) == 2


def test_the_name_of_a_reference_costs_no_copy_of_a_large_catalogs_tokens(tmp_path, task, monkeypatch):
    monkeypatch.setattr(stage3, "candidate_scores", lambda *_: np.zeros(task.candidates.shape, np.float32))
    large = with_table(task, tokens=np.arange(1_000_000, dtype=np.int32))
    tracemalloc.start()
    reference(run_of(tmp_path), torch.nn.Linear(1, 1), large)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6  # as much as the tokens themselves; as a list and JSON they take 40 MB more


def test_a_reference_that_is_no_number_names_its_rows(tmp_path, task, model):
    with torch.no_grad():
        next(value for name, value in model.named_parameters() if "lora_B" in name).fill_(torch.nan)
    with pytest.raises(StageError, match=rf"rows {task.rows[0]}, .*stage2/reclora anew"):
        reference(run_of(tmp_path), model, task)


def with_texts(task, texts):
    """The task with other texts of its candidates: place -> piece of another place, or 0."""
    changed = copy.copy(task)
    changed.prompts = copy.copy(task.prompts)
    changed.prompts.pieces = copy.copy(task.prompts.pieces)
    item = task.prompts.pieces.item.copy()
    for row, column, piece in texts:
        item[task.candidates[row, column]] = piece
    object.__setattr__(changed.prompts.pieces, "item", item)
    return changed


def test_rows_that_teach_nothing_are_left_out_and_counted(task, capsys):
    few = task.keep(np.arange(len(task)) < 2)
    assert len(answerable(few)) == 2
    assert capsys.readouterr().out == ""
    own = few.chosen
    untitled = with_texts(few, [(0, own[0], 0)])
    kept = answerable(untitled)
    assert kept.rows.tolist() == few.rows[1:].tolist()
    assert "1 rows left out whose chosen item has no title, 0 without" in capsys.readouterr().out
    piece = few.texts[1, own[1]]
    alone = with_texts(few, [(1, column, piece) for column in range(20)])
    kept = answerable(alone)
    assert few.rows[1] not in kept.rows
    assert "without any other title to reject" in capsys.readouterr().out
    only = alone.keep(np.array([False, True]))
    with pytest.raises(StageError, match="none of 1 rows has a title to choose"):
        answerable(only)


def batch_of(task, config, logps, hard=None, step=0):
    lm = torch.nn.Linear(1, 1)  # so small that no step is cut
    (batch,) = loaders(run_of("unused", config), task, hard, logps, task, lm, 10).train(step, 0, 1)
    return batch


@pytest.mark.parametrize("negatives_from", ["random", "reference", "half"])
def test_a_batch_holds_k_rejected_titles_and_their_reference(task, model, negatives_from):
    logps = torch.from_numpy(candidate_scores(model, task))
    config = Stage3Config(negatives=4, negatives_from=negatives_from, fit=FitConfig(batch_size=16))
    batch = batch_of(task, config, logps, logps.numpy())
    assert batch["prompt"]["present"].shape == (16, 5)
    assert (batch["chosen"] == 0).all()
    assert batch["row"].tolist() == task.rows[batch["index"]].tolist()
    with torch.no_grad():
        policy = candidate_logps(model, batch)
    torch.testing.assert_close(policy, batch["reference"], rtol=1e-4, atol=1e-4)
    # At the start every reward is 0 whatever the draw: the loss is ln(1 + K).
    loss = preference_loss("softmax-dpo", policy, batch["reference"], 1.0)
    torch.testing.assert_close(loss, torch.full((16,), 5.0).log(), rtol=1e-3, atol=1e-3)
    if negatives_from == "reference":
        others = logps[batch["index"]].clone()
        others[torch.arange(16), torch.from_numpy(task.chosen)[batch["index"]]] = -torch.inf
        torch.testing.assert_close(batch["reference"][:, 1:], others.sort(descending=True).values[:, :4])
    again = batch_of(task, config, logps, logps.numpy(), step=5)  # 40 rows in steps of 16: the third pass
    assert again["reference"].shape == (16, 5)


def test_a_batch_that_reaches_into_the_next_pass_draws_there_anew(task):
    """40 rows in steps of 16: step 2 holds 8 rows of the first pass and 8 of the second."""
    config = Stage3Config(negatives=4, fit=FitConfig(batch_size=16))
    logps = torch.arange(task.candidates.size, dtype=torch.float32).reshape(task.candidates.shape)
    batches = [batch_of(task, config, logps, step=step) for step in range(8)]  # three passes and eight rows
    sets = [{}, {}, {}, {}]
    place = 0
    for batch in batches:
        for row, rejected in zip(batch["row"].tolist(), batch["reference"][:, 1:].tolist(), strict=True):
            sets[place // 40][row] = sorted(rejected)
            place += 1
    for one, other in ((0, 1), (1, 2), (0, 2)):
        # 4 of 19 that are drawn anew are the same by a chance of 1 in 3,876.
        assert sum(sets[one][row] == sets[other][row] for row in task.rows.tolist()) <= 1
    seed = draws.derive(0, "rejected", "1")
    usable_ones = usable(task.texts, task.chosen)
    columns, _ = draw(task.rows, task.chosen, usable_ones, 4, seed)
    for index, row in enumerate(task.rows.tolist()):  # all rows of the second pass, by its one seed
        assert sets[1][row] == sorted(logps[index, columns[index, 1:]].tolist())


def test_point_wise_a_batch_holds_a_prompt_a_candidate(tmp_path, task, model):
    """Answers instead of titles: the same draws and the same loss at the start."""
    history = np.broadcast_to(task.history[:, None], (*task.candidates.shape, task.history.shape[1]))
    verdicts = YesNoCandidates(task.prompts, task.prompts.log, task.rows, history, task.candidates, None)
    config = Stage3Config(task="answers", negatives=4, fit=FitConfig(batch_size=8))
    compared = reference(run_of(tmp_path, config), model, verdicts)
    assert (compared.logps < 0).all()
    of_titles = reference(run_of(tmp_path), model, task)
    assert (of_titles.logps != compared.logps).all()  # another file: they do not take each other's numbers
    batch = batch_of(verdicts, config, compared.logps)
    assert len(batch["prompt"]["input_ids"]) == 8 * 5
    with torch.no_grad():
        policy = candidate_logps(model, batch)
    torch.testing.assert_close(policy, batch["reference"], rtol=1e-4, atol=1e-4)
    module = AlignModule(model, config, 10, compared)
    module.log = lambda *_, **__: None
    out = module.loss(batch)
    assert out["loss"].item() == pytest.approx(np.log(5), rel=1e-3)
    out["loss"].backward()
    moved = [value.grad.abs().max() for name, value in model.named_parameters() if "lora_B" in name]
    assert min(moved) > 0
    with torch.no_grad():
        module.validation_step(verdicts(np.arange(8)), 0)
    assert module.statistics["kl"].compute().item() == pytest.approx(0, abs=1e-4)


def test_rows_with_fewer_titles_than_k_are_masked(task, model):
    piece = task.texts[0, (task.chosen[0] + 1) % 20]
    same = with_texts(task, [(0, column, piece) for column in range(20) if column != task.chosen[0]])
    one = same.keep(np.arange(len(task)) == 0)
    logps = torch.from_numpy(candidate_scores(model, one))
    config = Stage3Config(negatives=3, fit=FitConfig(batch_size=1))
    batch = batch_of(one, config, logps)
    assert batch["prompt"]["present"].tolist() == [[True, True]]
    assert batch["lengths"].shape == (1, 2)


def module_of(task, model, **config):
    logps = torch.from_numpy(candidate_scores(model, task))
    module = AlignModule(
        model, Stage3Config(**config), 10, Compared(logps, torch.ones(logps.shape, dtype=torch.bool))
    )
    module.log = lambda *_, **__: None
    return module, logps


@pytest.mark.parametrize("loss", ["softmax-dpo", "dpo-pairwise", "dmpo", "mppo", "sft"])
def test_a_loss_that_is_no_number_stops_before_the_update_and_names_the_row(task, model, loss):
    module, logps = module_of(task, model, loss=loss, negatives=3)
    batch = batch_of(task, Stage3Config(loss=loss, fit=FitConfig(batch_size=8)), logps)
    out = module.loss(batch)
    assert out["loss"].isfinite()
    row = batch["row"][3].item()
    batch["prompt"]["target"] = batch["prompt"]["target"].clone()
    representation = batch["representation"]
    original = stage3.candidate_logps
    try:
        stage3.candidate_logps = lambda *given: original(*given).index_fill(0, torch.tensor(3), torch.nan)
        module._trainer = SimpleNamespace(global_step=7)
        with pytest.raises(StageError, match=rf"the loss of rows {row} of the log .* at step 7; lower"):
            module.loss(batch)
    finally:
        stage3.candidate_logps = original
    assert representation is None


def test_more_rejected_titles_than_other_candidates_are_refused():
    check_negatives(Stage3Config(negatives=4), 5)
    check_negatives(Stage3Config(negatives=99), 100)
    check_negatives(Stage3Config(negatives=5, loss="sft"), 5)  # it rejects nothing
    wanted = r"stage3\.negatives=5, .* 4 other .*negatives=4 or fewer, or prepare\.candidates=6 or more"
    with pytest.raises(StageError, match=wanted):
        check_negatives(Stage3Config(negatives=5), 5)


def test_they_are_refused_before_any_work(tmp_path, demo_log, monkeypatch):
    run = run_of(tmp_path, Stage3Config(negatives=20))
    run.parents[Role.LOG].folder = demo_log.folder
    monkeypatch.setattr(stage3.compatibility, "check_same_prompts", lambda *_: None)
    with pytest.raises(StageError, match=r"prepare\.candidates=21 or more"):
        stage3.work(run)


def test_validation_rows_that_rank_nothing_are_refused(task):
    check_comparable(task)
    alone = task.keep(np.arange(len(task)) < 3)
    alone.prompts = copy.copy(task.prompts)
    alone.prompts.pieces = copy.copy(task.prompts.pieces)
    item = task.prompts.pieces.item.copy()
    object.__setattr__(alone.prompts.pieces, "item", item)
    item[alone.candidates[1:]] = 0  # of the other rows no candidate has a title
    own = item[alone.candidates[0, alone.chosen[0]]] or 1
    item[alone.candidates[0]] = own  # and of this one all have the same
    item[alone.candidates[0, (alone.chosen[0] + 1) % 20]] = own + 1
    check_comparable(alone)
    item[alone.candidates[0]] = own
    with pytest.raises(StageError, match="none of 3 validation rows has a title to choose and another one"):
        check_comparable(alone)


def test_means_over_rows_with_a_rejected_title_count_those_rows(task, model):
    """Of 40 rows in batches of 30 and 10 most have nothing to reject: the figures are those of one batch."""
    module, logps = module_of(task, model)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.mul_(-1)
    allowed = torch.from_numpy(usable(task.texts, task.chosen))
    allowed.scatter_(1, torch.from_numpy(task.chosen)[:, None], True)
    alone = torch.arange(40) < 28  # of the first batch two rows count, of the second all ten
    allowed[alone] = torch.arange(20) == torch.from_numpy(task.chosen)[alone, None]
    found = []
    for parts in ([np.arange(40)], [np.arange(30), np.arange(30, 40)], [np.arange(28), np.arange(28, 40)]):
        module, _ = module_of(task, model)
        module.valid = Compared(logps, allowed)
        with torch.no_grad():
            for rows in parts:
                module.validation_step(task(rows), 0)
        found.append({name: metric.compute().item() for name, metric in module.statistics.items()})
    policy = torch.from_numpy(candidate_scores(model, task))
    reward = policy - logps
    others = allowed.clone().scatter_(1, torch.from_numpy(task.chosen)[:, None], False)
    mine = reward.gather(1, torch.from_numpy(task.chosen)[:, None])[:, 0]
    rejected = (reward * others).sum(1)[28:] / others.sum(1)[28:]
    assert found[0]["margin"] == pytest.approx((mine[28:] - rejected).mean().item(), rel=1e-3)
    assert found[0]["reward_chosen"] == pytest.approx(mine.mean().item(), rel=1e-3)
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4, abs=1e-5)


def test_validation_compares_with_the_reference(task, model):
    module, logps = module_of(task, model)
    with torch.no_grad():
        module.validation_step(task(np.arange(40)), 0)
    start = {name: metric.compute().item() for name, metric in module.statistics.items()}
    assert start["margin"] == pytest.approx(0, abs=1e-3)
    assert start["kl"] == pytest.approx(0, abs=1e-4)
    own = logps[torch.arange(40), torch.from_numpy(task.chosen)]
    assert start["chosen_logp"] == pytest.approx(own.mean().item(), rel=1e-4)
    # Another policy: the same statistics, with the chosen candidate moved to the front by hand.
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.mul_(-1)
        policy = torch.from_numpy(candidate_scores(model, task))
        module, _ = module_of(task, model)
        module.valid = Compared(logps, torch.ones(logps.shape, dtype=torch.bool))
        module.validation_step(task(np.arange(40)), 0)
    reward = policy - logps
    mine = reward[torch.arange(40), torch.from_numpy(task.chosen)]
    margin = mine - (reward.sum(1) - mine) / 19
    found = {name: metric.compute().item() for name, metric in module.statistics.items()}
    assert found["margin"] == pytest.approx(margin.mean().item(), rel=1e-3)
    best = reward.scatter(1, torch.from_numpy(task.chosen)[:, None], -torch.inf).amax(1)
    assert found["reward_accuracy"] == pytest.approx((mine > best).float().mean().item())
    assert found["kl"] > 0
