"""Forwards of one model in several threads: each has the gates of its own representation."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch.nn import functional as F

from recllm.lm.layout import title_batch
from recllm.lm.logprobs import answer_logits, title_logps
from recllm.reclora import RecLoraLinear
from recllm.text.collate import Ragged, pad_left
from tests.reclora.gated import D, close, inputs, loss_of, trained

THREADS, ROUNDS = 4, 12
VARIANTS = [
    {},
    {"gate": "module", "mixture": "factor", "target_modules": ["q_proj", "lm_head"]},
    {"soft_prompt": 2, "target_modules": ["v_proj", "lm_head"]},
    {"gate_input": "none", "soft_prompt": 2},
]


@pytest.fixture(autouse=True)
def switching():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(function):
    """What `function(thread)` returns in each of the threads, which begin together."""
    barrier = Barrier(THREADS)

    def run(thread):
        barrier.wait()
        return function(thread)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def representations():
    return torch.randn(THREADS, 3, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.mark.parametrize("arguments", VARIANTS)
@torch.no_grad()
def test_each_forward_reads_its_own_representation(arguments):
    model = trained(**arguments).eval()
    ids, _ = inputs()
    expected = [model(ids, representation=own).logits for own in representations()]
    assert (expected[0] - expected[1]).abs().max() > 1e-4

    def forwards(thread):
        with torch.no_grad():
            return [model(ids, representation=representations()[thread]).logits for _ in range(ROUNDS)]

    for thread, made in enumerate(at_once(forwards)):
        assert all(torch.equal(logits, expected[thread]) for logits in made)
    assert model.base_model._current_gates.state is None


@pytest.mark.parametrize("arguments", VARIANTS[:3])
def test_answers_and_titles_at_once(arguments):
    """Both hook the LM head to see some positions only."""
    model = trained(**arguments).eval()
    prompts = Ragged.from_lists([[3, 4, 5, 6], [7, 8], [9, 10, 11]])
    titles = Ragged.from_lists([[12, 2], [13, 14, 2], [15, 2], [16, 17, 18, 2], [19, 2], [20, 2]])

    @torch.no_grad()
    def scores(thread):
        own = representations()[thread]
        if thread % 2:
            return answer_logits(model, pad_left(prompts), own)
        return title_logps(model, title_batch(prompts, titles, 2), own)

    expected = [scores(thread) for thread in range(THREADS)]
    for thread, made in enumerate(at_once(lambda thread: [scores(thread) for _ in range(ROUNDS)])):
        for got in made:
            assert torch.equal(got, expected[thread])


@pytest.mark.parametrize("arguments", [{}, {"soft_prompt": 2}])
def test_generate_at_once(arguments):
    model = trained(lora_alpha=64, **arguments).eval()
    ids, _ = inputs()
    mask = torch.tensor([[0, 0] + [1] * 5, [1] * 7, [0] + [1] * 6])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 99}

    def made(thread):
        own = representations()[thread]
        return model.generate(ids, attention_mask=mask, representation=own, **options)

    expected = [made(thread) for thread in range(THREADS)]
    for thread, got in enumerate(at_once(made)):
        assert torch.equal(got, expected[thread])


@pytest.mark.parametrize("arguments", [{"gate": "module"}, {"soft_prompt": 2}])
def test_checkpointed_backwards_at_once(arguments):
    """The threads' gradients add up to those of one after another, whoever recomputes a layer."""
    plain = trained(**arguments).train()
    model = trained(**arguments).train()
    model.get_base_model()._set_gradient_checkpointing(
        True, lambda *a, **k: torch.utils.checkpoint.checkpoint(*a, use_reentrant=False, **k)
    )
    ids, _ = inputs()
    for own in representations():
        loss_of(plain, ids, own).backward()
    losses = at_once(lambda thread: loss_of(model, ids, representations()[thread]))
    names = {name for name, value in model.named_parameters() if value.requires_grad}
    # Each backward in another thread than its forward.
    grads = at_once(
        lambda thread: torch.autograd.grad(
            losses[(thread + 1) % THREADS],
            [value for value in model.parameters() if value.requires_grad],
            allow_unused=True,
        )
    )
    wanted = [value.grad for value in plain.parameters() if value.requires_grad]
    assert len(names) == len(wanted)
    for parts, whole in zip(zip(*grads, strict=True), wanted, strict=True):
        close(sum(part for part in parts if part is not None), whole)


def test_an_error_in_one_thread_is_its_own():
    model = trained().eval()
    ids, _ = inputs()
    expected = model(ids, representation=representations()[1]).logits

    def forwards(thread):
        for _ in range(ROUNDS):
            if thread == 0:
                with pytest.raises(ValueError, match="got no representation"):
                    model(ids)
            elif thread == 1:
                assert torch.equal(model(ids, representation=representations()[1]).logits, expected)
            elif thread == 2:
                with pytest.raises(IndexError):
                    model(ids + 1000, representation=representations()[2])
        return True

    assert all(at_once(forwards))
    with pytest.raises(ValueError, match="got no representation"):
        model(ids)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_one_holder_of_its_own(copied):
    model = trained(gate="module").eval()
    ids, representation = inputs()
    expected = model(ids, representation=representation).logits
    with model.base_model._current_gates.use(model.base_model._gate_state(representation)):
        other = copied(model)  # in the middle of a forward
    holders = {id(module.current_gates) for module in other.modules() if isinstance(module, RecLoraLinear)}
    assert holders == {id(other.base_model._current_gates)}
    assert id(model.base_model._current_gates) not in holders
    assert other.base_model._current_gates.state is None
    assert torch.equal(other(ids, representation=representation).logits, expected)
    assert torch.equal(model(ids, representation=representation).logits, expected)


def test_compiled_forwards_at_once():
    torch._dynamo.reset()
    model = trained(gate="module").eval()
    ids, _ = inputs()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = [model(ids, representation=own).logits for own in representations()]
        compiled(ids, representation=representations()[0])  # compiled once, by one thread

    def forwards(thread):
        with torch.no_grad():
            return [compiled(ids, representation=representations()[thread]).logits for _ in range(4)]

    for thread, made in enumerate(at_once(forwards)):
        for logits in made:
            close(logits, expected[thread])


def test_the_loss_of_a_thread_does_not_depend_on_the_others():
    """Several steps of forward and backward, interleaved: each thread's gradients are its own."""
    model = trained(gate="module").train()
    ids, _ = inputs()
    weights = [value for value in model.parameters() if value.requires_grad]

    def step(thread):
        logits = model(ids, representation=representations()[thread]).logits[:, -1]
        return torch.autograd.grad(F.cross_entropy(logits, ids[:, 0]), weights)

    expected = [step(thread) for thread in range(THREADS)]
    for thread, made in enumerate(at_once(lambda thread: [step(thread) for _ in range(3)])):
        for grads in made:
            for got, wanted in zip(grads, expected[thread], strict=True):
                close(got, wanted)
