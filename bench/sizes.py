"""What tuning an LM of any size needs, by arithmetic, and how right the arithmetic is: `make bench-sizes`.

Memory of a forward that trains is `recllm.training.micro_batches.token_bytes` a token; a token costs four
operations a weight, two in the forward and two in the gradient of the inputs, as the LM is frozen. `measured`
holds both against a step of RecLoRA with random Llamas of three sizes, each in a process of its own: bytes a
token are the slope between two lengths of a forward, and the share of the processor's speed is over that of
one large product of matrices in the same process. `calculated` is the same arithmetic for LMs that fit no
machine here, on GPUs of 80 GB; the speed that it takes for granted is a published one, not ours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig, Qwen3Config

from bench.clock import REPOSITORY, keep
from bench.lm import NUM_META, TARGETS, Batch, R, adapter_config, prompts, tuning
from bench.stage2 import grown
from recllm.training.micro_batches import MEMORY_SHARE, token_bytes
from recllm.training.precision import training_precision

MEASURED: dict[str, dict[str, Any]] = {
    "1 M": {
        "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4,
        "vocab_size": 6_144,
    },
    "25 M": {
        "hidden_size": 384, "intermediate_size": 1_024, "num_hidden_layers": 10, "num_attention_heads": 6,
        "vocab_size": 16_000,
    },
    "135 M": {
        "hidden_size": 576, "intermediate_size": 1_536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49_152,
    },
}  # fmt: skip
"""Llamas of random weights; the last one has SmolLM2-135M's shape."""
CALCULATED: dict[str, PretrainedConfig] = {
    "Qwen3 0.6 B": Qwen3Config(
        hidden_size=1_024, intermediate_size=3_072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, vocab_size=151_936, tie_word_embeddings=True,
    ),
    "Llama 7 B": LlamaConfig(vocab_size=32_000),
    "Llama 70 B": LlamaConfig(
        hidden_size=8_192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128_256,
    ),
}  # fmt: skip
GPU_BYTES, GPU_FLOPS, UTILIZATION = 80e9, 989e12, 0.4
"""Of an H100: memory, bf16 products a second, and the share of them that LoRA training was published to reach
(402 of 989 TFLOP/s, Llama-3 8B, NVIDIA NeMo Automodel)."""
ROWS, TOKENS, BATCH_SIZE = 70_000, 281, 128
"""The paper's tuning rows and batch; tokens of a MovieLens-1M prompt with SmolLM2's tokenizer, on average."""
SHORT, LONG = 1_000, 3_000
"""Tokens of the two forwards between which a token's bytes are measured."""


def linear_weights(model: torch.nn.Module) -> int:
    """Weights of linear layers, the LM head's left out: it runs at the answer only."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return sum(layer.weight.numel() for layer in layers)


def adapter_weights(model: torch.nn.Module) -> int:
    """Weights of RecLoRA's meta-LoRAs; the gate is small beside them."""
    named = [m for name, m in model.named_modules() if name.rpartition(".")[2] in TARGETS]
    return sum(R * NUM_META * sum(module.weight.shape) for module in named)  # type: ignore[arg-type]


def calculate(config: PretrainedConfig, gpus: int) -> dict[str, Any]:
    """How an LM is tuned on so many GPUs of 80 GB: what fits, the tokens of a forward, hours."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = sum(value.numel() for value in model.parameters())
    linear = linear_weights(model)
    whole = 2 * weights
    four_bit = 0.55 * linear + 2 * (weights - linear)  # half a byte, and a scale for every 64 weights
    trained = 16 * adapter_weights(model)  # weight, gradient, and Adam's two, float32 each
    if whole + trained < 0.6 * GPU_BYTES:
        way, held = "ddp" if gpus > 1 else "bf16", whole
    elif gpus > 1:
        way, held = "sharded", whole / gpus
    else:
        way, held = "4bit", four_bit
    free = GPU_BYTES - held - trained
    each = token_bytes(model)
    budget = int(MEMORY_SHARE * free / each)
    step = BATCH_SIZE * TOKENS / gpus
    seconds = ROWS * TOKENS * 4 * linear / (UTILIZATION * GPU_FLOPS * gpus)
    return {
        "weights": weights,
        "way": way,
        "held_gb": (held + trained) / 1e9,
        "bytes_a_token": each,
        "tokens_a_forward": budget,
        "forwards_a_step": max(1, round(step / budget + 0.5)) if step > budget else 1,
        "hours": seconds / 3600,
    }


def product_speed() -> float:
    """Multiplications and additions a second, in bf16 and CPU time, of a product of large matrices."""
    first = torch.randn(2_048, 2_048, dtype=torch.bfloat16)
    first @ first
    begin = time.process_time()
    for _ in range(8):
        first @ first
    return float(8 * 2 * 2_048**3 / (time.process_time() - begin))


def measure(name: str) -> dict[str, float]:
    """A step of RecLoRA of one of `MEASURED`, in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    lm = LlamaForCausalLM(LlamaConfig(**MEASURED[name])).to(torch.bfloat16).requires_grad_(False)
    expected, linear = token_bytes(lm), linear_weights(lm)
    model: Any = get_peft_model(lm, adapter_config("reclora"))

    def step(count: int) -> tuple[Any, int]:
        batch = Batch(prompts(count, MEASURED[name]["vocab_size"]), 0, "cpu", even=True)
        way = tuning(model, batch, "reclora", lambda: training_precision(model, "bf16-mixed"))
        return way, batch.tokens

    step(1)[0]()  # code that is loaded at first use, and the optimizer's state
    by_tokens = {}
    for tokens in (SHORT, LONG):
        way, length = step(max(1, tokens // 240))
        by_tokens[length] = grown(way, "cpu") * 1e6
    (short, less), (long, more) = sorted(by_tokens.items())
    way, length = step(LONG // 240)
    begin = time.process_time()
    way()
    seconds = time.process_time() - begin
    speed = 4 * linear * length / seconds
    return {
        "linear_weights": linear,
        "bytes_a_token": (more - less) / (long - short),
        "expected_bytes_a_token": expected,
        "tokens_a_second": length / seconds,
        "share_of_products": speed / product_speed(),
    }


def main() -> None:
    """Measure, calculate, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--size", choices=MEASURED, help="measure one size, in this process")
    arguments = parser.parse_args()
    if arguments.size:
        print(json.dumps(measure(arguments.size)))
        return
    measured = {}
    for name in MEASURED:
        command = [sys.executable, "-m", "bench.sizes", "--size", name]
        out = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
        measured[name] = json.loads(out.splitlines()[-1])
        print(name, measured[name], flush=True)
    calculated = {
        f"{name}, {gpus} GPU": calculate(config, gpus)
        for name, config in CALCULATED.items()
        for gpus in (1, 8)
    }
    for name, figures in calculated.items():
        print(name, figures)
    about = {
        "rows": ROWS, "tokens": TOKENS, "batch_size": BATCH_SIZE, "gpu_bytes": GPU_BYTES,
        "gpu_flops": GPU_FLOPS, "utilization": UTILIZATION,
    }  # fmt: skip
    print(f"written to {keep('sizes', {**about, 'measured': measured, 'calculated': calculated}, 'lm')}")


if __name__ == "__main__":
    main()
