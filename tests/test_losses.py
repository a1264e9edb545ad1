"""Preference losses keep the contract; hand arithmetic, printed forms, statistics, TRL's value."""

from __future__ import annotations

import math

import pytest
import torch

from recllm.losses import (
    PREFERENCE_LOSSES,
    dmpo,
    mppo,
    pairwise_dpo,
    preference_loss,
    preference_statistics,
    softmax_dpo,
)
from tests.loss_contract import LossContract

WITH_REFERENCE = [softmax_dpo, pairwise_dpo, dmpo]


class TestSoftmaxDpo(LossContract):
    kind = "softmax-dpo"
    function = staticmethod(softmax_dpo)

    def cost_of_no_preference(self, rejected: int) -> float:
        """That of a guess among all candidates."""
        return math.log(1 + rejected)


class TestPairwiseDpo(LossContract):
    kind = "dpo-pairwise"
    function = staticmethod(pairwise_dpo)


class TestDmpo(LossContract):
    kind = "dmpo"
    function = staticmethod(dmpo)


class TestMppo(LossContract):
    kind = "mppo"

    def loss(self, policy, reference, beta=0.7, mask=None, label_smoothing=0.0):
        return mppo(policy, beta, mask, label_smoothing)


def test_every_loss_is_under_contract() -> None:
    assert {contract.kind for contract in LossContract.__subclasses__()} == set(PREFERENCE_LOSSES)


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def naive(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """The form that the paper prints: -log sigmoid(-log sum exp(r_l - r_w))."""
    reward = beta * (policy - reference)
    return -torch.log(torch.sigmoid(-torch.log(torch.exp(reward[:, 1:] - reward[:, :1]).sum(1))))


@pytest.mark.parametrize("function", WITH_REFERENCE)
def test_one_rejected_by_hand(function) -> None:
    # rewards 2 * (-1 - -2) = 2 and 2 * (-3 - -2.5) = -1: loss = ln(1 + e^-3)
    loss = function(torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -2.5]]), beta=2.0)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-3.0)), rel=1e-6)


def test_two_rejected_by_hand() -> None:
    # rewards .5 * (2, 0, -4) = (1, 0, -2): loss = ln(1 + e^-1 + e^-3)
    policy = torch.tensor([[-4.0, -5.0, -9.0]])
    reference = torch.tensor([[-6.0, -5.0, -5.0]])
    loss = softmax_dpo(policy, reference, beta=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1) + math.exp(-3)), rel=1e-6)
    # the same margins -1 and -3, pair by pair, and as their mean -2
    loss = pairwise_dpo(policy, reference, beta=0.5)
    assert loss.item() == pytest.approx((softplus(-1) + softplus(-3)) / 2, rel=1e-6)
    assert dmpo(policy, reference, beta=0.5).item() == pytest.approx(softplus(-2), rel=1e-6)
    # without a reference: .5 * (-4, -5, -9), margins -.5 and -2.5, mean -1.5
    assert mppo(policy, beta=0.5).item() == pytest.approx(softplus(-1.5), rel=1e-6)


def test_label_smoothing_by_hand() -> None:
    # Margins -1 and -3. Softmax: targets .8, .1, .1. Pairs: .8 of each pair, .2 of its reverse.
    policy, reference = torch.tensor([[1.0, 0.0, -2.0]]), torch.zeros(1, 3)
    total = math.log(math.exp(1) + math.exp(0) + math.exp(-2))
    wanted = 0.8 * (total - 1) + 0.1 * (total - 0) + 0.1 * (total + 2)
    assert softmax_dpo(policy, reference, 1.0, None, 0.2).item() == pytest.approx(wanted, rel=1e-6)
    wanted = (0.8 * softplus(-1) + 0.2 * softplus(1) + 0.8 * softplus(-3) + 0.2 * softplus(3)) / 2
    assert pairwise_dpo(policy, reference, 1.0, None, 0.2).item() == pytest.approx(wanted, rel=1e-6)
    wanted = 0.8 * softplus(-2) + 0.2 * softplus(2)
    assert dmpo(policy, reference, 1.0, None, 0.2).item() == pytest.approx(wanted, rel=1e-6)
    assert mppo(policy, 1.0, None, 0.2).item() == pytest.approx(wanted, rel=1e-6)


def test_one_rejected_and_label_smoothing_is_conservative_dpo() -> None:
    # Reward difference h = 1.5: -.9 log sigmoid(h) - .1 log sigmoid(-h), for all three alike.
    policy, reference = torch.tensor([[-1.0, -2.5]]), torch.zeros(1, 2)
    for function in WITH_REFERENCE:
        loss = function(policy, reference, 1.0, None, 0.1)
        assert loss.item() == pytest.approx(0.9 * softplus(-1.5) + 0.1 * softplus(1.5), rel=1e-6)


