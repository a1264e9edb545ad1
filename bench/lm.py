"""Tuning and scoring with a real LM beside what the LM alone does at the same shape: `make bench-lm LM=...`.

Prompts of random tokens, of the lengths that real ones have: from half the longest to the longest. The LM
alone has as many tokens in rows of one length, nothing padded: a forward, and a forward with the gradient of
its inputs, which is the least that tuning any adapter takes. All ways of a table take turns, and a figure is
the median of the rounds. Time is CPU time of this process (wall time on a GPU); tokens are real
ones, padding is not counted.

- `tuning`: an optimizer step of stage 2, with LoRA and with RecLoRA, in forwards of so many tokens.
- `scoring`: Yes/No answers of both, in forwards of so many tokens.
- `memory`: what a process grows by at the peak of a step of 32 and of 128 prompts, each in a process of its
  own; `whole` is one forward for all of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from bench.clock import REPOSITORY, keep
from bench.stage2 import grown, take_turns
from recllm.config.merge import load_yaml, merge
from recllm.lm.config import LmConfig
from recllm.lm.gguf import export_lm
from recllm.lm.load import load_lm
from recllm.lm.logprobs import answer_logits, answer_loss
from recllm.reclora import RecLoraConfig
from recllm.text.collate import Ragged, pad_left
from recllm.training.micro_batches import cut
from recllm.training.precision import training_precision

GOAL = 0.7
"""Wanted: tokens a second of tuning and of scoring, of those of the LM alone."""
KINDS = ("lora", "reclora")
LONGEST, PROMPTS = 320, 32
R, NUM_META, REPRESENTATION = 8, 16, 64
TARGETS = ("q_proj", "v_proj")
YES, NO = 100, 200
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed"}
"""Weights of the LM, and how the adapter computes with them."""

Way = Callable[[], Tensor]


def open_lm(name: str, dtype: str) -> Any:
    """The LM of `conf/lm/<name>.yaml`; one of a package is unpacked once, into `.bench/lm/`."""
    file = REPOSITORY / "conf" / "lm" / f"{name}.yaml"
    config: LmConfig = merge([(str(file), load_yaml(file))], {"lm.model.dtype": dtype}).lm.model
    if not config.is_exported:
        return load_lm(config)[0]
    folder = REPOSITORY / ".bench" / "lm" / f"{name}-{dtype}"
    if not (folder / "config.json").exists():
        export_lm(config, folder)
    return load_lm(config, folder)[0]


def adapter_config(kind: str) -> Any:
    """PEFT's configuration of an adapter of the default size."""
    if kind == "reclora":
        return RecLoraConfig(
            r=R, num_meta=NUM_META, representation_dim=REPRESENTATION, target_modules=list(TARGETS)
        )
    return LoraConfig(r=R, lora_alpha=2 * R, target_modules=list(TARGETS), task_type="CAUSAL_LM")


def adapted(kind: str, name: str, dtype: str, device: str) -> Any:
    """The LM with an adapter of the default size."""
    return get_peft_model(open_lm(name, dtype).to(device), adapter_config(kind)).to(device)


