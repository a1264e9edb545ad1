"""Encoders: what is masked, which are taken and which refused, and the way to disk and back."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from recllm.lm.config import EncoderConfig, TinyConfig
from recllm.lm.encoder import MASK, add_mask_token, build_encoder, load_encoder, mask_tokens

SMALL = TinyConfig(hidden=16, layers=2, heads=2, intermediate=24, context=64)


@pytest.fixture(scope="module")
def tokenizer(tiny_lm, tmp_path_factory):
    """The tiny LM's tokenizer with the mask, in an object of its own."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_lm.tokenizer.save_pretrained(folder)
    again = type(tiny_lm.tokenizer).from_pretrained(folder)
    return add_mask_token(again, SMALL.context)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """An untrained encoder, and the folder where it lies."""
    torch.manual_seed(0)
    model = build_encoder(SMALL, tokenizer).eval()
    folder = tmp_path_factory.mktemp("encoder")
    model.base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, folder


def test_mask_by_hand():
    # Share 0.3: tokens 0, 1, 2 and 4 are drawn, of which 4 may not be guessed. 0 is masked, 1 becomes
    # another token, 2 stays.
    draws = iter([np.array([0.1, 0.29, 0.2, 0.3, 0.0, 0.9]), np.array([0.79, 0.9, 0.85, 0.0, 0.0, 0.0])])
    other = np.array([70, 71, 72, 73, 74, 75], np.int32)
    rng = SimpleNamespace(random=lambda size: next(draws), integers=lambda *_, **__: other)
    tokens = np.array([10, 11, 12, 13, 14, 15], np.int32)
    guessable = np.array([True, True, True, True, False, True])
    read, chosen = mask_tokens(tokens, guessable, 0.3, 99, 100, rng)
    assert read.tolist() == [99, 71, 12, 13, 14, 15]
    assert chosen.tolist() == [True, True, True, False, False, False]


def test_masked_shares():
    count = 100_000
    tokens = np.random.default_rng(1).integers(50, size=count).astype(np.int32)
    guessable = np.arange(count) % 2 == 0
    read, chosen = mask_tokens(tokens, guessable, 0.3, 99, 10_000, np.random.default_rng(0))
    assert not chosen[~guessable].any()
    assert (read[~chosen] == tokens[~chosen]).all()
    assert chosen.sum() == pytest.approx(15_000, abs=5 * np.sqrt(50_000 * 0.3 * 0.7))
    hidden, unchanged = (read[chosen] == 99).mean(), (read[chosen] == tokens[chosen]).mean()
    assert (hidden, unchanged) == (pytest.approx(0.8, abs=0.02), pytest.approx(0.1, abs=0.015))


def test_the_tokenizer_is_the_lms_and_one_token_more(tiny_lm, tokenizer):
    own, lms = tokenizer.get_vocab(), tiny_lm.tokenizer.get_vocab()
    assert own.pop(MASK) == len(lms) == tokenizer.mask_token_id
    assert own == lms


def test_saved_and_loaded_is_the_same_encoder(saved, tokenizer):
    model, folder = saved
    again, reloaded, context = load_encoder(EncoderConfig(), folder)
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        assert torch.equal(again(ids).last_hidden_state, model.base_model(ids).last_hidden_state)
    assert (reloaded.get_vocab(), context) == (tokenizer.get_vocab(), 64)
    assert load_encoder(EncoderConfig(path=str(folder), context=20))[2] == 20
    # A layer: 4 (16^2 + 16) + 2 * 16 * 24 + 24 + 16 + 2 * 32; besides tokens, 64 positions, one type, a norm.
    layers = 2 * (4 * 272 + 768 + 40 + 64)
    assert sum(p.numel() for p in again.parameters()) == layers + 16 * (len(tokenizer) + 64 + 1 + 2)


def test_a_bert_of_others_gives_cls_and_sep_for_bos_and_eos(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    shape = {"vocab_size": 15, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(**shape, intermediate_size=8, max_position_embeddings=32)).save_pretrained(tmp_path)
    model, tokenizer, context = load_encoder(EncoderConfig(path=str(tmp_path)))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, context) == (2, 3, 32)
    assert model.pooler is None


def test_what_is_no_encoder_is_one_line(saved, tiny_lm, tmp_path):
    def refused(path, **keys):
        with pytest.raises(ValueError, match=r"encoder\.") as caught:
            load_encoder(EncoderConfig(path=str(path), **keys))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such folder" in refused(tmp_path / "nowhere")
    assert "64 positions" in refused(saved[1], context=65)
    tiny_lm.model.save_pretrained(tmp_path / "causal")
    tiny_lm.tokenizer.save_pretrained(tmp_path / "causal")
    assert "left to right" in refused(tmp_path / "causal")
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in saved[1].iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    shape = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 3}))
    assert "has no weights 'encoder.layer.2." in refused(bare)
    weights = bare / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in refused(bare)
