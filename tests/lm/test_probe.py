"""Which LMs share a prompt among titles, found out by a small example; the others score right too."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from recllm.lm.layout import ADDITIVE, SEPARATE, SHARED, title_batch
from recllm.lm.logprobs import title_logps
from recllm.lm.probe import find_layout
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
