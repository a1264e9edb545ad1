"""The soft prompt: virtual tokens at the embeddings, wherever a forward may come from."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from recllm.reclora import RecLoraConfig
from tests.lm.families import FAMILIES

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
D, M = 5, 3


def tiny_lm(family=LlamaForCausalLM):
    torch.manual_seed(0)
    sizes = Qwen2Config(**SIZES) if family is Qwen2ForCausalLM else LlamaConfig(**SIZES)
    return family(sizes).to(torch.float64).eval()


def prompted(trained=True, lm=None, **arguments):
    values = {"r": 2, "num_meta": 3, "representation_dim": D, "gate_hidden": 6, "soft_prompt": M}
    model = get_peft_model(lm or tiny_lm(), RecLoraConfig(**(values | arguments))).eval()
    if trained:
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def inputs(batch=3, seq=7):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 40, (batch, seq), generator=generator)
    return ids, torch.randn(batch, D, generator=generator, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", [LlamaForCausalLM, Qwen2ForCausalLM])
def test_tokens_are_put_before_the_prompt_and_taken_off_again(family):
    """Beside the LM's own forward with the same embeddings, with B zero: no update but the prompt."""
    model = prompted(trained=False, lm=tiny_lm(family), gate_input="none")
    head = model.base_model.reclora_prompt["default"]
    head.weight_2.data.normal_()
    ids, representation = inputs()
    tokens = head(representation[:, None])[:, 0]
    assert (tokens[0] - tokens[1]).abs().max() > 0.1
    lm = tiny_lm(family)
    embeds = torch.cat([tokens, lm.get_input_embeddings()(ids)], 1)
    expected = lm(inputs_embeds=embeds).logits[:, M:]
    output = model(ids, representation=representation, output_hidden_states=True)
    close(output.logits, expected)
    assert {states.shape[1] for states in output.hidden_states} == {ids.shape[1]}
    close(model(ids, representation=representation, logits_to_keep=1).logits, expected[:, -1:])
    embedded = lm.get_input_embeddings()(ids)
    close(model(inputs_embeds=embedded, representation=representation).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(ids, representation=representation).logits, lm(ids).logits)
        assert torch.equal(model(ids).logits, lm(ids).logits)
    with pytest.raises(ValueError, match="got no representation"):
        model(ids)


def test_left_padding_and_positions_change_nothing():
    model = prompted()
    ids, representation = inputs()
    expected = model(ids, representation=representation).logits
    mask = (torch.arange(11) >= 4).long().expand(3, -1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = F.pad(ids, (4, 0))
    logits = model(padded, attention_mask=mask, position_ids=positions, representation=representation).logits
    close(logits[:, 4:], expected)
    close(model(ids, position_ids=torch.arange(7)[None], representation=representation).logits, expected)


@pytest.mark.parametrize("additive", [False, True])
def test_a_4d_mask_is_extended(additive):
    """Two continuations behind one prefix in one row, blind to each other, equal two rows."""
    model = prompted()
    ids, representation = inputs(batch=1)
    one, two = ids[:, :5], torch.cat([ids[:, :3], ids[:, 5:]], 1)
    visible = torch.ones(7, 7, dtype=torch.bool).tril()
    visible[5:, 3:5] = False
    mask = visible[None, None]
    if additive:
        mask = torch.zeros(1, 1, 7, 7, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4]])
    logits = model(ids, attention_mask=mask, position_ids=positions, representation=representation).logits
    close(logits[:, :5], model(one, representation=representation).logits)
    close(logits[:, 5:], model(two, representation=representation).logits[:, 3:])


def test_packed_rows_equal_separate_ones():
    model = prompted(gate="module")
    ids, representation = inputs(batch=3, seq=5)
    separate = model(ids, representation=representation).logits
    segments = torch.tensor([0] * 5 + [1] * 5 + [2] * 3)
    arguments = {
        "representation": representation[None],
        "segments": segments[None],
        "position_ids": torch.cat([torch.arange(5), torch.arange(5), torch.arange(3)])[None],
    }
    packed = torch.cat([ids[0], ids[1], ids[2, :3]])[None]
    visible = (segments[:, None] == segments[None]) & torch.ones(13, 13, dtype=torch.bool).tril()
    logits = model(packed, attention_mask=visible[None, None], **arguments).logits
    close(logits[0, :5], separate[0])
    close(logits[0, 5:10], separate[1])
    close(logits[0, 10:], separate[2, :3])
    with pytest.raises(ValueError, match="pass attention_mask"):
        model(packed, **arguments)


