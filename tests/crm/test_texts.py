"""DIN and SIM with the frozen LM's vectors of texts: what the further field is, and what it can learn."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from recllm.crm import CrmConfig
from recllm.errors import ConfigError
from tests.crm.contract import TEXTS, random_batch


def test_target_and_events_have_the_text_as_a_field_behind_item_and_category(make_model):
    model = make_model("din-lm").eval()
    batch = random_batch(8, 5)
    embeddings = model.embeddings
    sample, query = embeddings.sample(batch)
    text = TEXTS[batch["dense"]] @ embeddings.text.weight.T
    assert sample.shape == (8, (2 + 3 + 1) * 8)  # fields of the user, of the item, and the text
    torch.testing.assert_close(sample[:, -8:], text)
    torch.testing.assert_close(query[:, 16:], text)
    events, mask = embeddings.events(batch, "recent")
    of_events = TEXTS[batch["recent_dense"]] @ embeddings.text.weight.T
    torch.testing.assert_close(events[..., 16:24], of_events * mask[..., None])
    assert not events[~mask].any()


def test_two_items_without_an_event_differ_by_their_texts_alone(make_model):
    """Both read the unknown item in every field; without texts nothing tells them apart."""
    batch = random_batch(8, 5)
    batch["item"] = torch.ones_like(batch["item"])
    other = {**batch, "dense": torch.where(batch["dense"] == 7, 8, 7)}
    for variant, differs in (("din", False), ("din-lm", True)):
        model = make_model(variant).eval()
        assert (model(batch)[0] != model(other)[0]).all() == differs


def test_likes_that_texts_tell_are_learned_for_items_that_training_never_had(make_model):
    """Liked if the text's first number is positive; a quarter of the items is asked and never trained."""
    texts = 0.2 * TEXTS
    texts[:, 0] = 2.0 * TEXTS[:, 0].sign()
    model = make_model("din-lm", mask_items=0.5)
    model.set_texts(texts, torch.ones(40, dtype=torch.bool))
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(60):
        batch = random_batch(128, 5, seed=step)
        dense = torch.randint(2, 32, (128,), generator=generator)
        batch["dense"] = dense
        batch["item"] = torch.stack([dense, dense, torch.ones_like(dense)], 1)
        optimizer.zero_grad()
        liked = (texts[dense, 0] > 0).float()
        functional.binary_cross_entropy_with_logits(model(batch)[0], liked).backward()
        optimizer.step()
    unseen = torch.arange(32, 40)
    batch = random_batch(len(unseen), 5)
    batch["dense"] = unseen
    batch["item"] = torch.ones_like(batch["item"])
    guessed = model.eval()(batch)[0] > 0
    assert torch.equal(guessed, texts[unseen, 0] > 0)


@pytest.mark.parametrize("settings", [{"name": "deepfm"}, {"name": "sim", "retrieval": "soft"}])
def test_models_that_read_no_texts_refuse_them(settings):
    with pytest.raises(ConfigError, match=r"stage1.crm.text_dim=4 .*CRM=sim-lm"):
        CrmConfig(text_dim=4, **settings)
