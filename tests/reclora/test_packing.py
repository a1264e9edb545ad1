"""The tuner: packed and padded rows, and generation, equal to one row at a time."""

import pytest
import torch
from torch.nn import functional as F

from tests.reclora.gated import close, config, inputs, perturb, tiny_lm, trained

HEAD = {"target_modules": ["v_proj", "lm_head"]}


@pytest.mark.parametrize("modules", [{}, HEAD])
def test_packed_rows_equal_separate_ones(modules):
    model = trained(gate="module", **modules)
    ids, representation = inputs(batch=3, seq=5)
    separate = model(ids, representation=representation).logits
    packed_ids = torch.cat([ids[0], ids[1], ids[2, :3]])[None].expand(2, -1)
    segments = torch.tensor([0] * 5 + [1] * 5 + [2] * 3)
    position_ids = torch.cat([torch.arange(5), torch.arange(5), torch.arange(3)])
    visible = (segments[:, None] == segments[None]) & torch.ones(13, 13, dtype=torch.bool).tril()
    arguments = {
        "attention_mask": visible[None, None].expand(2, 1, -1, -1),
        "position_ids": position_ids[None].expand(2, -1),
    }
    # The second row names its segments in another order: each row has its own set.
    logits = model(
        packed_ids,
        representation=torch.stack([representation, representation[[1, 2, 0]]]),
        segments=torch.stack([segments, (segments + 2) % 3]),
        **arguments,
    ).logits
    last = model(
        packed_ids, representation=representation.expand(2, -1, -1), segments=segments.expand(2, -1),
        logits_to_keep=3, **arguments,
    ).logits  # fmt: skip
    close(last, separate[2:, :3].expand(2, -1, -1))
    for row in range(2):
        close(logits[row, :5], separate[0])
        close(logits[row, 5:10], separate[1])
        close(logits[row, 10:], separate[2, :3])


def test_a_head_is_adapted_where_a_later_adapter_is_the_first_to_name_it():
    model, (ids, representation) = trained(), inputs()
    model.add_adapter("head", config(**HEAD))
    model.add_adapter("again", config(**HEAD))
    model.set_adapter("head")
    head = model.get_output_embeddings()
    assert len(head._forward_pre_hooks) == 1  # of the model, though two adapters have the head
    base = tiny_lm()(ids).logits
    close(model(ids, representation=representation).logits, base)
    perturb(model)
    assert (model(ids, representation=representation).logits - base).abs().max() > 1e-2
    model.set_adapter("default")
    assert not torch.equal(model(ids, representation=representation).logits, base)


def test_left_padding_changes_nothing():
    model = trained()
    ids, representation = inputs()
    padded = F.pad(ids, (4, 0))
    mask = (torch.arange(11) >= 4).long().expand(3, -1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions, representation=representation).logits
    close(logits[:, 4:], model(ids, representation=representation).logits)


@pytest.mark.parametrize("modules", [{}, HEAD])
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_generate_equals_greedy_by_hand(task_type, modules):
    model = trained(task_type=task_type, lora_alpha=64, **modules)
    ids, representation = inputs()
    expected = ids
    for _ in range(6):
        logits = model(expected, representation=representation).logits
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 99}
    for use_cache in (True, False):
        assert torch.equal(
            model.generate(ids, representation=representation, use_cache=use_cache, **options), expected
        )
    other = model.generate(ids, representation=representation.flip(0) * 5, **options)
    assert not torch.equal(other, expected)
    with pytest.raises(ValueError, match="no representation"):
        model.generate(ids, **options)
    with model.disable_adapter():
        assert torch.equal(model.generate(ids, **options), tiny_lm().generate(ids, **options))


def test_beams_and_returned_sequences_keep_their_rows_gate():
    model = trained(lora_alpha=64)
    ids, representation = inputs()
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": 99}
    together = model.generate(ids, representation=representation, num_return_sequences=2, **options)
    assert together.shape[0] == 6
    for row in range(3):
        alone = model.generate(
            ids[row : row + 1],
            representation=representation[row : row + 1],
            num_return_sequences=2,
            **options,
        )
        assert torch.equal(together[2 * row : 2 * row + 2], alone)