def test_generate_equals_greedy_by_hand_with_padding_and_beams():
    model = prompted(lora_alpha=64)
    ids, representation = inputs()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # the first row is two tokens shorter
    ids = ids * mask
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 99}
    expected, seen = ids, mask
    for _ in range(5):
        positions = (seen.cumsum(-1) - 1).clamp(min=0)
        logits = model(
            expected, attention_mask=seen, position_ids=positions, representation=representation
        ).logits
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], 1)
        seen = F.pad(seen, (0, 1), value=1)
    for use_cache in (True, False):
        made = model.generate(
            ids, attention_mask=mask, representation=representation, use_cache=use_cache, **options
        )
        assert torch.equal(made, expected)
    other = model.generate(ids, attention_mask=mask, representation=representation.flip(0) * 5, **options)
    assert not torch.equal(other, expected)
    beams = options | {"num_beams": 3}
    together = model.generate(ids[1:], representation=representation[1:], **beams)
    for row in (1, 2):
        alone = model.generate(ids[row : row + 1], representation=representation[row : row + 1], **beams)
        assert torch.equal(alone, together[row - 1 : row])


def test_a_cache_of_something_else_and_a_block_mask_are_refused():
    model = prompted()
    ids, representation = inputs()
    with model.disable_adapter():
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the cache holds 7 tokens, which do not fit the soft prompt of 3"):
        model(
            ids[:, :1],
            attention_mask=torch.ones(3, 8),
            past_key_values=cache,
            representation=representation,
        )
    with pytest.raises(ValueError, match="representation has 2 rows"):
        model(ids, representation=representation[:2])
    mask = create_block_mask(lambda row, head, query, key: query >= key, 3, None, 7, 7, device="cpu")
    with pytest.raises(ValueError, match="cannot extend a BlockMask; wanted a tensor"):
        model(ids, attention_mask=mask, representation=representation)


@pytest.mark.parametrize("name", ["Llama", "Gemma-2"])
def test_a_static_cache_is_refused(name):
    """Its masks have places for tokens to come, which the virtual ones would take."""
    model = get_peft_model(
        FAMILIES[name].build(), RecLoraConfig(r=2, num_meta=2, representation_dim=D, soft_prompt=M)
    )
    ids, representation = inputs()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": 99}
    with pytest.raises(ValueError, match=r"static cache is given.*leave cache_implementation out") as error:
        model.generate(ids, representation=representation, cache_implementation="static", **options)
    assert "\n" not in str(error.value)
    model.generate(ids, representation=representation, **options)


def test_checkpointing_changes_nothing():
    plain, checkpointed = prompted(gate="module").train(), prompted(gate="module").train()
    checkpointed.get_base_model()._set_gradient_checkpointing(
        True, lambda *a, **k: torch.utils.checkpoint.checkpoint(*a, use_reentrant=False, **k)
    )
    ids, representation = inputs()
    grads = []
    for model in (plain, checkpointed):
        F.cross_entropy(model(ids, representation=representation).logits[:, -1], ids[:, 0]).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert any("reclora_prompt" in name and value.abs().max() > 0 for name, value in grads[0].items())
    for name, value in grads[0].items():
        torch.testing.assert_close(value, grads[1][name], rtol=1e-9, atol=1e-12)


def test_saved_loaded_added_and_deleted(tmp_path):
    model = prompted()
    model.set_statistics(torch.randn(D), torch.cov(torch.randn(D, 2 * D)))
    ids, representation = inputs()
    expected = model(ids, representation=representation).logits
    model.save_pretrained(tmp_path)
    for lean in (False, True):
        loaded = PeftModel.from_pretrained(tiny_lm(), str(tmp_path), low_cpu_mem_usage=lean)
        assert torch.equal(loaded(ids, representation=representation).logits, expected)
    model.add_adapter("plain", RecLoraConfig(r=2, num_meta=2, representation_dim=D))
    assert torch.equal(model(ids, representation=representation).logits, expected)
    model.set_adapter("plain")
    assert torch.equal(model(ids, representation=representation).logits, tiny_lm()(ids).logits)
    assert not any("reclora_prompt" in name for name, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert "default" not in model.base_model.reclora_prompt
    model.set_adapter("plain")
    assert torch.equal(model(ids, representation=representation).logits, tiny_lm()(ids).logits)


def test_no_padding_right_padding_and_positions_are_the_same_to_the_bit():
    model = prompted()
    ids, representation = inputs()
    expected = model(ids, representation=representation).logits
    ones = torch.ones_like(ids)
    assert torch.equal(model(ids, attention_mask=ones, representation=representation).logits, expected)
    positions = torch.arange(7)[None]
    assert torch.equal(model(ids, position_ids=positions, representation=representation).logits, expected)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 6 + [0]])
    padded = model(ids, attention_mask=mask, representation=representation).logits
    short = model(ids[1:2, :5], representation=representation[1:2]).logits
    close(padded[1:2, :5], short)


