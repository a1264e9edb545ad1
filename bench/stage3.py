"""Stage 3 against the way of the released trainers: time and memory of a step, and of scoring 20 candidates.

`make bench-stage3` lets both take turns, each in a process of its own, on the same random batch: prompts of
300 tokens, titles of 8 (EOS among them), a Llama of the tiny LM's size (or another one: --hidden ...) with a
LoRA.

- `released`: 1 + K whole sequences a row through the policy and through the frozen reference, logits over the
  vocabulary at every position in float32, in every step.
- `shared`: prompts shared by their titles, the head where a title's token is predicted, the reference's
  log-probabilities from the cache that was filled once for all 20 candidates.
- `reference`: filling that cache, per row; `with_reference` counts it into the steps of a single pass.

Both compute the same loss (a run stops where they differ). Seconds are wall time, and CPU time of the own
process, which does not count what other work held the cores; each the median of a round's repetitions, and of
the rounds. Memory is what a run holds at its peak beyond the loaded model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.clock import REPOSITORY, keep
from recllm.lm.config import TinyConfig
from recllm.lm.layout import title_batch
from recllm.lm.logprobs import title_logps
from recllm.losses import softmax_dpo
from recllm.text.collate import Ragged

PROMPT, TITLE, CANDIDATES, ROUNDS, SECONDS = 300, 8, 20, 3, 2.0
KINDS = (1, 3, 7, 15)
GOALS = {"step": {3: 4.0, 15: 10.0}, "score": 8.0}
"""Wanted at least: how many times shorter a step at K and the scoring of 20 candidates are."""


def policy(sizes: argparse.Namespace, device: str) -> Any:
    """A random Llama with a LoRA on queries and values that has left its zero start."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.02)
    return model.to(device)


def drawn(rows: int, titles: int, vocabulary: int) -> tuple[Ragged, Ragged]:
    """Random prompts and titles; a title ends in EOS, token 2."""
    generator = np.random.default_rng(0)
    prompts = generator.integers(3, vocabulary, (rows, PROMPT))
    words = generator.integers(3, vocabulary, (rows * titles, TITLE))
    words[:, -1] = 2
    return Ragged.from_lists(prompts.tolist()), Ragged.from_lists(words.tolist())


def whole_sequences(prompts: Ragged, titles: Ragged, count: int) -> dict[str, Tensor]:
    """One row a title, prompt and title; the prompt's labels are -100."""
    repeated = np.repeat(prompts.tokens.reshape(len(prompts), -1), count, axis=0)
    ids = np.concatenate([repeated, titles.tokens.reshape(len(titles), -1)], 1).astype(np.int64)
    labels = ids.copy()
    labels[:, :PROMPT] = -100
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def whole_logps(model: Any, batch: dict[str, Tensor], count: int) -> Tensor:
    """Summed log-probabilities `[B, count]` from logits over the vocabulary at every position."""
    output = model(batch["input_ids"], attention_mask=torch.ones_like(batch["input_ids"]), use_cache=False)
    logits, labels = output.logits[:, :-1].float(), batch["labels"][:, 1:].clone()
    is_scored = labels != -100
    labels[~is_scored] = 0
    logps = logits.log_softmax(-1).gather(2, labels[:, :, None])[:, :, 0]
    return (logps * is_scored).sum(1).view(-1, count)


def work(arm: str, count: int, sizes: argparse.Namespace, device: str) -> Callable[[], Tensor]:
    """What an arm repeats; it returns a loss, or scores."""
    model = policy(sizes, device)
    prompts, titles = drawn(sizes.rows, count, sizes.vocabulary)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.0)
    whole = move_data_to_device(whole_sequences(prompts, titles, count), device)
    shared = move_data_to_device(title_batch(prompts, titles, count), device)
    # The reference is the start with other weights, so that the loss is more than ln(1 + K).
    reference = policy(sizes, device).eval().requires_grad_(False)
    with torch.no_grad():
        for name, value in reference.named_parameters():
            if "lora_B" in name:
                value.mul_(-1)

    def step(logps: Callable[[], Tensor], other: Callable[[], Tensor]) -> Tensor:
        optimizer.zero_grad()
        loss = softmax_dpo(logps(), other(), 1.0).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def reference_anew() -> Tensor:
        return whole_logps(reference, whole, count)

    @torch.no_grad()
    def scored(way: Callable[..., Tensor], *given: Any) -> Tensor:
        return way(*given)

    if arm == "released":
        return lambda: step(lambda: whole_logps(model, whole, count), reference_anew)
    if arm == "shared":
        with torch.no_grad():
            cached = title_logps(reference, shared)
        return lambda: step(lambda: title_logps(model, shared), lambda: cached)
    if arm == "score-released":
        return lambda: scored(whole_logps, model.eval(), whole, count)
    if arm == "score-shared":
        return lambda: scored(title_logps, model.eval(), shared)
    raise ValueError(f"no arm {arm}")


