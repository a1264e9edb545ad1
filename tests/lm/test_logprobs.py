"""Scores are the same however a batch is laid out, and touch the head only where they must."""

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from recllm.lm import logprobs
from recllm.lm.layout import SEPARATE, title_batch
from recllm.lm.load import switch_off_dropout
from recllm.reclora import RecLoraConfig
from recllm.text.collate import Ragged, pad_left

VOCABULARY, EOS = 50, 2
PROMPTS = [[1, 7, 8, 9, 10], [1, 11], [1, 12, 13]]
# Titles that are prefixes of one another, an equal pair, an empty title.
TITLES = [
    [[20, EOS], [20, 21, EOS], [20, 21, 22, EOS]],
    [[30, EOS], [30, EOS], [EOS]],
    [[40, 41, EOS], [41, EOS], [40, EOS]],
]


def model_of(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCABULARY}
    if name == "gpt2":
        config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=64,
                            initializer_range=0.3)  # fmt: skip
        model = GPT2LMHeadModel(config)
    elif name == "qwen2":
        model = Qwen2ForCausalLM(
            Qwen2Config(intermediate_size=24, num_key_value_heads=1, initializer_range=0.3, **small)
        )
    else:
        if name == "wide":  # FlexAttention wants heads of 16 at least
            small["hidden_size"] = 32
        model = LlamaForCausalLM(
            LlamaConfig(intermediate_size=24, num_key_value_heads=1, initializer_range=0.3, **small)
        )
    model.set_attn_implementation("sdpa")
    return model.to(dtype).eval()


def separate(model) -> torch.Tensor:
    """Sum of log-probabilities of each title, one sequence at a time over full logits."""
    rows = []
    for prompt, titles in zip(PROMPTS, TITLES, strict=True):
        for title in titles:
            logits = model(input_ids=torch.tensor([prompt + title])).logits[0, len(prompt) - 1 : -1]
            rows.append(logits.log_softmax(-1).gather(1, torch.tensor(title)[:, None]).sum())
    return torch.stack(rows).view(len(PROMPTS), -1)


def packed():
    return title_batch(
        Ragged.from_lists(PROMPTS), Ragged.from_lists([title for titles in TITLES for title in titles]), 3
    )


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_packed_titles_equal_separate_sequences_with_gradients(name, dtype, tolerance):
    model = model_of(name, dtype)
    weight = torch.linspace(-1, 1, 9, dtype=dtype).view(3, 3)
    parameters = list(model.parameters())
    # The RMS norm of transformers computes in float32 whatever the weights are, and its gradient with it.
    exact = tolerance if name == "gpt2" else max(tolerance, 1e-6)
    one, other = separate(model), logprobs.title_logps(model, packed())
    torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)
    assert other[1, 0].item() == pytest.approx(other[1, 1].item())
    grads = torch.autograd.grad((one * weight).sum(), parameters, allow_unused=True)
    packed_grads = torch.autograd.grad((other * weight).sum(), parameters, allow_unused=True)
    for expected, got in zip(grads, packed_grads, strict=True):
        if expected is not None:
            assert (got - expected).norm() / expected.norm().clamp(min=1) < exact


# Prompts and titles of many lengths: five samples that need three rows, two of them with a titleless cell.
MIXED_PROMPTS = [[1, 5, 6, 7, 8, 9, 10, 11, 12], [1, 3], [1, 4, 5], [1, 6], [1, 9, 8, 7]]
MIXED_TITLES = [
    [[20, 21, EOS], [20, EOS], [22, 23, 24, EOS]],
    [[25, EOS], [25, 26, EOS]],
    [[27, 28, EOS], [29, EOS], [27, EOS]],
    [[30, EOS]],
    [[31, 32, EOS], [31, 33, EOS], [EOS]],
]


def mixed(**options):
    titles = Ragged.from_lists([title for titles in MIXED_TITLES for title in titles])
    return title_batch(
        Ragged.from_lists(MIXED_PROMPTS), titles, np.array(list(map(len, MIXED_TITLES))), **options
    )


def gated(model, checkpointing=False, **arguments):
    """A RecLoRA with weights that matter, and a representation for each sample."""
    torch.manual_seed(1)
    values = {"r": 2, "num_meta": 4, "representation_dim": 5, "gate_hidden": 8, "gate_temperature": 0.5}
    config = RecLoraConfig(**values, **arguments)
    model = get_peft_model(model, config).double()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "reclora" in name:
                value.normal_(0, 0.4)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    return model, torch.randn(len(MIXED_PROMPTS), 5, dtype=torch.float64)


GATED = {
    "product": {},
    "factor": {"mixture": "factor"},
    "core": {"mixture": "core", "gate": "module"},
    "milora": {"init": "milora"},
    "soft-prompt": {"soft_prompt": 2},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head, soft-prompt": {"target_modules": ["v_proj", "lm_head"], "soft_prompt": 2, "gate": "module"},
}


