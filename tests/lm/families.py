"""Tiny random LMs of the families of transformers that docs/stage2.md promises."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from recllm.lm.layout import ADDITIVE, SEPARATE, SHARED

CONTEXT = 64
"""`lm.model.context` of the examples: windows below are shorter."""
WINDOW = 6


@dataclass(frozen=True)
class Family:
    """An LM of transformers, small.

    Attributes:
        model_type: Of its configuration.
        sizes: What its configuration is given.
        targets: Modules that an adapter takes.
        layout: In which its titles are scored, for `CONTEXT`.
    """

    model_type: str
    sizes: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    layout: str = SHARED

    def build(self, seed: int = 0) -> Any:
        """The LM in eval mode, float32, with weights that are large enough to tell right from wrong."""
        torch.manual_seed(seed)
        config = AutoConfig.for_model(self.model_type, **self.sizes)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for name, value in model.named_parameters():
                if value.dim() == 2 and "A_log" not in name:
                    value.normal_(0, 0.2)
        return model


BASE = {
    "vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
WIDE = BASE | {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
HEADS = WIDE | {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
HALVES = ["sliding_attention", "full_attention"]
MAMBA = {"vocab_size": 80, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
FALCON = {**BASE, "new_decoder_architecture": False, "ffn_hidden_size": 48}
GPT = {"vocab_size": 80, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}

FAMILIES = {
    "Llama": Family("llama", WIDE),
    "Llama-4": Family(
        "llama4_text",
        HEADS
        | {
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": WINDOW,
        },
        layout=SEPARATE,
    ),
    "Mistral": Family("mistral", WIDE | {"sliding_window": None}),
    "Mistral with a window": Family("mistral", WIDE | {"sliding_window": WINDOW}, layout=SEPARATE),
    "Ministral": Family(
        "ministral", HEADS | {"sliding_window": WINDOW, "layer_types": HALVES}, layout=SEPARATE
    ),
    "Mixtral": Family("mixtral", WIDE | {"num_local_experts": 4}),
    "Qwen2": Family("qwen2", WIDE),
    "Qwen3": Family("qwen3", HEADS),
    "Qwen3 with a window": Family(
        "qwen3",
        HEADS | {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": HALVES},
        layout=SEPARATE,
    ),
    "Qwen3-MoE": Family("qwen3_moe", HEADS | EXPERTS),
    "Qwen3-Next": Family(
        "qwen3_next",
        HEADS
        | EXPERTS
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 24,
        },
        ("q_proj", "v_proj", "out_proj"),
        layout=SEPARATE,
    ),
    "Gemma": Family("gemma", HEADS),
    "Gemma-2": Family(
        "gemma2",
        HEADS | {"sliding_window": WINDOW, "layer_types": HALVES, "query_pre_attn_scalar": 8},
        layout=SEPARATE,
    ),
    "Gemma-3": Family(
        "gemma3_text",
        HEADS | {"sliding_window": WINDOW, "layer_types": HALVES, "query_pre_attn_scalar": 8},
        layout=SEPARATE,
    ),
    "Phi": Family("phi", WIDE),
    "Phi-3": Family("phi3", WIDE | {"sliding_window": None}, ("qkv_proj",)),
    "Phi-3 with a window": Family("phi3", WIDE | {"sliding_window": WINDOW}, ("qkv_proj",), layout=SEPARATE),
    "GPT-2": Family("gpt2", GPT, ("lm_head",)),
    "GPT-Neo": Family(
        "gpt_neo",
        {
            "vocab_size": 80,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "window_size": WINDOW,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 128,
        },
        layout=SEPARATE,
    ),
    "GPT-NeoX": Family("gpt_neox", BASE | {"intermediate_size": 48}, ("query_key_value",)),
    "GPT-J": Family("gptj", GPT | {"rotary_dim": 4}, layout=ADDITIVE),
    "GPT-OSS": Family(
        "gpt_oss",
        HEADS
        | {"sliding_window": WINDOW, "layer_types": HALVES, "num_local_experts": 4, "num_experts_per_tok": 2},
        layout=SEPARATE,
    ),
    "OPT": Family("opt", BASE | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Falcon": Family("falcon", FALCON, ("query_key_value",)),
    "Falcon with ALiBi": Family("falcon", FALCON | {"alibi": True}, ("query_key_value",), layout=SEPARATE),
    "Falcon-H1": Family(
        "falcon_h1",
        HEADS
        | {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
            "lm_head_multiplier": 0.5,
        },
        layout=SEPARATE,
    ),
    "BLOOM": Family(
        "bloom",
        {"vocab_size": 80, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        ("query_key_value",),
        layout=SEPARATE,
    ),
    "MPT": Family(
        "mpt",
        {"vocab_size": 80, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
        ("Wqkv",),
        layout=SEPARATE,
    ),
    "OLMo-2": Family("olmo2", WIDE),
    "OLMo-3": Family("olmo3", WIDE | {"sliding_window": WINDOW, "layer_types": HALVES}, layout=SEPARATE),
    "SmolLM3": Family("smollm3", WIDE),
    "Granite": Family("granite", WIDE | {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "Cohere-2": Family(
        "cohere2",
        WIDE | {"sliding_window": WINDOW, "layer_types": HALVES, "logit_scale": 0.5},
        layout=SEPARATE,
    ),
    "StableLM": Family("stablelm", WIDE),
    "DeepSeek-V3": Family(
        "deepseek_v3",
        BASE
        | {
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "pad_token_id": 0,
        },
        ("q_b_proj", "kv_a_proj_with_mqa"),
    ),
    "Mamba": Family("mamba", MAMBA, ("in_proj", "out_proj"), layout=SEPARATE),
    "Mamba-2": Family(
        "mamba2",
        MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
        ("in_proj",),
        layout=SEPARATE,
    ),
    "Jamba": Family(
        "jamba",
        WIDE
        | {
            "num_experts": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        layout=SEPARATE,
    ),
    "LFM2": Family("lfm2", WIDE | {"layer_types": ["conv", "full_attention"]}, layout=SEPARATE),
}
