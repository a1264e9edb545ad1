"""What one GPU gives, in eight minutes at most: `make bench-gpu`; `ARGS=--tiny` tries all of it on a CPU.

Each part is a process of its own with a limit of its own, so that one that fails, or does not fit, costs the
others nothing. What it gave, or why it gave nothing, is kept in `results/gpu/<part>.json` with the device.

- `tests`: those that are marked `gpu`.
- `tuning`: LoRA and RecLoRA on a Llama of 8 B random weights in bf16, sequences of 4,096 and prompts of our
  own lengths, computed as stage 2 does: tokens a second, model TFLOP/s (four operations a weight and token),
  peak memory; beside PEFT's LoRA as it comes, with logits at every position.
- `alignment`: a step of Softmax-DPO with K of 3 and 15, and scoring of 20 candidates, shared prompts against
  whole sequences (`bench.stage3`).
- `crms`: DIN and SIM at the shapes of the BARS benchmark, rows a second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from bench.clock import REPOSITORY, keep
from bench.lm import Batch, adapter_config, prompts, tuning
from bench.sizes import linear_weights
from recllm.crm import CrmConfig, Fields, build
from recllm.text.collate import Ragged
from recllm.training.precision import training_precision

LIMITS = {"tests": 90, "tuning": 170, "alignment": 100, "crms": 60}
"""Seconds of each part, loading included; 420 together."""
GOALS = {"tokens_a_second": 14_100, "tflops": 423, "reclora_of_lora": 1.05}
"""Of `tuning`: published for an H100 (Qwen2.5-7B, LoRA in bf16, length 4,096; NVIDIA NeMo Automodel)."""
LLAMA_8B = {
    "hidden_size": 4_096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128_256,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 4_000,
}  # fmt: skip
BARS = {"embedding_dim": 32, "event_dim": 32, "mlp": [512, 256], "attention_mlp": [512, 256]}
"""DIN's shape in BARS (length 50 to 100, embedding 32 to 64)."""
MATCHES = {"din": (50, 0), "sim": (50, 50)}
"""CRM -> recent and retrieved events."""


def device() -> str:
    """Where all of it runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait for the GPU."""
    if device() == "cuda":
        torch.cuda.synchronize()


def seconds_of(step: Callable[[], Any], budget: float) -> float:
    """Median wall seconds of a step, after two that are not counted, for about so many seconds."""
    step()
    step()
    spans: list[float] = []
    begin = time.perf_counter()
    while not spans or time.perf_counter() - begin < budget:
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        spans.append(time.perf_counter() - start)
    return float(np.median(spans))


# ---- tuning


def llama(shape: dict[str, int]) -> Any:
    """A frozen Llama of random weights in bf16, made on the device."""
    with torch.device(device()):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa"))  # type: ignore[arg-type]
        torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def adapted(kind: str, shape: dict[str, int]) -> Any:
    """The Llama with an adapter of the default size."""
    return get_peft_model(llama(shape), adapter_config(kind)).to(device())


def stock(model: Any, ids: Tensor) -> Callable[[], Any]:
    """A step as PEFT's users write it: the LM's own loss, logits at every position."""
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device(), torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()

    return step


def full_rows(count: int, length: int, vocabulary: int) -> Batch:
    """Sequences of one length, two a forward."""
    tokens = np.random.default_rng(0).integers(1_000, vocabulary, count * length).astype(np.int32)
    return Batch(Ragged(tokens, np.arange(count + 1) * length), 2 * length, device())


def tune(tiny: bool) -> dict[str, Any]:
    """LoRA, RecLoRA and stock LoRA on full sequences, and the first two on prompts of our lengths."""
    shape, length, budget = (TINY, 256, 0.5) if tiny else (LLAMA_8B, 4_096, 9.0)
    figures: dict[str, Any] = {}
    for kind in ("lora", "reclora"):
        model = adapted(kind, shape)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        operations = 4 * linear_weights(model.get_base_model())
        rows = full_rows(4, length, shape["vocab_size"])
        own = Batch(prompts(64 if not tiny else 4, shape["vocab_size"]), 2 * length, device())
        works = {
            "full": (
                tuning(model, rows, kind, lambda m=model: training_precision(m, "bf16-mixed")),
                rows.tokens,
            ),
            "prompts": (
                tuning(model, own, kind, lambda m=model: training_precision(m, "bf16-mixed")),
                own.tokens,
            ),
        }
        if kind == "lora":
            ids = rows.parts[0][0]["input_ids"]
            works["stock"] = (stock(model, ids), ids.numel())
        for name, (step, tokens) in works.items():
            if device() == "cuda":
                torch.cuda.reset_peak_memory_stats()
            rate = tokens / seconds_of(step, budget)
            peak = torch.cuda.max_memory_allocated() / 1e9 if device() == "cuda" else 0.0
            figures[f"{kind}, {name}"] = {
                "tokens_a_second": rate,
                "tflops": rate * operations / 1e12,
                "peak_gb": peak,
            }
            print(kind, name, figures[f"{kind}, {name}"], flush=True)
        del model
        if device() == "cuda":
            torch.cuda.empty_cache()
    lora, reclora = (figures[f"{kind}, full"]["tokens_a_second"] for kind in ("lora", "reclora"))
    return figures | {"reclora_of_lora": lora / reclora, "recompute": True}