@pytest.mark.parametrize("kind", GATED)
def test_several_samples_in_a_row_each_with_its_own_gate_equal_separate_sequences(kind):
    model, representation = gated(model_of("llama", torch.float64), **GATED[kind])
    batch = mixed()
    assert batch["input_ids"].shape[0] < len(MIXED_PROMPTS)
    assert batch["sample"].shape[1] > 1
    packed_rows, alone = (
        logprobs.title_logps(model, given, representation) for given in (batch, mixed(layout=SEPARATE))
    )
    one_by_one = torch.full_like(packed_rows, torch.nan)
    for row, (prompt, titles) in enumerate(zip(MIXED_PROMPTS, MIXED_TITLES, strict=True)):
        for column, title in enumerate(titles):
            ids, own = torch.tensor([prompt + title]), representation[row : row + 1]
            logits = model(input_ids=ids, representation=own).logits[0, len(prompt) - 1 : -1]
            one_by_one[row, column] = logits.log_softmax(-1).gather(1, torch.tensor(title)[:, None]).sum()
    assert torch.equal(packed_rows.isnan(), ~batch["present"])
    torch.testing.assert_close(packed_rows, one_by_one, rtol=1e-9, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(alone, one_by_one, rtol=1e-9, atol=1e-9, equal_nan=True)
    # Gates of other samples give other numbers.
    other = logprobs.title_logps(model, batch, representation.roll(1, 0))
    assert (other - packed_rows)[batch["present"]].abs().max() > 1e-3
    weight = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)[batch["present"]]
    parameters = [value for value in model.parameters() if value.requires_grad]
    layers = 3 if "head" in kind else 4
    assert len(parameters) == 2 * layers + 6 * (2 if "soft-prompt" in kind else 1)
    grads = [
        torch.autograd.grad((logps[batch["present"]] * weight).sum(), parameters)
        for logps in (one_by_one, packed_rows)
    ]
    for expected, got in zip(*grads, strict=True):
        assert expected.norm() > 1e-6
        assert (got - expected).norm() / expected.norm() < 1e-5  # RMS norms compute in float32


@pytest.mark.parametrize("kind", [kind for kind in GATED if "soft-prompt" not in kind])
def test_titles_each_with_its_own_gate_equal_separate_sequences(kind):
    """The prompt's tokens, and so every title's first one, read the prompt's gate, others their title's."""
    model, _ = gated(model_of("llama", torch.float64), **GATED[kind])
    representation = torch.randn(len(MIXED_PROMPTS), 4, 5, dtype=torch.float64)
    batch = mixed()
    packed_rows, alone = (
        logprobs.title_logps(model, given, representation) for given in (batch, mixed(layout=SEPARATE))
    )
    one_by_one = torch.full_like(packed_rows, torch.nan)
    for row, (prompt, titles) in enumerate(zip(MIXED_PROMPTS, MIXED_TITLES, strict=True)):
        for column, title in enumerate(titles):
            ids, own = torch.tensor([prompt + title]), representation[row, [0, column + 1]][None]
            segments = torch.tensor([[0] * len(prompt) + [1] * len(title)])
            logits = model(input_ids=ids, representation=own, segments=segments).logits
            logps = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            one_by_one[row, column] = logps.gather(1, torch.tensor(title)[:, None]).sum()
    torch.testing.assert_close(packed_rows, one_by_one, rtol=1e-9, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(alone, one_by_one, rtol=1e-9, atol=1e-9, equal_nan=True)
    same = representation[:, :1].expand_as(representation)
    one_gate = logprobs.title_logps(model, batch, representation[:, 0])
    torch.testing.assert_close(logprobs.title_logps(model, batch, same), one_gate, equal_nan=True)
    swapped = logprobs.title_logps(model, batch, representation[:, [0, 2, 1, 3]])
    # The third title keeps its gate, and one that is EOS alone is predicted by its prompt.
    moved = batch["present"] & torch.tensor([True, True, False])
    assert torch.equal((swapped - packed_rows).abs() > 1e-6, moved)
    weight = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)[batch["present"]]
    parameters = [value for value in model.parameters() if value.requires_grad]
    grads = [
        torch.autograd.grad((logps[batch["present"]] * weight).sum(), parameters)
        for logps in (one_by_one, packed_rows)
    ]
    for expected, got in zip(*grads, strict=True):
        assert (got - expected).norm() / expected.norm() < 1e-5  # RMS norms compute in float32


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_gives_the_same_values_and_gradients(name):
    results = []
    for checkpointing in (False, True):
        model = model_of(name, torch.float64)
        if name == "llama":
            model, representation = gated(model, checkpointing)
        else:
            representation = None
            if checkpointing:
                switch_off_dropout(model)
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                model.train()
        batch = mixed()
        loss = logprobs.title_logps(model, batch, representation)[batch["present"]].square().mean()
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=0)
    assert len(results[0][1]) >= 8
    for expected, got in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_left_padding_equals_none_and_one_batch_size_another(name):
    model = model_of(name, torch.float64)
    together = logprobs.answer_logits(model, pad_left(Ragged.from_lists(PROMPTS)))
    for row, prompt in enumerate(PROMPTS):
        alone = logprobs.answer_logits(model, pad_left(Ragged.from_lists([prompt])))[0]
        full = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(together[row], full, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alone, full, rtol=1e-9, atol=1e-9)
    # Right padding, read at the last real token.
    width = max(map(len, PROMPTS))
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in PROMPTS])
    last = torch.tensor([len(prompt) - 1 for prompt in PROMPTS])
    right = model(input_ids=ids, attention_mask=(torch.arange(width) <= last[:, None]).long()).logits
    torch.testing.assert_close(together, right[torch.arange(3), last], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_adapters_take_part_and_the_head_sees_scored_positions_only(modules):
    peft = pytest.importorskip("peft")
    model = model_of("llama", torch.float64)
    before = logprobs.title_logps(model, packed())
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
    )
    adapted = adapted.double().eval()
    seen = []
    head = adapted.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    after = logprobs.title_logps(adapted, packed())
    handle.remove()
    assert seen == [(sum(len(title) for titles in TITLES for title in titles), 1, 16)]
    torch.testing.assert_close(after, separate(adapted), rtol=1e-9, atol=1e-9)
    assert (after - before).abs().max() > 1e-3
    # The gathering hook is gone.
    assert adapted(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, VOCABULARY)


