"""Mixtures as maps of the rank space, by hand; and the weights of the forward in progress."""

import pytest
import torch

from recllm.reclora import RecLoraConfig
from recllm.reclora.mixture import CurrentGates, GateState, mix, plain_lora, uniform_weights, weigh


def config(**arguments):
    return RecLoraConfig(**({"r": 2, "num_meta": 3, "lora_alpha": 8} | arguments))  # s = 4


def test_product_by_hand():
    # alpha (.5, .25, .25) times s = 4: (2, 1, 1), each for both directions of its meta-LoRA.
    hidden = torch.tensor([[[1.0, 2, 3, 4, 5, 6]]])
    weights = weigh(torch.tensor([[[0.5, 0.25, 0.25]]]), config())
    assert mix(hidden, weights, config()).tolist() == [[[2, 4, 3, 4, 5, 6]]]
    rescaled = config(rescale=True)  # times N_m = 3
    weights = weigh(torch.tensor([[[0.5, 0.25, 0.25]]]), rescaled)
    assert mix(hidden, weights, rescaled).tolist() == [[[6, 12, 9, 12, 15, 18]]]


def test_factor_by_hand():
    # sum_k alpha_k h_k = .5 (1, 2) + .25 (3, 4) + .25 (5, 6) = (2.5, 3.5); then alpha_k times s = 4 of it.
    hidden = torch.tensor([[[1.0, 2, 3, 4, 5, 6]]])
    for rescale in (False, True):  # of the product form only
        own = config(mixture="factor", rescale=rescale)
        mixed = mix(hidden, weigh(torch.tensor([[[0.5, 0.25, 0.25]]]), own), own)
        assert mixed.tolist() == [[[5, 7, 2.5, 3.5, 2.5, 3.5]]]


def test_core_by_hand():
    # s G h = 4 (1 * 1 + 2 * 2, 3 * 1 + 0 * 2)
    own = config(mixture="core")
    g = torch.tensor([[[[1.0, 2], [3, 0]]]])
    hidden = torch.tensor([[[1.0, 2]]])
    assert mix(hidden, weigh(g, own), own).tolist() == [[[20, 12]]]
    twice = mix(hidden.expand(1, 2, 2), weigh(g, own).expand(1, 2, 2, 2), own)  # one a token
    assert twice.tolist() == [[[20, 12], [20, 12]]]


@pytest.mark.parametrize("mixture", ["product", "factor"])
@pytest.mark.parametrize("rescale", [False, True])
def test_no_gate_is_a_uniform_gate(mixture, rescale):
    own = config(mixture=mixture, rescale=rescale)
    hidden = torch.randn(2, 5, 6, dtype=torch.float64)
    weights = uniform_weights(own, hidden)
    torch.testing.assert_close(
        mix(hidden, None, own), mix(hidden, weights[None, None], own), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("mixture", ["product", "factor", "core"])
def test_plain_lora_of_one_gate_is_the_mixture(mixture):
    own = config(mixture=mixture)
    generator = torch.Generator().manual_seed(0)
    a, b, x = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((own.metas * 2, 7), (5, own.metas * 2), (1, 4, 7))
    )
    shape = (2, 2) if mixture == "core" else (3,)
    weights = weigh(torch.rand(shape, generator=generator, dtype=torch.float64), own)
    left, right = plain_lora(a, b, weights, own)
    assert left.shape == ((6 if mixture == "product" else 2), 7)
    torch.testing.assert_close(
        x @ left.T @ right.T, mix(x @ a.T, weights[None, None], own) @ b.T, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("trailing", [(2,), (2, 2)])
def test_weights_of_packed_rows_are_each_tokens_own(trailing):
    size = int(torch.tensor(trailing).prod())
    weights = torch.arange(6.0 * size).view(1, 2, 3, *trailing)  # two rows of three segments
    segments = torch.tensor([[0, 0, 2, 1], [1, 2, 2, 0]])
    picked = GateState({"default": weights}, None, segments).layer_weights("default", 0, torch.zeros(2, 4, 5))
    for row in range(2):
        for token in range(4):
            assert torch.equal(picked[row, token], weights[0, row, segments[row, token]])


def test_after_an_error_the_gates_are_current_that_were_so_before():
    gates, outer = CurrentGates(), GateState({}, None, None)
    gates.state = outer
    inner = GateState({}, None, None)

    def fails_within():
        with gates.use(inner):
            assert gates.state is inner
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails_within()
    assert gates.state is outer