def measure(arm: str, count: int, sizes: argparse.Namespace) -> dict[str, Any]:
    """Seconds a repetition, the result, and the peak of memory beyond what the loaded arm holds, MB."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = work(arm, count, sizes, device)
    loaded = memory(device, "VmRSS")
    result = run()
    times: list[tuple[float, float]] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < SECONDS or len(times) < 2:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = np.median(times, axis=0).tolist()
    peak = memory(device, "VmHWM") - loaded
    return {"wall": wall, "cpu": cpu, "peak": peak, "result": result.double().cpu().ravel().tolist()}


def memory(device: str, what: str) -> float:
    """MB that are held now (`VmRSS`; from here on peaks are counted anew) or were at the peak (`VmHWM`)."""
    if device == "cuda":
        if what == "VmRSS":
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 1e6
    if what == "VmRSS":
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts at what is held now
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(what))


def child(arm: str, count: int, sizes: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own, forked before any tensor is made."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def run() -> None:
        there.send(measure(arm, count, sizes))

    process = context.Process(target=run)
    process.start()
    there.close()
    try:
        figures: dict[str, Any] = here.recv()
    except EOFError:
        raise SystemExit(f"error: {arm} with {count} titles a row ended without a result") from None
    process.join()
    return figures


def middle(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The median times and memory of several rounds."""
    medians = {name: float(np.median([one[name] for one in rounds])) for name in ("wall", "cpu", "peak")}
    return medians | {"result": rounds[0]["result"]}


def compare(first: str, second: str, count: int, sizes: argparse.Namespace) -> dict[str, Any]:
    """Two arms by turns: seconds of each, how many times the second is faster, memory beyond the model."""
    rounds: dict[str, list[dict[str, Any]]] = {first: [], second: []}
    for _ in range(ROUNDS):
        for arm, measured in rounds.items():
            measured.append(child(arm, count, sizes))
    one, two = (middle(rounds[arm]) for arm in (first, second))
    error = np.abs(np.subtract(one["result"], two["result"])).max()
    if error > 1e-3 * max(1.0, np.abs(one["result"]).max()):
        raise SystemExit(f"error: {first} and {second} differ by {error}, K or candidates {count}")
    return {
        "seconds": {first: one["wall"], second: two["wall"]},
        "cpu_seconds": {first: one["cpu"], second: two["cpu"]},
        "peak_mb": {first: one["peak"], second: two["peak"]},
        "faster": one["wall"] / two["wall"],
        "faster_cpu": one["cpu"] / two["cpu"],
    }


def main() -> None:
    """Measure all and write `results/stage3/bench.json`."""
    tiny = TinyConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
    for name in ("hidden", "layers", "heads", "intermediate", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, default=getattr(tiny, name), help="of the LM")
    sizes = parser.parse_args()
    steps = {}
    scoring = compare("score-released", "score-shared", CANDIDATES, sizes)
    for k in KINDS:
        figures = compare("released", "shared", 1 + k, sizes)
        for clock, name in (("seconds", "faster"), ("cpu_seconds", "faster_cpu")):
            both = figures[clock]["shared"] + scoring[clock]["score-shared"]
            figures[f"{name}_with_reference"] = figures[clock]["released"] / both
        steps[k] = figures
        print(
            f"K = {k:>2}: {figures['faster']:.1f}x ({figures['faster_cpu']:.1f}x of CPU time); "
            f"{figures['faster_with_reference']:.1f}x with the reference of one pass; peak "
            f"{figures['peak_mb']['released']:,.0f} against {figures['peak_mb']['shared']:,.0f} MB",
            flush=True,
        )  # fmt: skip
    print(f"scoring {CANDIDATES} candidates: {scoring['faster']:.1f}x ({scoring['faster_cpu']:.1f}x)")
    about = vars(sizes) | {
        "prompt": PROMPT,
        "title": TITLE,
        "threads": torch.get_num_threads(),
        "rounds": ROUNDS,
    }
    path = keep("bench", {"sizes": about, "goals": GOALS, "step": steps, "score": scoring}, "stage3")
    print(path.relative_to(REPOSITORY))


if __name__ == "__main__":
    main()