def prompts(count: int, vocabulary: int) -> Ragged:
    """Random prompts of half the longest length to the longest."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(LONGEST // 2, LONGEST + 1, count)
    return Ragged.from_lists([generator.integers(1_000, vocabulary, length).tolist() for length in lengths])


class Batch:
    """Prompts, cut into forwards of so many tokens at most, as micro-batches are.

    Args:
        drawn: the prompts.
        tokens: of a forward.
        device: where they are put.
        even: whether all rows get the mean length instead, so that nothing is padded.
    """

    def __init__(self, drawn: Ragged, tokens: int, device: str, even: bool = False) -> None:
        """See the class."""
        count = len(drawn)
        if even:
            width = len(drawn.tokens) // count
            drawn = Ragged(drawn.tokens[: width * count], np.arange(count + 1) * width)
        self.tokens = len(drawn.tokens)
        self.parts = []
        generator = torch.Generator().manual_seed(0)
        label = torch.randint(2, (count,), generator=generator).float().to(device)
        representation = torch.randn(count, REPRESENTATION, generator=generator).to(device)
        for rows in cut(drawn.lengths, tokens):
            part = Ragged.from_lists([drawn[row].tolist() for row in rows])
            batch = {name: value.to(device) for name, value in pad_left(part).items()}
            self.parts.append((batch, label[rows], representation[rows], len(rows) / count))


def bare_forward(model: Any, batch: Batch) -> Way:
    """The LM alone: what comes next behind each row."""

    @torch.inference_mode()
    def work() -> Tensor:
        return torch.stack([answer_logits(model, part).float().sum() for part, *_ in batch.parts]).sum()

    return work


def bare_step(model: Any, batch: Batch) -> Way:
    """The LM alone: the loss, and its gradient of the inputs."""

    def work() -> Tensor:
        losses = []
        for part, label, _, share in batch.parts:
            inputs = model.get_input_embeddings()(part["input_ids"]).requires_grad_()
            logits = model(
                inputs_embeds=inputs,
                attention_mask=part["attention_mask"],
                position_ids=part["position_ids"],
                logits_to_keep=1,
                use_cache=False,
            ).logits[:, -1]
            loss = share * answer_loss(logits, label, YES, NO)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    return work


def scoring(model: Any, batch: Batch, kind: str, precision: Callable[[], AbstractContextManager[Any]]) -> Way:
    """Yes/No answers with an adapter."""

    @torch.inference_mode()
    def work() -> Tensor:
        with precision():
            return torch.stack(
                [
                    answer_logits(model, part, own if kind == "reclora" else None).float().sum()
                    for part, _, own, _ in batch.parts
                ]
            ).sum()

    return work


def tuning(model: Any, batch: Batch, kind: str, precision: Callable[[], AbstractContextManager[Any]]) -> Way:
    """An optimizer step of stage 2."""
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.0)

    def work() -> Tensor:
        optimizer.zero_grad()
        losses = []
        for part, label, own, share in batch.parts:
            with precision():
                logits = answer_logits(model, part, own if kind == "reclora" else None)
                loss = share * answer_loss(logits, label, YES, NO)
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        return torch.stack(losses).sum()

    return work


def speeds(name: str, dtype: str, tokens: int, count: int, rounds: int, device: str) -> dict[str, Any]:
    """Tokens a second of all ways, in forwards of so many tokens, and their share of the LM's alone."""
    lm = open_lm(name, dtype).to(device)
    drawn = prompts(count, lm.config.vocab_size)
    even, own = Batch(drawn, tokens, device, even=True), Batch(drawn, tokens, device)
    models = {kind: adapted(kind, name, dtype, device) for kind in KINDS}

    def precision(model: Any) -> Callable[[], AbstractContextManager[Any]]:
        return lambda: training_precision(model, PRECISIONS[dtype])

    score = {"alone": bare_forward(lm, even)}
    tune = {"alone": bare_step(lm, even)}
    for kind, model in models.items():
        score[kind] = scoring(model, own, kind, precision(model))
        tune[kind] = tuning(model, own, kind, precision(model))
    figures: dict[str, Any] = {}
    for task, ways in (("scoring", score), ("tuning", tune)):
        medians = take_turns(ways, rounds, device, same=False)
        rates = {way: (even if way == "alone" else own).tokens / value for way, value in medians.items()}
        shares = {way: value / rates["alone"] for way, value in rates.items()}
        figures[task] = {"tokens_per_second": rates, "of_alone": shares}
        shown = ", ".join(f"{way} {value:,.0f} ({shares[way]:.2f})" for way, value in rates.items())
        print(f"{dtype} {task} {tokens:,} tokens a forward: {shown} tokens/s", flush=True)
    return figures


def memory(name: str, dtype: str, count: int, tokens: int, device: str) -> float:
    """MB that a process of its own grows by at the peak of a step of RecLoRA, beyond LM and optimizer."""
    command = [sys.executable, "-m", "bench.lm", name, "--device", device, "--dtypes", dtype]
    command += ["--grown", str(count), str(tokens)]
    out = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    return float(out.split()[-1])


def grown_of_step(name: str, dtype: str, count: int, tokens: int, device: str) -> float:
    """As `memory`, of this process."""
    model = adapted("reclora", name, dtype, device)

    def step(rows: int) -> Way:
        batch = Batch(prompts(rows, model.config.vocab_size), tokens, device)
        return tuning(model, batch, "reclora", lambda: training_precision(model, PRECISIONS[dtype]))

    step(1)()  # code that is loaded at first use, and the optimizer's state
    return grown(step(count), device)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("lm", help="a file of conf/lm, e.g. smollm2-135m-instruct")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of a step, and of what is scored")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2_000, 8_000], help="of a forward")
    parser.add_argument("--dtypes", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument(
        "--grown", type=int, nargs=2, metavar=("PROMPTS", "TOKENS"), help="MB, of this process"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name, device = arguments.lm, arguments.device
    if arguments.grown:
        count, tokens = arguments.grown
        print(grown_of_step(name, arguments.dtypes[0], count, tokens, device))
        return
    figures: dict[str, Any] = {}
    for dtype in arguments.dtypes:
        figures[dtype] = {
            str(tokens): speeds(name, dtype, tokens, arguments.prompts, arguments.rounds, device)
            for tokens in arguments.tokens
        }
        least = min(arguments.tokens)
        grown_by = {
            "32": memory(name, dtype, 32, least, device),
            "128": memory(name, dtype, 128, least, device),
            "32-whole": memory(name, dtype, 32, 0, device),
        }
        print(f"{dtype} MB of a step in forwards of {least:,} tokens", grown_by, flush=True)
        figures[dtype]["memory"] = grown_by
    about = {
        "lm": name, "device": device, "threads": arguments.threads, "rounds": arguments.rounds,
        "prompts": arguments.prompts, "longest": LONGEST, "goal": GOAL,
    }  # fmt: skip
    print(f"written to {keep(name, about | figures, 'lm')}")


if __name__ == "__main__":
    main()
