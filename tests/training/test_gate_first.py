"""The gate first: what trains, what stays, and that it is the model's own forward that learned."""

import copy
import math

import numpy as np
import pytest
import torch
from peft import get_peft_model

from recllm.config.stages import FitConfig
from recllm.errors import StageError
from recllm.lm.adapters import add_adapter
from recllm.lm.config import AdapterConfig
from recllm.lm.predict import answer_scores, answer_states
from recllm.lm.tasks import YesNoPrompts
from recllm.reclora import RecLoraConfig
from recllm.training.gate_first import check_logits, train_gate
from tests.lm.families import FAMILIES

MODULES = ["q_proj", "v_proj", "lm_head"]


def gated(tiny_lm, log, **settings):
    """96 rows whose label is written in the representation, and an adapter that reads it."""
    rows = log.rows("train", "uniform96")
    representation = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
    task = YesNoPrompts(tiny_lm.prompts, rows, log.recent(rows, 4), representation)
    task.label = (representation[:, 1] > 0).float()
    config = AdapterConfig(r=2, num_meta=3, gate_hidden=8, target_modules=MODULES, **settings)
    return add_adapter(copy.deepcopy(tiny_lm.model), config, representation, seed=0), task


@pytest.mark.parametrize("settings", [{}, {"mixture": "core"}, {"gate": "module"}, {"init": "pissa"}])
def test_gate_and_head_learn_and_nothing_else(demo_log, tiny_lm, settings):
    model, task = gated(tiny_lm, demo_log, **settings)
    before = {name: value.clone() for name, value in model.named_parameters()}
    answers = tiny_lm.pieces.yes_id, tiny_lm.pieces.no_id
    loss = train_gate(
        model, answer_states(model, task), task, answers, 40, FitConfig(batch_size=16, lr=2e-2), seed=1
    )
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert any("lm_head" in name and name.endswith("reclora_B.default") for name in changed)
    assert any("gate" in name for name in changed)
    assert all("lm_head" in name or "gate" in name for name in changed)
    assert all(before[name].requires_grad for name in changed)
    assert loss < 0.3 < math.log(2)
    # By the model's own forward, which has not been used since: the answers are in.
    right = (answer_scores(model, task) > 0) == (task.label.numpy() > 0)
    assert right.mean() > 0.85


def test_the_head_alone_gives_what_a_whole_forward_gives(demo_log, tiny_lm):
    model, task = gated(tiny_lm, demo_log)
    answers = tiny_lm.pieces.yes_id, tiny_lm.pieces.no_id
    train_gate(model, answer_states(model, task), task, answers, 3, FitConfig(batch_size=16, lr=2e-2), seed=1)
    states = answer_states(
        tiny_lm.model, YesNoPrompts(task.prompts, task.rows, task.history, None)
    )  # the bare LM's
    with torch.no_grad():
        logits = model.base_model.head_logits(torch.from_numpy(states), task.representation)
    alone = (logits[:, answers[0]] - logits[:, answers[1]]).numpy()
    np.testing.assert_allclose(alone, answer_scores(model, task), rtol=1e-4, atol=1e-5)
    bare = states @ tiny_lm.model.get_output_embeddings().weight.numpy().T
    assert np.abs(alone - (bare[:, answers[0]] - bare[:, answers[1]])).max() > 0.05  # and it has moved


def test_the_passes_are_the_same_every_time(demo_log, tiny_lm):
    answers = tiny_lm.pieces.yes_id, tiny_lm.pieces.no_id
    fit = FitConfig(batch_size=16, lr=2e-2)
    runs = []
    for seed in (1, 1, 2):
        model, task = gated(tiny_lm, demo_log)
        runs.append(train_gate(model, answer_states(model, task), task, answers, 2.5, fit, seed))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("settings", [{}, {"gate": "module"}])
def test_the_gate_of_a_16_bit_lm_learns_too(demo_log, tiny_lm, settings):
    """The states are float32, the head is not."""
    model, task = gated(tiny_lm, demo_log, **settings)
    model.to(torch.bfloat16)
    answers = tiny_lm.pieces.yes_id, tiny_lm.pieces.no_id
    fit = FitConfig(batch_size=16, lr=2e-2)
    loss = train_gate(model, answer_states(model, task), task, answers, 40, fit, seed=1)
    assert loss < 0.4 < math.log(2)


def lm_of(name):
    family = FAMILIES[name]
    model = family.build()
    config = RecLoraConfig(r=2, num_meta=2, representation_dim=4, target_modules=["lm_head"])
    return get_peft_model(model, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stands_behind_the_head_is_found(dtype):
    """A softcap (Gemma-2), a divisor (Granite), a factor (Cohere): the head alone learns other logits."""
    for name in ("Llama", "OPT", "GPT-J", "Mamba"):
        check_logits(lm_of(name).to(dtype), 3)
    for name in ("Gemma-2", "Granite", "Cohere-2", "Falcon-H1"):
        model = lm_of(name).to(dtype)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(
            StageError, match=r"stage2.gate_first=3 .* changes the logits behind.*gate_first=0"
        ) as error:
            check_logits(model, 3)
        assert "\n" not in str(error.value)
        assert not model.get_output_embeddings()._forward_hooks
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
