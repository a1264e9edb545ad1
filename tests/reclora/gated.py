"""A tiny LM with a RecLoRA whose weights matter, for tests of the tuner."""

import torch
from peft import get_peft_model
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from recllm.reclora import RecLoraConfig

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
N, R, D = 3, 2, 5  # meta-LoRAs, rank, width of the representation


def tiny_lm(dtype=torch.float64, family=LlamaForCausalLM):
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES) if family is Qwen2ForCausalLM else LlamaConfig(**SIZES)
    return family(config).to(dtype).eval()


def config(**arguments):
    return RecLoraConfig(
        **(
            {"r": R, "num_meta": N, "representation_dim": D, "gate_hidden": 6, "gate_temperature": 0.5}
            | arguments
        )
    )


def perturb(model, seed=1):
    """Gives every trainable parameter a value, as after some training."""
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
