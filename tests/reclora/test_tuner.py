"""What PEFT's own tests ask of every tuner: added, deleted, merged, saved, in any dtype, compiled."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from recllm.reclora import RecLoraConfig, RecLoraLinear

D = 5


def tiny_lm(dtype=torch.float64, layers=2):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).to(dtype).eval()


def config(**arguments):
    return RecLoraConfig(**({"r": 2, "num_meta": 3, "representation_dim": D, "gate_hidden": 6} | arguments))


def trained(lm=None, **arguments):
    model = get_peft_model(tiny_lm() if lm is None else lm, config(**arguments)).eval()
    return perturbed(model)


def perturbed(model, seed=1, names=""):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "reclora_" in name and names in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def inputs(batch=3, seq=7):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 40, (batch, seq), generator=generator)
    return ids, torch.randn(batch, D, generator=generator, dtype=torch.float64)


def logits(model):
    ids, representation = inputs()
    return model(ids, representation=representation).logits


# Every kind of state that an adapter can have: gate shared or per module, start, soft prompt, or no gate.
VARIANTS = [
    {},
    {"gate": "module", "init": "pissa", "mixture": "factor"},
    {"mixture": "core", "soft_prompt": 2},
    {"gate_input": "none", "init": "milora"},
]


@pytest.mark.parametrize("arguments", VARIANTS)
@pytest.mark.parametrize("safe", [True, False])
def test_saved_and_loaded_to_the_bit(tmp_path, arguments, safe):
    model = trained(**arguments)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    loaded = PeftModel.from_pretrained(tiny_lm(), str(tmp_path))
    own, other = (get_peft_model_state_dict(m) for m in (model, loaded))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert not any("base_layer" in name or "default" in name for name in own)
    assert torch.equal(logits(model), logits(loaded))


def test_weights_that_are_not_contiguous_are_saved_as_they_are(tmp_path):
    model = trained()
    for _, layer in model.base_model.layers("default"):
        for weight in (layer.reclora_A["default"], layer.reclora_B["default"]):
            weight.data = weight.data.T.contiguous().T
            assert not weight.is_contiguous()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_lm(), str(tmp_path))), logits(model))


def test_adapters_are_saved_apart_and_one_is_chosen(tmp_path):
    model = trained()
    model.add_adapter("second", config(mixture="core", init="milora", soft_prompt=1))
    model.set_adapter("second")
    perturbed(model, 4, "second")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["second"]
    assert not any("default" in n for n in load_file(tmp_path / "second" / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(tiny_lm(), str(tmp_path / "second"))
    assert torch.equal(logits(loaded), expected)
    model.load_adapter(str(tmp_path / "second"), adapter_name="third")  # beside the others
    model.set_adapter("third")
    assert torch.equal(logits(model), expected)


def test_deleting_leaves_the_others_as_they_were():
    model = trained()
    expected = logits(model)
    model.add_adapter("second", config(gate="module", init="pissa", soft_prompt=2))
    model.delete_adapter("second")  # not active
    assert torch.equal(logits(model), expected)
    model.add_adapter("second", config(gate="module", init="pissa", soft_prompt=2))
    model.set_adapter("second")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says which adapter is active now
        model.delete_adapter("second")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), expected)
    assert not any("second" in name for name, _ in model.named_parameters())
    assert not any("second" in name for name, _ in model.named_buffers())
    for module in model.modules():
        if isinstance(module, RecLoraLinear):
            assert set(module.configs) == set(module.gate_index) == {"default"}
    with pytest.raises(ValueError, match="second does not exist"):
        model.delete_adapter("second")


def test_two_active_adapters_add_up():
    """One module, so that the second does not change what the first one reads."""
    lm = tiny_lm(layers=1)
    model = trained(lm, target_modules=["v_proj"])
    model.add_adapter("second", config(mixture="factor", target_modules=["v_proj"]))
    perturbed(model, 4, "second")
    layer = model.base_model.layers("default")[0][1]
    seen = {}
    layer.register_forward_hook(lambda module, args, output: seen.update(y=output.detach()))
    outputs = {}
    for active in ("default", "second", ["default", "second"]):
        model.base_model.set_adapter(active)
        logits(model)
        outputs[str(active)] = seen["y"]
    with model.disable_adapter():
        logits(model)
    together = outputs["default"] + outputs["second"] - seen["y"]
    torch.testing.assert_close(outputs["['default', 'second']"], together, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arguments", [{}, {"init": "milora", "mixture": "factor"}, {"init": "pissa"}])
def test_without_a_gate_it_merges_and_unmerges(arguments):
    model = trained(gate_input="none", **arguments)
    expected, base = logits(model), tiny_lm()(inputs()[0]).logits
    assert (expected - base).abs().max() > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)
    assert (tiny_lm().model.layers[0].self_attn.q_proj.weight - merged_weight(model)).abs().max() > 1e-4
    with model.disable_adapter():  # takes the update off
        torch.testing.assert_close(logits(model), base, rtol=1e-9, atol=1e-9)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)
    lm = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, RecLoraLinear) for module in lm.modules())
    torch.testing.assert_close(lm(inputs()[0]).logits, expected, rtol=1e-9, atol=1e-9)
    assert not lm._forward_pre_hooks


def merged_weight(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight


def test_a_gate_cannot_be_merged_and_nothing_is_changed():
    model = trained()
    model.add_adapter("prompted", config(gate_input="none", soft_prompt=1))
    expected = logits(model)
    for arguments in ({}, {"adapter_names": ["prompted"]}):
        with pytest.raises(ValueError, match=r"cannot be merged; .*export_user") as error:
            model.merge_and_unload(**arguments)
        assert "\n" not in str(error.value)
    assert torch.equal(logits(model), expected)
    infinite = trained(gate_input="none")
    infinite.base_model.layers("default")[0][1].reclora_B["default"].data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        infinite.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("arguments", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_dtypes(arguments, dtype):
    """Adapters of a 16-bit LM are float32, or the LM's where that is asked for; the output has the LM's."""
    for autocast in (True, False):
        model = get_peft_model(tiny_lm(dtype), config(**arguments), autocast_adapter_dtype=autocast).eval()
        perturbed(model)
        layer = model.base_model.layers("default")[0][1]
        dtypes = {value.dtype for name, value in layer.state_dict().items() if "reclora_" in name}
        assert dtypes == {torch.float32 if autocast else dtype}
        heads = (*model.base_model.reclora_gate.values(), *model.base_model.reclora_prompt.values())
        assert all(p.dtype == torch.float32 for head in heads for p in head.parameters())
        output = logits(model)
        assert output.dtype == dtype
        exact = logits(model.float())
        assert (output.float() - exact).abs().max() < 0.06 * exact.abs().max()


def test_injection_alone_is_refused_since_gates_lie_on_the_tuner():
    with pytest.raises(ValueError, match="shared"):
        inject_adapter_in_model(config(), tiny_lm())


def test_training_is_switched_for_all_parts_of_an_adapter():
    model = trained(init="pissa", soft_prompt=1)
    total = sum(p.numel() for name, p in model.named_parameters() if "reclora_" in name)
    assert model.get_nb_trainable_parameters()[0] == total > 0
    model.set_requires_grad("default", False)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.set_requires_grad("default", True)
    assert model.get_nb_trainable_parameters()[0] == total


@pytest.mark.parametrize("arguments", [{"gate": "module", "init": "pissa"}, {"soft_prompt": 2}])
def test_compiled_in_one_graph(arguments):
    torch._dynamo.reset()
    model = trained(tiny_lm(layers=1), **arguments)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids, representation = inputs()
    expected = model(ids, representation=representation).logits
    torch.testing.assert_close(
        compiled(ids, representation=representation).logits, expected, rtol=1e-9, atol=1e-9
    )
    # The gate is no constant of the graph.
    other = compiled(ids, representation=representation.flip(0)).logits
    assert (other - expected).abs().max() > 1e-4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("arguments", [{}, {"init": "milora"}, {"init": "pissa", "soft_prompt": 2}])
def test_quantized_bases(bits, arguments, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path)
    kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    quantization = BitsAndBytesConfig(**kind)
    lm = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.bfloat16)
    ids, representation = (value.to(device) for value in inputs())
    model = get_peft_model(lm, config(**arguments))

    @torch.no_grad()  # with gradients, 4-bit layers multiply in another way
    def output():
        return model(ids, representation=representation).logits

    with model.disable_adapter():
        base = output()
    if "soft_prompt" not in arguments:
        assert torch.equal(output(), base)
    if bits == 8 or device == "cuda":  # on a CPU, bitsandbytes passes no gradient through 4-bit layers
        model(ids, representation=representation).logits.float().square().mean().backward()
        assert model.base_model.layers("default")[0][1].reclora_B["default"].grad.abs().max() > 0
    perturbed(model)
    assert (output() - base).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(output(), base)
    ungated = get_peft_model(model.unload(), config(gate_input="none"))
    with pytest.raises(ValueError, match="cannot be merged into quantized weights"):
        ungated.merge_adapter()


def tied_lm():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    lm = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True))
    return lm.to(torch.float64).eval()


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_tied_head_is_not_merged_and_nothing_is_changed(merge):
    modules = ["q_proj", "lm_head"]
    model = trained(tied_lm(), gate_input="none", target_modules=modules)
    expected = logits(model)
    with pytest.raises(
        ValueError, match=r"'lm_head' cannot be merged, it is tied to 'model.embed_tokens'.*untie"
    ) as error:
        getattr(model, merge)()
    assert "\n" not in str(error.value)
    assert torch.equal(logits(model), expected)
    # Untied, or with other targets, it merges and stays the same model.
    for lm, targets in ((tiny_lm(), modules), (tied_lm(), ["q_proj"])):
        model = trained(lm, gate_input="none", target_modules=targets)
        expected = logits(model)
        torch.testing.assert_close(model.merge_and_unload()(inputs()[0]).logits, expected)


@pytest.mark.parametrize("arguments", [{}, {"soft_prompt": 2}])
def test_behind_a_deleted_adapter_the_next_one_trains_whole(arguments):
    model = trained(**arguments)
    model.add_adapter("b", config(**arguments))
    model.add_adapter("c", config(**arguments))
    model.delete_adapter("c")  # not the active one: nothing changes
    free = {name for name, value in model.named_parameters() if value.requires_grad}
    assert free
    assert all(".default" in name for name in free)
    model.delete_adapter("default")
    assert model.active_adapters == ["b"]
    free = {name for name, value in model.named_parameters() if value.requires_grad}
    assert free == {name for name, _ in model.named_parameters() if "reclora_" in name}
    assert any("reclora_gate" in name for name in free)


def test_positions_that_are_kept_by_a_tensor_have_their_own_gates():
    model = trained(target_modules=["q_proj", "lm_head"])
    ids, _ = inputs(batch=1)
    representation = torch.randn(1, 2, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    packed = {"representation": representation, "segments": torch.tensor([[0, 0, 0, 1, 1, 1, 1]])}
    whole = model(ids, **packed).logits
    for kept in (torch.tensor([0, 3]), torch.tensor([5, 1, 2]), torch.tensor([6])):
        torch.testing.assert_close(model(ids, **packed, logits_to_keep=kept).logits, whole[:, kept])
    torch.testing.assert_close(model(ids, **packed, logits_to_keep=3).logits, whole[:, -3:])


def test_arguments_that_would_be_dropped_are_refused():
    """PEFT's LoRA knows them; here all rows would get the active adapter, or R not reach a forward."""
    model = trained()
    model.add_adapter("second", config())
    ids, representation = inputs()
    expected = logits(model)
    cases = [
        (lambda: model(ids, representation=representation, adapter_names=["default", "second", "default"]),
         r"adapter_names=\['default', 'second', 'default'\] is not known.*set_adapter"),
        (lambda: model.generate(ids, representation=representation, adapter_names=["second"] * 3),
         "adapter_names=.*set_adapter"),
        (lambda: model.generate(ids, representation=representation, guidance_scale=2.0),
         r"guidance_scale=2.0 runs the LM a second time without a representation.*leave guidance_scale out"),
        (lambda: model.generate(
            ids, representation=representation, generation_config=GenerationConfig(guidance_scale=1.5)),
         "guidance_scale=1.5 runs"),
        (lambda: model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both"),
         "add_weighted_adapter is not known.*activate several"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert torch.equal(logits(model), expected)
    options = {"max_new_tokens": 2, "pad_token_id": 0, "do_sample": False}
    model.generate(ids, representation=representation, guidance_scale=1, **options)
    with model.disable_adapter():  # the LM alone may be guided
        model.generate(ids, guidance_scale=2.0, **options)
    trained(gate_input="none").generate(ids, guidance_scale=2.0, **options)


def test_layers_are_chosen_by_their_numbers(tmp_path):
    model = trained(layers_to_transform=[1])
    names = [name for name, _ in model.base_model.layers("default")]
    assert names == [f"model.layers.1.self_attn.{name}" for name in ("q_proj", "v_proj")]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_lm(), str(tmp_path))), logits(model))
    pattern = trained(layers_to_transform=0, layers_pattern="layers")
    assert len(pattern.base_model.layers("default")) == 2
    for wrong, message in (
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "with the regular expression"),
        ({"layers_pattern": "layers"}, "without layers_to_transform"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            config(**wrong)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", [{}, {"soft_prompt": 2}, {"gate_input": "none"}])
def test_the_head_of_a_classifier_trains_and_is_saved(tmp_path, arguments):
    def classifier(seed):
        torch.manual_seed(seed)
        sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        lm_config = LlamaConfig(**sizes, num_attention_heads=4, num_labels=3, pad_token_id=0)
        lm = LlamaForSequenceClassification(lm_config).to(torch.float64).eval()
        torch.manual_seed(0)
        for name, value in lm.named_parameters():
            if "score" not in name:  # the LM is known, its new head is drawn anew in each process
                value.data.normal_(0, 0.1)
        return lm

    ids, representation = inputs()
    model = get_peft_model(classifier(1), config(task_type="SEQ_CLS", **arguments)).eval()
    head = [name for name, value in model.named_parameters() if value.requires_grad and "score" in name]
    assert head == ["base_model.model.score.modules_to_save.default.weight"]
    perturbed(model)
    model(ids, representation=representation, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert model.get_parameter(head[0]).grad.abs().max() > 0
    model.get_parameter(head[0]).data += 1
    expected = logits(model)
    assert expected.shape == (3, 3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(classifier(2), str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-9, atol=1e-9)