def test_length_normalization_and_the_sft_term_by_hand() -> None:
    # Log-ratios 2, 0, -4 over 4, 1, 2 tokens: rewards .5, 0, -2, margins -.5, -2.5. Chosen: 4 nats, 4 tokens.
    policy = torch.tensor([[-4.0, -5.0, -9.0]])
    reference = torch.tensor([[-6.0, -5.0, -5.0]])
    lengths = torch.tensor([[4, 1, 2]])
    loss = preference_loss(
        "softmax-dpo", policy, reference, 1.0, lengths=lengths, length_normalize=True, sft_weight=0.3
    )
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5) + math.exp(-2.5)) + 0.3, rel=1e-6)
    # Without a reference: -1, -5, -4.5 a token, margins -4 and -3.5, mean -3.75.
    loss = preference_loss("mppo", policy, None, 2.0, lengths=lengths, length_normalize=True)
    assert loss.item() == pytest.approx(softplus(2 * -3.75), rel=1e-6)
    # The term alone does not normalize: sums over tokens in the rewards, the chosen one's mean beside.
    loss = preference_loss("dpo-pairwise", policy, reference, 0.5, lengths=lengths, sft_weight=1.0)
    assert loss.item() == pytest.approx((softplus(-1) + softplus(-3)) / 2 + 1.0, rel=1e-6)