# ---- CRMs


def crms(tiny: bool) -> dict[str, Any]:
    """A step of training of random rows, rows a second; what a loader gives is measured elsewhere."""
    rows = 512 if tiny else 8_192
    fields = Fields(
        user_sizes=(100_000, 8, 24, 3_400), item_sizes=(200_000, 200_000, 4_000), rating_levels=5, category=2
    )
    generator = torch.Generator().manual_seed(0)

    def draw(sizes: tuple[int, ...], *shape: int) -> Tensor:
        return torch.stack([torch.randint(2, size, shape, generator=generator) for size in sizes], len(shape))

    def events(name: str, length: int) -> dict[str, Tensor]:
        return {
            f"{name}_item": draw(fields.item_sizes, rows, length),
            f"{name}_rating": torch.randint(1, 6, (rows, length), generator=generator),
            f"{name}_interval": torch.randint(1, 32, (rows, length), generator=generator),
            f"{name}_mask": torch.ones(rows, length, dtype=torch.bool),
        }

    figures = {}
    for name, (recent, retrieved) in MATCHES.items():
        batch = {"user": draw(fields.user_sizes, rows), "item": draw(fields.item_sizes, rows)}
        batch |= events("recent", recent)
        if retrieved:
            batch |= events("retrieved", retrieved)
            batch["retrieved_rank"] = torch.arange(retrieved).expand(rows, -1)
        batch = {key: value.to(device()) for key, value in batch.items()}
        label = torch.randint(0, 2, (rows,), generator=generator).float().to(device())
        torch.manual_seed(0)
        model: nn.Module = build(fields, CrmConfig(name=name, statistics=False, **BARS)).to(device())  # type: ignore[arg-type]
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

        def step(
            model: nn.Module = model, adam: Any = adam, batch: Any = batch, label: Tensor = label
        ) -> None:
            F.binary_cross_entropy_with_logits(model(batch)[0], label).backward()
            adam.step()
            adam.zero_grad(set_to_none=True)

        figures[name] = {"rows_a_second": rows / seconds_of(step, 0.5 if tiny else 5.0)}
        print(name, figures[name], flush=True)
    return figures


# ---- parts that are commands of their own


def run_tests(tiny: bool) -> dict[str, Any]:
    """The tests that are marked `gpu`, and how they ended."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=--import-mode=importlib"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    print("\n".join(lines[-15:]), flush=True)
    if done.returncode not in (0, 5):
        raise SystemExit(f"tests ended with {done.returncode}")
    return {"ended": lines[-1]}


def align(tiny: bool) -> dict[str, Any]:
    """Steps and scoring of `bench.stage3`."""
    from bench import stage3

    sizes = argparse.Namespace(rows=2, hidden=64, layers=2, heads=4, intermediate=128, vocabulary=4_000)
    if not tiny:
        sizes = argparse.Namespace(
            rows=4, hidden=2_048, layers=24, heads=16, intermediate=5_632, vocabulary=32_000
        )
    stage3.ROUNDS = 1
    steps = {k: stage3.compare("released", "shared", 1 + k, sizes) for k in (3, 15)}
    scoring = stage3.compare("score-released", "score-shared", stage3.CANDIDATES, sizes)
    for name, figures in {**steps, "scoring": scoring}.items():
        print(name, f"{figures['faster']:.1f}x", figures["peak_mb"], flush=True)
    return {"lm": vars(sizes), "step": steps, "score": scoring}


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "tests": run_tests,
    "tuning": tune,
    "alignment": align,
    "crms": crms,
}


def name_of_device() -> str:
    """For the file."""
    return torch.cuda.get_device_name() if device() == "cuda" else "cpu"


def main() -> None:
    """Run the parts one after another, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small shapes: to see that all of it runs")
    parser.add_argument("--part", choices=PARTS, help="one part, in this process")
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments.tiny)))
        return
    for part in arguments.only:
        command = [sys.executable, "-m", "bench.gpu", "--part", part] + ["--tiny"] * arguments.tiny
        begin = time.perf_counter()
        try:
            done = subprocess.run(
                command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, timeout=LIMITS[part], check=True
            )
            lines = done.stdout.strip().splitlines()
            figures = json.loads(lines[-1])
        except subprocess.TimeoutExpired as late:
            lines = (late.stdout or b"").decode().splitlines() if isinstance(late.stdout, bytes) else []
            figures = {"failed": f"took more than {LIMITS[part]} s", "output": lines[-20:]}
        except subprocess.CalledProcessError as error:
            lines = error.stdout.strip().splitlines()
            figures = {"failed": f"ended with {error.returncode}", "output": lines[-20:]}
        print("\n".join(lines[:-1]))
        print(f"{part}: {figures.get('failed', 'done')}, {time.perf_counter() - begin:.0f} s", flush=True)
        if not arguments.tiny:
            goals = GOALS if part == "tuning" else {}
            keep(part, {"device": name_of_device(), "goals": goals, **figures}, "gpu")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