def test_chunks_do_not_change_values_or_gradients(monkeypatch):
    model = model_of("llama", torch.float64)
    weight = model.model.embed_tokens.weight
    whole = logprobs.title_logps(model, packed())
    (gradient,) = torch.autograd.grad(whole.sum(), weight)
    monkeypatch.setattr(logprobs, "CHUNK", 5 * VOCABULARY)
    parts = logprobs.title_logps(model, packed())
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(parts.sum(), weight)[0], gradient, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(logprobs.title_logps(model, packed()), whole, rtol=1e-12, atol=0)


def test_autocast_normalizes_in_float32():
    model = model_of("llama", torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logps = logprobs.title_logps(model, packed())
        logits = logprobs.answer_logits(model, pad_left(Ragged.from_lists(PROMPTS)))
    assert logps.dtype == torch.float32
    assert logits.dtype == torch.bfloat16
    assert logprobs.answer_score(logits, 3, 4).dtype == torch.float32
    assert (logps - logprobs.title_logps(model, packed())).abs().max() < 0.3


def test_representation_is_passed_on_only_when_given():
    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.kwargs = model_of("llama", torch.float32), []
            self.config = self.inner.config

        def get_output_embeddings(self):
            return self.inner.get_output_embeddings()

        def forward(self, representation=None, scored=None, **kwargs):
            self.kwargs.append(representation)
            assert representation is not None or scored is None
            return self.inner(**kwargs)

    spy, given = Spy(), torch.zeros(3, 4)
    logprobs.answer_logits(spy, pad_left(Ragged.from_lists(PROMPTS)))
    logprobs.answer_logits(spy, pad_left(Ragged.from_lists(PROMPTS)), given)
    logprobs.title_logps(spy, packed(), given)
    logprobs.title_logps(spy, packed())
    assert [value is None for value in spy.kwargs] == [True, False, False, True]


def test_answer_loss_and_score_by_hand():
    # Row 0, yes: -log(e^1 / (e^0 + e^1 + e^2)) = 1.407606; row 1, no: -log(e^2 / (e^2 + 2 e^0)) = 0.239466.
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 2.0]])
    loss = logprobs.answer_loss(logits, torch.tensor([1, 0]), yes_id=1, no_id=2)
    assert loss.item() == pytest.approx((1.407606 + 0.239545) / 2, abs=1e-4)
    # sigmoid(1 - 2) and sigmoid(0 - 2)
    assert logprobs.answer_score(logits, 1, 2).tolist() == pytest.approx([0.268941, 0.119203], abs=1e-6)
    assert np.isfinite(logprobs.answer_loss(logits.bfloat16(), torch.tensor([1.0, 0.0]), 1, 2).item())


@pytest.mark.slow
def test_flex_attention_scores_the_same():
    """On a CPU it has no backward; it is compiled, which takes a minute."""
    import shutil

    if shutil.which("g++") is None and not torch.cuda.is_available():
        pytest.skip("FlexAttention is compiled, and there is no compiler")
    model = model_of("wide", torch.float32)
    wanted = logprobs.title_logps(model, mixed())
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        got = logprobs.title_logps(model, mixed())
    torch.testing.assert_close(got, wanted.detach(), rtol=1e-4, atol=1e-4, equal_nan=True)
