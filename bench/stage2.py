"""One training step of the personalized LoRA beside other ways to do it: `make bench-stage2`.

Frozen Llamas of random weights, prompts of random lengths, one thread. All ways of a comparison take turns,
round by round; a figure is the ratio of medians over the rounds. Time is CPU time of this process (wall time
on a GPU), memory what the process grew by at its peak (allocated on the GPU).

- `rank`: RecLoRA's `product` (16 meta-LoRAs of rank 8) against PEFT's LoRA of the same total rank; against
  the same sum in a loop over k; against PEFT's X-LoRA with as many trainable LoRAs (which runs the LM twice).
  And `factor`, `core`, and `product` from singular vectors.
- `head`: logits at the answer only, against logits of all positions, 32,000 tokens.
- `anchors`: the step of the public code (`bench.anchors`) against ours, on the same rows.

All ways start at the LM's own output, so within `rank` and `head` the first loss must be one number:
a run stops where it is not.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from bench.anchors import Anchor
from bench.clock import REPOSITORY, keep
from recllm.crm import CrmConfig, Fields, build
from recllm.lm.logprobs import answer_logits, answer_loss
from recllm.reclora import RecLoraConfig

TARGETS = ("q_proj", "v_proj")
NUM_META, R, DIM = 16, 8, 256
SIZES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4},
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8},
}
YES, NO = 5, 6
GOALS = {"product_of_lora": 1.05, "head_time": 3.0, "head_memory": 6.0}
"""Wanted: seconds of `product` over plain LoRA's at most; all positions over the answer's, at least."""
Batch = dict[str, Any]
Step = Callable[[], Tensor]


def make_lm(size: str, vocabulary: int, device: str) -> LlamaForCausalLM:
    """A frozen Llama."""
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(**SIZES[size], vocab_size=vocabulary, attn_implementation="sdpa"))
    return lm.to(device).requires_grad_(False)


def make_batch(rows: int, longest: int, vocabulary: int, device: str) -> Batch:
    """Left-padded prompts of half the longest length to the whole, labels, representations."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 2, longest + 1, (rows, 1), generator=generator)
    mask = (torch.arange(longest) >= longest - lengths).long()
    ids = torch.randint(10, vocabulary, (rows, longest), generator=generator) * mask
    prompt = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    labels = torch.randint(0, 2, (rows,), generator=generator).float()
    representation = torch.randn(rows, DIM, generator=generator)
    return {
        "prompt": {name: value.to(device) for name, value in prompt.items()},
        "label": labels.to(device),
        "representation": representation.to(device),
        "tokens": int(mask.sum()),
    }


def step_of(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """Forward, backward, AdamW."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        if value.requires_grad:  # the anchors' way goes backward row by row
            value.backward()
        optimizer.step()
        return value.detach()

    return step


def ours(model: nn.Module, batch: Batch, gated: bool = True) -> Step:
    """The step of stage 2: logits at the answer only."""

    def loss() -> Tensor:
        logits = answer_logits(model, batch["prompt"], batch["representation"] if gated else None)
        return answer_loss(logits, batch["label"], YES, NO)

    return step_of(model, loss)


def full_logits(model: nn.Module, batch: Batch) -> Step:
    """The same with logits of all positions, as the LM's own loss computes them."""

    def loss() -> Tensor:
        logits = model(**batch["prompt"], use_cache=False, representation=batch["representation"]).logits
        target = torch.where(batch["label"] > 0.5, YES, NO)
        labels = torch.full_like(batch["prompt"]["input_ids"], -100)
        labels[:, -1] = target
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)

    return step_of(model, loss)


def reclora(lm: Any, **arguments: Any) -> Any:
    """RecLoRA on an LM."""
    values = {"r": R, "num_meta": NUM_META, "representation_dim": DIM, "rescale": True} | arguments
    return get_peft_model(lm, RecLoraConfig(**values, target_modules=list(TARGETS)))  # type: ignore[arg-type]