def test_a_row_of_padding_alone_and_labels():
    """All states come back to their own places, so that losses read what they should."""
    model = prompted()
    ids, representation = inputs()
    mask = torch.tensor([[0] * 7, [0] * 3 + [1] * 4, [1] * 7])
    arguments = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    arguments["labels"] = ids.masked_fill(mask == 0, -100)
    output = model(ids, representation=representation, output_hidden_states=True, **arguments)
    assert output.logits.isfinite().all()
    assert {states.shape[1] for states in output.hidden_states} == {7}
    short = model(ids[1:2, 3:], labels=ids[1:2, 3:], representation=representation[1:2])
    whole = model(ids[2:], labels=ids[2:], representation=representation[2:])
    close(output.logits[1:2, 3:], short.logits)
    # Three tokens of the second row are predicted (and its first, off its padding), six of the third.
    first = F.cross_entropy(output.logits[1, 2], ids[1, 3])
    expected = (3 * short.loss + first + 6 * whole.loss) / 10
    assert float(output.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_a_prompt_in_chunks_and_a_cropped_cache():
    model = prompted(lora_alpha=64)
    ids, representation = inputs()
    mask = torch.tensor([[0] * 4 + [1] * 3, [1] * 7, [0] + [1] * 6])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 99}
    arguments = {"attention_mask": mask, "representation": representation, **options}
    expected = model.generate(ids, **arguments)
    # The first row's first chunk is all padding: its virtual tokens stand there, and stay where they are.
    for size in (2, 3, 5):
        assert torch.equal(model.generate(ids, prefill_chunk_size=size, **arguments), expected)
    one = {"representation": representation[1:2], **options}
    assert torch.equal(
        model.generate(ids[1:2], prompt_lookup_num_tokens=2, **one), model.generate(ids[1:2], **one)
    )


def test_an_lm_that_passes_the_soft_prompt_by_is_an_error():
    model = prompted()
    ids, representation = inputs()
    lm = model.get_base_model()
    decoder = lm.get_decoder().forward
    lm.forward = lambda input_ids, **kwargs: lm.lm_head(decoder(input_ids).last_hidden_state)
    with pytest.raises(
        ValueError, match="the soft prompt was not read: LlamaForCausalLM does not call Ll"
    ) as error:
        model.base_model(ids, representation=representation)
    assert "\n" not in str(error.value)
    with model.disable_adapter():
        model.base_model(ids)
    assert model.base_model._current_gates.state is None


def test_lms_that_cannot_read_virtual_tokens_are_refused_before_anything_changes(monkeypatch):
    lm = tiny_lm()
    config = RecLoraConfig(r=2, num_meta=2, representation_dim=D, soft_prompt=M)
    names = list(lm.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(type(lm.model), "forward", lambda self, input_ids, attention_mask=None: None)
        with pytest.raises(
            ValueError, match=r"soft_prompt=3: LlamaModel takes no inputs_embeds.*soft_prompt=0"
        ) as error:
            get_peft_model(lm, config)
        assert "\n" not in str(error.value)
    lm.config.hidden_size_per_layer_input = 8  # as Gemma-3n and Gemma-4
    with pytest.raises(ValueError, match=r"reads token ids in every layer.*soft_prompt=0"):
        get_peft_model(lm, config)
    assert list(lm.state_dict()) == names
    get_peft_model(lm, RecLoraConfig(r=2, num_meta=2, representation_dim=D))


def test_arguments_with_a_place_for_every_token_are_not_left_short():
    model = prompted()
    ids, representation = inputs()
    with pytest.raises(ValueError, match=r"cannot extend token_type_ids \[3, 7\]; leave it out"):
        model(ids, representation=representation, token_type_ids=torch.zeros_like(ids))
    with pytest.raises(ValueError, match="leave return_dict out"):
        model.get_decoder()(ids, representation=representation, return_dict=False)
