"""Which LMs share a prompt among titles, found out by a small example; the others score right too."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DogeConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
)

from recllm.lm.layout import ADDITIVE, SEPARATE, SHARED, title_batch
from recllm.lm.load import LmConfig, context_length
from recllm.lm.logprobs import title_logps
from recllm.lm.probe import attention_windows, find_layout
from recllm.text.collate import Ragged

BASE = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = BASE | {"intermediate_size": 24}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**WIDE), SHARED),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**WIDE, num_key_value_heads=1), SHARED),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2), SHARED),
    "opt": (OPTForCausalLM, OPTConfig(**BASE, ffn_dim=24, word_embed_proj_dim=16), SHARED),
    # Its attention adds the mask to its scores.
    "gptj": (
        GPTJForCausalLM,
        GPTJConfig(vocab_size=60, n_embd=16, n_layer=2, n_head=2, rotary_dim=4),
        ADDITIVE,
    ),
    # Distances from the attention mask, not positions; no attention; a window that a mask would replace.
    "bloom": (BloomForCausalLM, BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2), SEPARATE),
    "mamba": (MambaForCausalLM, MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2), SEPARATE),
    "mistral": (
        MistralForCausalLM,
        MistralConfig(**WIDE, num_key_value_heads=1, sliding_window=32),
        SEPARATE,
    ),
}


def model_of(name, dtype=torch.float32, scale=None):
    torch.manual_seed(0)
    kind, config, _ = KINDS[name]
    model = kind(config).eval().to(dtype)
    if scale:
        with torch.no_grad():
            for value in model.parameters():
                if value.dim() > 1:
                    value.normal_(0, scale)
    return model


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_layout_that_is_chosen_scores_as_one_by_one(name, scale):
    model = model_of(name, scale=scale)
    layout = find_layout(model, context=64)
    assert layout == KINDS[name][2]
    prompts, titles = [[3, 4, 5, 6], [7, 8]], [[9, 2], [9, 10, 2], [11, 2], [12, 13, 2]]
    with torch.no_grad():
        got = title_logps(
            model, title_batch(Ragged.from_lists(prompts), Ragged.from_lists(titles), 2, layout)
        )
        for number, title in enumerate(titles):
            prompt = prompts[number // 2]
            logits = model(input_ids=torch.tensor([prompt + title])).logits[0, len(prompt) - 1 : -1]
            wanted = logits.log_softmax(-1).gather(1, torch.tensor(title)[:, None]).sum()
            torch.testing.assert_close(got[number // 2, number % 2], wanted, rtol=1e-4, atol=1e-4)


def test_a_window_as_long_as_the_context_is_no_window():
    assert find_layout(model_of("mistral"), context=32) == SHARED


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sixteen_bits_are_told_from_a_wrong_mask(name):
    assert find_layout(model_of(name, torch.bfloat16, 0.3), context=64) == SHARED
    assert find_layout(model_of("bloom", torch.bfloat16, 0.3), context=64) == SEPARATE


def drawn(kind, config, dtype, scale, seed):
    """A random LM in eval mode; `scale` of its matrices, None: as it starts."""
    torch.manual_seed(seed)
    model = kind(config).eval().to(dtype)
    if scale:
        with torch.no_grad():
            for value in model.parameters():
                if value.dim() > 1:
                    value.normal_(0, scale)
    return model


FOUR = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
JAMBA = JambaConfig(**FOUR, num_experts=4, mamba_d_state=8, mamba_dt_rank=4, attn_layer_period=2,
                    attn_layer_offset=1, use_mamba_kernels=False, pad_token_id=0)  # fmt: skip
LFM2 = Lfm2Config(**FOUR, layer_types=["conv", "full_attention"] * 2)
MPT = MptConfig(vocab_size=200, d_model=32, n_heads=4, n_layers=4, max_seq_len=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize(
    ("kind", "config"), [(JambaForCausalLM, JAMBA), (Lfm2ForCausalLM, LFM2), (MptForCausalLM, MPT)]
)
def test_what_reaches_across_titles_below_rounding_is_seen(kind, config, scale, dtype):
    """A state, a convolution, distances off the row: these errors hid under a tolerance."""
    assert find_layout(drawn(kind, config, dtype, scale, 1), context=64) == SEPARATE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_round_together_and_still_share(dtype):
    config = MixtralConfig(**FOUR, num_local_experts=4)
    assert find_layout(drawn(MixtralForCausalLM, config, dtype, 0.1, 0), context=64) == SHARED


def gemma3(window):
    text = {**FOUR, "head_dim": 8, "sliding_window": window, "max_position_embeddings": 512}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})


def test_a_window_and_a_context_inside_the_text_part_are_seen():
    config = gemma3(window=64)
    assert attention_windows(config) == [64]
    assert context_length(LmConfig(), config) == 512
    with pytest.raises(ValueError, match=r"context is 513.*512"):
        context_length(LmConfig(context=513), config)
    model = drawn(Gemma3ForConditionalGeneration, config, torch.float32, 0.1, 0)
    assert find_layout(model, context=512) == SEPARATE
    assert find_layout(model, context=64) == SHARED


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (DogeConfig(keep_window_size=48), [48]),
        (GPTNeoConfig(window_size=32), [32]),
        (MistralConfig(sliding_window=16), [16]),
        (Qwen2Config(), []),  # `max_window_layers` counts layers
        (Qwen2VLConfig(), []),  # the windows are its eyes'
        (LlamaConfig(), []),
    ],
)
def test_windows_by_the_names_that_configurations_give_them(config, windows):
    assert attention_windows(config) == windows
