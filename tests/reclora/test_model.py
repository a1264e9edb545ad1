"""The tuner: training, checkpointing, saving, adapters side by side, packing, generation, errors."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from recllm.reclora import RecLoraConfig, RecLoraLinear

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
D = 5
ROOT = Path(__file__).parents[2]


def tiny_lm(dtype=torch.float64, family=LlamaForCausalLM):
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES) if family is Qwen2ForCausalLM else LlamaConfig(**SIZES)
    return family(config).to(dtype).eval()


def config(**arguments):
    return RecLoraConfig(
        **(
            {"r": 2, "num_meta": 3, "representation_dim": D, "gate_hidden": 6, "gate_temperature": 0.5}
            | arguments
        )
    )


def perturb(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def trained(**arguments):
    return perturb(get_peft_model(tiny_lm(), config(**arguments)))


def inputs(batch=3, seq=7):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 40, (batch, seq), generator=generator)
    return ids, torch.randn(batch, D, generator=generator, dtype=torch.float64)


def loss_of(model, ids, representation):
    return F.cross_entropy(model(ids, representation=representation).logits[:, -1], ids[:, 0])


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


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


RELOAD = """
import sys, torch
from peft import PeftModel
from transformers import LlamaForCausalLM
import recllm.reclora
base, adapter, batch, out = sys.argv[1:]
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base, dtype=torch.float64), adapter).eval()
ids, representation = torch.load(batch)
logits = model(ids, representation=representation).logits
torch.save((logits.detach(), model.alpha(representation).detach()), out)
"""


@pytest.mark.parametrize("gate", ["shared", "module"])
def test_saved_and_loaded_is_exact_in_a_fresh_process(tmp_path, gate):
    model = trained(gate=gate)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(2 * D, D, generator=generator)
    model.set_statistics(torch.randn(D, generator=generator), torch.cov(rows.T))
    ids, representation = inputs()
    model.save_pretrained(tmp_path / "adapter")
    tiny_lm().save_pretrained(tmp_path / "base")
    torch.save((ids, representation), tmp_path / "batch.pt")
    paths = [str(tmp_path / name) for name in ("base", "adapter", "batch.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", RELOAD, *paths], check=True, cwd=ROOT)
    logits, alpha = torch.load(tmp_path / "out.pt")
    assert torch.equal(alpha, model.alpha(representation))
    assert torch.equal(logits, model(ids, representation=representation).logits)
    model.set_statistics(torch.zeros(D), torch.eye(D))
    assert not torch.equal(alpha, model.alpha(representation))  # so the statistics were in the file


def test_saved_keys_name_no_adapter_and_loading_takes_any_name(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    gate = ("weight_1", "bias_1", "norm_weight", "norm_bias", "weight_2", "bias_2", "mean", "whiten")
    assert set(saved) == {f"base_model.reclora_gate.{name}" for name in gate} | {
        f"base_model.model.model.layers.{layer}.self_attn.{m}.reclora_{x}"
        for layer in (0, 1) for m in ("q_proj", "v_proj") for x in "AB"
    }  # fmt: skip
    ids, representation = inputs()
    expected = model(ids, representation=representation).logits
    for lean in (False, True):  # lean: weights made on the meta device, then filled
        loaded = PeftModel.from_pretrained(
            tiny_lm(), str(tmp_path), adapter_name="user", low_cpu_mem_usage=lean
        )
        assert torch.equal(loaded(ids, representation=representation).logits, expected)
        assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(tiny_lm(), str(tmp_path), is_trainable=True)
    assert sum(p.requires_grad for p in trainable.parameters()) == sum(
        p.requires_grad for p in model.parameters()
    )


def test_disabled_adapter_is_the_base_with_and_without_representation():
    model = trained()
    ids, representation = inputs()
    base = tiny_lm()(ids).logits
    before = model(ids, representation=representation).logits
    assert (before - base).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids, representation=representation).logits, base)
    assert torch.equal(model(ids, representation=representation).logits, before)


def test_adapters_side_by_side_have_their_own_gates():
    first, second = trained(), perturb(get_peft_model(tiny_lm(), config(num_meta=2, gate="module")), seed=5)
    model = trained()
    model.add_adapter("second", config(num_meta=2, gate="module", target_modules=["k_proj", "v_proj"]))
    ids, representation = inputs()
    assert torch.equal(
        model(ids, representation=representation).logits, first(ids, representation=representation).logits
    )
    assert all("second" not in name for name, p in model.named_parameters() if p.requires_grad)
    assert any("gate.default" in name for name, p in model.named_parameters() if p.requires_grad)
    model.delete_adapter("second")

    model.add_adapter("second", config(num_meta=2, gate="module"))
    model.set_adapter("second")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all("second" in name for name in names)
    for name, parameter in model.named_parameters():
        if "second" in name:
            parameter.data = second.get_parameter(name.replace("second", "default")).data
    assert torch.equal(
        model(ids, representation=representation).logits, second(ids, representation=representation).logits
    )
    assert model.alpha(representation).shape == (3, 4, 2)
    assert model.alpha(representation, "default").shape == (3, 3)
    model.set_adapter("default")
    assert torch.equal(
        model(ids, representation=representation).logits, first(ids, representation=representation).logits
    )


def test_loading_a_frozen_adapter_beside_leaves_the_trained_one_trainable(tmp_path):
    model = trained()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), adapter_name="reference")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    ids, representation = inputs()
    expected = model(ids, representation=representation).logits
    model.set_adapter("reference")
    assert torch.equal(model(ids, representation=representation).logits, expected)


HEAD = {"target_modules": ["v_proj", "lm_head"]}


@pytest.mark.parametrize("modules", [{}, HEAD])
def test_packed_rows_equal_separate_ones(modules):
    model = trained(gate="module", **modules)
    ids, representation = inputs(batch=3, seq=5)
    separate = model(ids, representation=representation).logits
    packed_ids = torch.cat([ids[0], ids[1], ids[2, :3]])[None].expand(2, -1)
    segments = torch.tensor([0] * 5 + [1] * 5 + [2] * 3)
    position_ids = torch.cat([torch.arange(5), torch.arange(5), torch.arange(3)])
    visible = (segments[:, None] == segments[None]) & torch.ones(13, 13, dtype=torch.bool).tril()
    arguments = {
        "attention_mask": visible[None, None].expand(2, 1, -1, -1),
        "position_ids": position_ids[None].expand(2, -1),
    }
    # The second row names its segments in another order: each row has its own set.
    logits = model(
        packed_ids,
        representation=torch.stack([representation, representation[[1, 2, 0]]]),
        segments=torch.stack([segments, (segments + 2) % 3]),
        **arguments,
    ).logits
    last = model(
        packed_ids, representation=representation.expand(2, -1, -1), segments=segments.expand(2, -1),
        logits_to_keep=3, **arguments,
    ).logits  # fmt: skip
    close(last, separate[2:, :3].expand(2, -1, -1))
    for row in range(2):
        close(logits[row, :5], separate[0])
        close(logits[row, 5:10], separate[1])
        close(logits[row, 10:], separate[2, :3])


def test_a_head_is_adapted_where_a_later_adapter_is_the_first_to_name_it():
    model, (ids, representation) = trained(), inputs()
    model.add_adapter("head", config(**HEAD))
    model.add_adapter("again", config(**HEAD))
    model.set_adapter("head")
    head = model.get_output_embeddings()
    assert len(head._forward_pre_hooks) == 1  # of the model, though two adapters have the head
    base = tiny_lm()(ids).logits
    close(model(ids, representation=representation).logits, base)
    perturb(model)
    assert (model(ids, representation=representation).logits - base).abs().max() > 1e-2
    model.set_adapter("default")
    assert not torch.equal(model(ids, representation=representation).logits, base)


def test_left_padding_changes_nothing():
    model = trained()
    ids, representation = inputs()
    padded = F.pad(ids, (4, 0))
    mask = (torch.arange(11) >= 4).long().expand(3, -1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions, representation=representation).logits
    close(logits[:, 4:], model(ids, representation=representation).logits)


@pytest.mark.parametrize("modules", [{}, HEAD])
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_generate_equals_greedy_by_hand(task_type, modules):
    model = trained(task_type=task_type, lora_alpha=64, **modules)
    ids, representation = inputs()
    expected = ids
    for _ in range(6):
        logits = model(expected, representation=representation).logits
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 99}
    for use_cache in (True, False):
        assert torch.equal(
            model.generate(ids, representation=representation, use_cache=use_cache, **options), expected
        )
    other = model.generate(ids, representation=representation.flip(0) * 5, **options)
    assert not torch.equal(other, expected)
    with pytest.raises(ValueError, match="no representation"):
        model.generate(ids, **options)
    with model.disable_adapter():
        assert torch.equal(model.generate(ids, **options), tiny_lm().generate(ids, **options))


def test_beams_and_returned_sequences_keep_their_rows_gate():
    model = trained(lora_alpha=64)
    ids, representation = inputs()
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": 99}
    together = model.generate(ids, representation=representation, num_return_sequences=2, **options)
    assert together.shape[0] == 6
    for row in range(3):
        alone = model.generate(
            ids[row : row + 1],
            representation=representation[row : row + 1],
            num_return_sequences=2,
            **options,
        )
        assert torch.equal(together[2 * row : 2 * row + 2], alone)


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