def test_names_are_the_functions() -> None:
    generator = torch.Generator().manual_seed(5)
    policy, reference = (torch.randn(6, 4, generator=generator) for _ in range(2))
    mask = torch.rand(6, 4, generator=generator) > 0.3
    mask[:, 0] = True
    for name, function in zip(PREFERENCE_LOSSES, WITH_REFERENCE, strict=False):
        wanted = function(policy, reference, 0.7, mask, 0.05)
        got = preference_loss(name, policy, reference, 0.7, mask, label_smoothing=0.05)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    got = preference_loss("mppo", policy, None, 0.7, mask)
    torch.testing.assert_close(got, dmpo(policy, torch.zeros(6, 4), 0.7, mask), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("softmax", torch.zeros(1, 2), torch.zeros(1, 2), 1.0), "unknown; wanted one of softmax-dpo"),
        (("dmpo", torch.zeros(1, 2), None, 1.0), "pass reference_logps"),
    ],
)
def test_what_a_loss_lacks_is_named(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        preference_loss(*arguments)
    with pytest.raises(ValueError, match="pass lengths"):
        preference_loss("mppo", torch.zeros(1, 2), None, 1.0, sft_weight=1.0)


def test_dmpo_is_below_the_pairs_and_these_below_softmax() -> None:
    generator = torch.Generator().manual_seed(3)
    policy, reference = (torch.randn(50, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    one, two, three = (f(policy, reference, 2.0) for f in (dmpo, pairwise_dpo, softmax_dpo))
    assert (one <= two).all()
    assert (two <= three).all()


@pytest.mark.parametrize("function", [pairwise_dpo, dmpo])
def test_gradients_are_those_of_log_sigmoid(function) -> None:
    generator = torch.Generator().manual_seed(9)
    policy = torch.randn(8, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    reward = 1.5 * (policy - reference)
    pairs = reward[:, :1] - reward[:, 1:]
    log_sigmoid = torch.nn.functional.logsigmoid
    written = -log_sigmoid(pairs).mean(1) if function is pairwise_dpo else -log_sigmoid(pairs.mean(1))
    ours = function(policy, reference, 1.5)
    torch.testing.assert_close(ours, written, rtol=1e-9, atol=1e-12)
    (a,) = torch.autograd.grad(ours.sum(), policy)
    (b,) = torch.autograd.grad(written.sum(), policy)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rejected", [1, 2, 7])
def test_values_and_gradients_equal_the_printed_form(rejected: int) -> None:
    generator = torch.Generator().manual_seed(rejected)
    policy = torch.randn(16, 1 + rejected, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(16, 1 + rejected, generator=generator, dtype=torch.float64)
    ours, printed = softmax_dpo(policy, reference, 1.5), naive(policy, reference, 1.5)
    torch.testing.assert_close(ours, printed, rtol=1e-9, atol=1e-12)
    (a,) = torch.autograd.grad(ours.sum(), policy)
    (b,) = torch.autograd.grad(printed.sum(), policy)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(a.sum(1), torch.zeros(16, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("margin", [-1e4, -120.0, 95.0, 1e4])
def test_finite_where_the_printed_form_is_not(dtype: torch.dtype, margin: float) -> None:
    # One rejected reward is `margin` above the chosen one: loss -> margin for large ones, 0 for very negative
    # ones.
    policy = torch.tensor([[0.0, margin, -1e4]], dtype=dtype, requires_grad=True)
    loss = softmax_dpo(policy, torch.zeros(1, 3, dtype=dtype), beta=1.0)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(max(policy.detach()[0, 1].item(), 0.0), abs=1e-3)
    assert policy.grad is not None
    assert policy.grad.isfinite().all()
    expected = -1.0 if margin > 0 else 0.0
    assert policy.grad[0, 0].item() == pytest.approx(expected, abs=1e-3)


def test_reference_gets_no_gradient() -> None:
    policy, reference = torch.zeros(1, 3, requires_grad=True), torch.zeros(1, 3, requires_grad=True)
    softmax_dpo(policy, reference, 1.0).sum().backward()
    assert reference.grad is None
    assert policy.grad is not None
    torch.testing.assert_close(policy.grad, torch.tensor([[-2 / 3, 1 / 3, 1 / 3]]))


@pytest.mark.parametrize("function", WITH_REFERENCE)
def test_a_reference_of_another_shape_is_named(function) -> None:
    with pytest.raises(ValueError, match="reference_logps"):
        function(torch.zeros(3, 2), torch.zeros(3, 3), 1.0, None)


def test_statistics_by_hand() -> None:
    # Row 0: rewards 2, 1, -1 (rejected mean 0, margin 2, right). Row 1: rewards 0, 1, masked (margin -1,
    # wrong).
    policy = torch.tensor([[1.0, 0.5, -0.5], [-4.0, 0.5, math.nan]], dtype=torch.float64)
    reference = torch.tensor([[0.0, 0.0, 0.0], [-4.0, 0.0, math.inf]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    out = {k: v.item() for k, v in preference_statistics(policy, reference, 2.0, mask).items()}
    assert out["reward_chosen"] == pytest.approx((2 + 0) / 2)
    assert out["reward_rejected"] == pytest.approx((0 + 1) / 2)
    assert out["margin"] == pytest.approx((2 - 1) / 2)
    assert out["reward_accuracy"] == pytest.approx(0.5)
    assert out["chosen_logp"] == pytest.approx((1 - 4) / 2)
    assert out["rejected_logp"] == pytest.approx((0 + 0.5) / 2)
    kl = 0.0
    for p, q in (([1.0, 0.5, -0.5], [0.0, 0.0, 0.0]), ([-4.0, 0.5], [-4.0, 0.0])):
        a, b = sum(map(math.exp, p)), sum(map(math.exp, q))
        kl += (
            sum(math.exp(x) / a * (x - math.log(a) - y + math.log(b)) for x, y in zip(p, q, strict=True)) / 2
        )
    assert out["kl"] == pytest.approx(kl, rel=1e-9)


def test_statistics_count_ties_as_wrong_and_skip_rows_without_rejected() -> None:
    logps = torch.zeros(2, 2)
    out = preference_statistics(logps, logps, 1.0, torch.tensor([[True, True], [True, False]]))
    assert out["reward_accuracy"].item() == 0.0
    out = preference_statistics(
        torch.tensor([[1.0, 0.0], [9.0, math.nan]]), logps, 1.0, torch.tensor([[True, True], [True, False]])
    )
    assert out["reward_accuracy"].item() == 1.0
    assert out["margin"].item() == 1.0


def test_statistics_without_a_reference_have_no_divergence() -> None:
    out = preference_statistics(torch.tensor([[-1.0, -3.0]]), None, 2.0)
    assert out["margin"].item() == pytest.approx(4.0)
    assert "kl" not in out


def test_one_rejected_equals_the_value_of_trl(tmp_path) -> None:
    """TRL's trainer on whole sequences against the shared-prefix scorer and the loss of this package."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from recllm.lm.logprobs import title_logps
    from recllm.text.collate import Ragged, shared_prefix

    words = ["<pad>", "<s>", "</s>", *"abcdefghij"]
    inner = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=len(words), initializer_range=0.5, pad_token_id=0, **sizes)
        models.append(LlamaForCausalLM(config))
    rows = [("a b c", " d e", " f"), ("b", " g h i", " a a b"), ("c d e f g", " j", " h i")]
    data = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows]
    arguments = trl.DPOConfig(
        str(tmp_path), beta=0.3, per_device_train_batch_size=3, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(models[0], models[1], arguments, train_dataset=Dataset.from_list(data),
                             processing_class=tokenizer)  # fmt: skip
    (batch,) = trainer.get_train_dataloader()
    theirs = trainer.compute_loss(trainer.model, batch)
    assert abs(theirs.item() - math.log(2)) > 0.01

    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    titles = [[*ids(text), tokenizer.eos_token_id] for row in rows for text in row[1:]]
    prompts = shared_prefix(Ragged.from_lists([ids(row[0]) for row in rows]), Ragged.from_lists(titles), 2)
    policy, reference = (title_logps(model.eval(), prompts) for model in models)
    assert softmax_dpo(policy, reference, 0.3).mean().item() == pytest.approx(theirs.item(), rel=1e-5)