class Loop(nn.Module):
    """W x + s sum_k alpha_k B_k A_k x, k by k; the gate is RecLoRA's."""

    def __init__(self, base: nn.Linear, alphas: list[Tensor]) -> None:
        """Wraps a layer; `alphas` holds alpha of the forward in progress."""
        super().__init__()
        self.base = base
        self.alphas = alphas
        bound = base.in_features**-0.5
        self.a = nn.ParameterList(
            torch.empty(R, base.in_features).uniform_(-bound, bound) for _ in range(NUM_META)
        )
        self.b = nn.ParameterList(torch.zeros(base.out_features, R) for _ in range(NUM_META))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, seq, d_in]` to `[batch, seq, d_out]`."""
        y = self.base(x)
        alpha = self.alphas[0]
        for k in range(NUM_META):
            y = y + 2.0 * NUM_META * alpha[:, k, None, None] * F.linear(F.linear(x, self.a[k]), self.b[k])
        return y


def looped(lm: Any, batch: Batch, device: str) -> Step:
    """The step with a loop over k."""
    from recllm.reclora import Gate

    alphas: list[Tensor] = []
    gate = Gate(1, RecLoraConfig(r=R, num_meta=NUM_META, representation_dim=DIM))
    for name, module in list(lm.named_modules()):
        if name.rsplit(".", 1)[-1] in TARGETS:
            parent, child = name.rsplit(".", 1)
            setattr(lm.get_submodule(parent), child, Loop(module, alphas))
    whole = nn.ModuleList([lm, gate]).to(device)

    def loss() -> Tensor:
        alphas[:] = [gate(batch["representation"][:, None])[0, :, 0]]
        return answer_loss(answer_logits(lm, batch["prompt"]), batch["label"], YES, NO)

    return step_of(whole, loss)


def xlora(size: str, vocabulary: int, batch: Batch, device: str) -> Step:
    """PEFT's X-LoRA with trainable LoRAs and one set of weights for all layers."""
    folder = Path(tempfile.mkdtemp())
    lora = LoraConfig(r=R, lora_alpha=2 * R, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    get_peft_model(make_lm(size, vocabulary, device), lora).save_pretrained(
        str(folder), save_embedding_layers=False
    )
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=SIZES[size]["hidden_size"],
        adapters={str(k): str(folder) for k in range(NUM_META)},  # PEFT numbers them itself
        use_trainable_adapters=True,
        xlora_depth=1,
    )
    lm = make_lm(size, vocabulary, device)
    lm.config.use_cache = False
    return ours(get_peft_model(lm, config), batch, gated=False)


def seconds(device: str) -> float:
    """CPU time of this process, or wall time of the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def take_turns(steps: dict[str, Step], rounds: int, device: str, same: bool = True) -> dict[str, float]:
    """Median seconds of each way's step over the rounds, after a warm-up each.

    Raises:
        SystemExit: the first losses differ, though they are the `same` number.
    """
    first = [float(step()) for step in steps.values()]
    if same and not max(first) - min(first) < 1e-3:
        raise SystemExit(f"first losses differ: {dict(zip(steps, first, strict=True))}; wanted one number")
    spans: dict[str, list[float]] = {name: [] for name in steps}
    gc.disable()
    for _ in range(rounds):
        for name, step in steps.items():
            begin = seconds(device)
            step()
            spans[name].append(seconds(device) - begin)
    gc.enable()
    return {name: statistics.median(values) for name, values in spans.items()}


def grown(step: Step, device: str) -> float:
    """MB that the process grows by at the peak of a step: activations, gradients, on a CPU AdamW's state."""
    if device == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    step()
    return (status("VmHWM") - before) * 1024 / 1e6


def rank(rounds: int, device: str) -> dict[str, Any]:
    """Ways to the sum over k, and the other mixtures."""
    vocabulary = 6_000
    batch = make_batch(16, 128, vocabulary, device)

    def lm() -> Any:
        return make_lm("small", vocabulary, device)

    wide = LoraConfig(
        r=R * NUM_META, lora_alpha=2 * R * NUM_META, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    steps = {
        "lora": ours(get_peft_model(lm(), wide), batch, gated=False),
        "product": ours(reclora(lm()), batch),
        "factor": ours(reclora(lm(), mixture="factor"), batch),
        "core": ours(reclora(lm(), mixture="core"), batch),
        "product-milora": ours(reclora(lm(), init="milora"), batch),
        "loop": looped(lm(), batch, device),
        "xlora": xlora("small", vocabulary, batch, device),
    }
    medians = take_turns(steps, rounds, device)
    return {
        "seconds": medians,
        "of_lora": {name: value / medians["lora"] for name, value in medians.items()},
        "of_product": {name: value / medians["product"] for name, value in medians.items()},
    }


def head(rounds: int, device: str) -> dict[str, Any]:
    """Logits at the answer only, and of all positions."""
    figures: dict[str, Any] = {}
    for size in SIZES:
        ways = {"answer": _head("answer", size, device), "all": _head("all", size, device)}
        medians = take_turns(ways, max(3, rounds // 2), device)
        del ways
        gc.collect()
        memory = {way: _in_own_process(way, size, device) for way in ("answer", "all")}
        figures[size] = {
            "seconds": medians,
            "megabytes": memory,
            "time_ratio": medians["all"] / medians["answer"],
            "memory_ratio": memory["all"] / memory["answer"],
        }
    return figures


def _head(way: str, size: str, device: str, rows: int = 16) -> Step:
    batch = make_batch(rows, 160, 32_000, device)
    model = reclora(make_lm(size, 32_000, device))
    return ours(model, batch) if way == "answer" else full_logits(model, batch)


def _in_own_process(way: str, size: str, device: str) -> float:
    command = [sys.executable, "-m", "bench.stage2", "--device", device, "--grown", way, size]
    out = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    return float(out.split()[-1])


def anchors(rounds: int, device: str) -> dict[str, Any]:
    """The public code's step and ours, tokens a second."""
    figures: dict[str, Any] = {}
    for size, vocabulary in (("tiny", 6_144), ("tiny", 32_000), ("small", 32_000)):
        batch = make_batch(16, 160, vocabulary, device)
        fields = Fields(
            user_sizes=(6_000, 4, 8, 24, 3_400), item_sizes=(3_700, 3_700, 20), rating_levels=5, category=2
        )
        torch.manual_seed(0)
        crm = build(fields, CrmConfig(name="din")).to(device)  # in training mode, as theirs
        crm_batch = {name: value.to(device) for name, value in crm_inputs(fields, 16).items()}
        anchor = Anchor(make_lm(size, vocabulary, device), crm, TARGETS, NUM_META, R).to(device)
        prompt = batch["prompt"]
        steps = {
            "anchors": step_of(
                anchor, lambda p=prompt, c=crm_batch, a=anchor: a.loss(p["input_ids"], p["attention_mask"], c)
            ),
            "ours-factor": ours(reclora(make_lm(size, vocabulary, device), mixture="factor"), batch),
            "ours": ours(reclora(make_lm(size, vocabulary, device)), batch),
        }
        medians = take_turns(steps, max(3, rounds // 2), device, same=False)  # theirs counts two tokens
        figures[f"{size}-{vocabulary}"] = {
            "seconds": medians,
            "tokens_per_second": {name: batch["tokens"] / value for name, value in medians.items()},
            "ratio": medians["anchors"] / medians["ours"],
        }
    return figures


def crm_inputs(fields: Fields, rows: int, length: int = 60) -> dict[str, Tensor]:
    """A batch of random ids for a CRM."""
    generator = torch.Generator().manual_seed(0)

    def draw(sizes: tuple[int, ...], *shape: int) -> Tensor:
        drawn = [torch.randint(2, size, shape, generator=generator) for size in sizes]
        return torch.stack(drawn, len(shape))

    return {
        "user": draw(fields.user_sizes, rows),
        "item": draw(fields.item_sizes, rows),
        "recent_item": draw(fields.item_sizes, rows, length),
        "recent_rating": torch.randint(1, fields.rating_levels + 1, (rows, length), generator=generator),
        "recent_interval": torch.randint(1, 32, (rows, length), generator=generator),
        "recent_mask": torch.ones(rows, length, dtype=torch.bool),
    }


COMPARISONS = {"rank": rank, "head": head, "anchors": anchors}


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=COMPARISONS, help="one comparison instead of all")
    parser.add_argument("--grown", nargs=2, metavar=("WAY", "SIZE"), help="MB of one way, in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.grown:
        _head(*arguments.grown, arguments.device, rows=1)()  # code that is loaded at first use
        print(grown(_head(*arguments.grown, arguments.device), arguments.device))
        return
    about = {"device": arguments.device, "rounds": arguments.rounds, "goals": GOALS}
    for name in [arguments.only] if arguments.only else COMPARISONS:
        figures = COMPARISONS[name](arguments.rounds, arguments.device)
        print(name, figures)
        print(f"written to {keep(name, about | figures, 'stage2')}", flush=True)


if __name__ == "__main__":
    main()
