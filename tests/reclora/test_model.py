"""The tuner: training, checkpointing, errors."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2ForCausalLM

from recllm.reclora import RecLoraLinear
from tests.reclora.gated import D, close, config, gradients, inputs, loss_of, perturb, tiny_lm, trained


@pytest.mark.parametrize("gate", ["shared", "module"])
def test_only_a_b_and_gate_train(gate):
    model = get_peft_model(tiny_lm(), config(gate=gate))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {
        f"base_model.model.model.layers.{layer}.self_attn.{m}.reclora_{x}.default"
        for layer in (0, 1) for m in ("q_proj", "v_proj") for x in "AB"
    }  # fmt: skip
    gates = {
        f"base_model.reclora_gate.default.{name}"
        for name in ("weight_1", "bias_1", "norm_weight", "norm_bias", "weight_2", "bias_2")
    }
    assert trainable == adapters | gates
    assert model.base_model.reclora_gate["default"].weight_2.shape == (4 if gate == "module" else 1, 3, 6)


def test_gates_first_gradient_is_zero_and_the_second_is_not():
    model = get_peft_model(tiny_lm(), config())
    ids, representation = inputs()
    gate = model.base_model.reclora_gate["default"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, ids, representation).backward()
        # Zero, not None: data-parallel training waits for every parameter's gradient.
        seen.append({name: p.grad.abs().max().item() for name, p in gate.named_parameters()})
        optimizer.step()
    assert set(seen[0].values()) == {0.0}
    assert seen[1]["weight_2"] > 0
    assert seen[1]["bias_2"] > 0
    assert seen[1]["weight_1"] == 0
    assert min(seen[2].values()) > 0


def test_representations_matter_and_rows_keep_their_own():
    model = trained()
    ids, representation = inputs()
    same = ids[:1].expand(3, -1)
    logits = model(same, representation=representation).logits
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    order = torch.tensor([2, 0, 1])
    close(model(same, representation=representation[order]).logits, logits[order])
    shuffled = model(ids, representation=representation[order]).logits
    assert (shuffled - model(ids, representation=representation).logits).abs().max() > 1e-3
    for row in range(3):  # one batch size and another
        close(model(same[:1], representation=representation[row : row + 1]).logits[0], logits[row])


def test_backbone_takes_a_representation_too():
    model = trained()
    ids, representation = inputs()
    lm = model.get_base_model()
    hidden = lm.model(ids, representation=representation).last_hidden_state
    close(lm.lm_head(hidden), model(ids, representation=representation).logits)


def test_qwen2_with_biases_and_all_linear_modules():
    model = perturb(
        get_peft_model(tiny_lm(family=Qwen2ForCausalLM), config(target_modules="all-linear", gate="module"))
    )
    assert len(model.base_model.layers("default")) == 2 * 7
    ids, representation = inputs()
    assert (loss_of(model, ids, representation) - loss_of(model, ids, representation.flip(0))).abs() > 1e-4
    with model.disable_adapter():
        close(model(ids).logits, tiny_lm(family=Qwen2ForCausalLM)(ids).logits)


@pytest.mark.parametrize("gate", ["shared", "module"])
def test_checkpointing_changes_nothing(gate):
    plain = trained(gate=gate).train()
    checkpointed = trained(gate=gate).train()
    checkpointed.get_base_model()._set_gradient_checkpointing(
        True, lambda *a, **k: torch.utils.checkpoint.checkpoint(*a, use_reentrant=False, **k)
    )
    ids, representation = inputs()
    calls = []
    checkpointed.get_base_model().model.layers[0].self_attn.register_forward_pre_hook(
        lambda *_: calls.append(1)
    )
    losses = [loss_of(model, ids, representation) for model in (plain, checkpointed)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert len(calls) == 2  # once forward, once recomputed
    left, right = gradients(plain), gradients(checkpointed)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].abs().max() > 0
        torch.testing.assert_close(left[name], right[name], rtol=1e-9, atol=1e-12)


def test_each_of_two_forwards_before_one_backward_is_recomputed_with_its_own_gate():
    """With a gate that only lies on the modules, the second forward would gate the first's recomputation."""
    plain, checkpointed = trained().train(), trained().train()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids, representation = inputs()
    for model in (plain, checkpointed):
        loss = loss_of(model, ids, representation) + 2 * loss_of(model, ids.flip(0), -representation)
        with model.disable_adapter(), torch.no_grad():
            model(ids)
        loss.backward()
    left, right = gradients(plain), gradients(checkpointed)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-9, atol=1e-12)


def test_reentrant_checkpointing_is_refused():
    model = trained().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    ids, representation = inputs()
    with pytest.raises(ValueError, match="needs non-reentrant gradient checkpointing"):
        loss_of(model, ids, representation)


def test_no_representation_is_an_error_and_no_earlier_one_is_used():
    model = trained()
    ids, representation = inputs()
    for call in (model, model.get_base_model(), model.get_base_model().model):
        model(ids, representation=representation)
        with pytest.raises(ValueError, match="RecLoRA is active but got no representation") as error:
            call(ids)
        assert "\n" not in str(error.value)
        with pytest.raises(IndexError):  # a forward that fails half-way leaves nothing behind either
            model(ids + 1000, representation=representation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"representation": torch.zeros(3, D + 1)}, "representation is 6 wide, wanted 5"),
        ({"representation": torch.zeros(2, D)}, r"representation has 2 rows, .* shape \[3, 7, 16\]"),
        ({"representation": torch.zeros(1, D)}, "representation has 1 rows"),
        ({"representation": torch.zeros(3, 1, D)}, r"shape \[3, 1, 5\] without segments"),
        (
            {"representation": torch.zeros(3, D), "segments": torch.zeros(3, 7, dtype=torch.long)},
            r"shape \[3, 5\] with segments",
        ),
        (
            {"representation": torch.zeros(3, 2, D), "segments": torch.zeros(3, 6, dtype=torch.long)},
            r"segments has shape \[3, 6\], wanted \[3, 7\]",
        ),
        ({"segments": torch.zeros(3, 7, dtype=torch.long)}, "segments without representation"),
    ],
)
def test_wrong_shapes_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        trained()(inputs()[0], **arguments)
    assert "\n" not in str(error.value)


def test_wrong_modules_are_refused_in_one_line():
    with pytest.raises(
        ValueError, match="'query' is not in the model; its linear modules are: down_proj"
    ) as error:
        get_peft_model(tiny_lm(), config(target_modules=["q_proj", "query"]))
    assert "\n" not in str(error.value)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"'transformer.h.0.attn.c_attn' is a Conv1D, RecLoRA adapts"):
        get_peft_model(gpt2, config(target_modules=["c_attn"]))
    with pytest.raises(ValueError, match="adapter 'other' is unknown; name one of: default"):
        trained().alpha(inputs()[1], "other")


def test_merging_is_refused_and_names_the_export():
    model = trained()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="export_user"):
            merge()


def test_unload_gives_the_lm_back():
    model = trained()
    ids, representation = inputs()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(ids, representation=representation)
    lm = model.unload()
    assert torch.equal(lm(ids).logits, tiny_lm()(ids).logits)
    assert not any(isinstance(module, RecLoraLinear) for module in lm.modules())
    assert "prepare_inputs_for_generation" not in vars(lm)
    assert not lm._forward_pre_hooks
    assert not lm._forward_hooks
    assert get_peft_model(lm, config())(ids, representation=representation).logits.shape == (3, 7, 40)


def test_a_copy_is_independent():
    model = trained()
    ids, representation = inputs()
    expected = model(ids, representation=representation).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids, representation=representation).logits, expected)
    perturb(model, seed=9)
    assert torch.equal(twin(ids, representation=representation).logits, expected)
    assert not torch.equal(model(ids, representation=representation).logits, expected)
