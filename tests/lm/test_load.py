"""Loading: frozen weights of somebody else, BOS, and errors of one line."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from recllm.lm.load import LmConfig, context_length, load_lm
from recllm.lm.logprobs import answer_logits
from recllm.text.collate import pad_left
from recllm.text.pieces import Pieces, Wording

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not there")


@needs_stories
def test_pretrained_weights_load_frozen_and_know_their_language():
    model, tokenizer = load_lm(LmConfig(name="stories260k", path=str(STORIES)))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert context_length(LmConfig(), model.config) == 512
    # BOS is put in front although the tokenizer adds none by itself, and the weights miss it if it lacks.
    pieces = Pieces.build(
        tokenizer, Wording(), [None, "Once upon a time, there was a little girl named"], ["1"], []
    )
    assert tokenizer("x")["input_ids"][0] != 1
    assert pieces.table[pieces.head].tolist() == [1]
    text = tokenizer("Once upon a time, there was a little", add_special_tokens=False)["input_ids"]
    target = tokenizer(" girl", add_special_tokens=False)["input_ids"][-1]
    from recllm.text.collate import Ragged

    with torch.no_grad():
        with_bos, without = (
            answer_logits(model, pad_left(Ragged.from_lists([ids])))[0].log_softmax(-1)
            for ids in ([1, *text], text)
        )
    assert tokenizer.decode([with_bos.argmax().item()]).strip() in {
        "girl",
        "boy",
        "g",
        "b",
        "bir",
        "dog",
        "c",
    }
    assert (with_bos - without).abs().max() > 0.01
    assert target >= 0


@needs_stories
def test_half_precision_and_context_are_as_configured():
    config = LmConfig(path=str(STORIES), dtype="auto", context=100)
    model, _ = load_lm(config)
    assert model.dtype == torch.float16
    assert context_length(config, model.config) == 100
    with pytest.raises(ValueError, match=r"context is 513.*512"):
        context_length(LmConfig(context=513), model.config)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom"])
def test_training_mode_drops_nothing(kind, tiny_lm, tmp_path):
    """An adapter trains under train(); its frozen LM must answer there as it does under eval()."""
    from transformers import BloomConfig, GPT2Config, OPTConfig

    sizes = {"vocab_size": len(tiny_lm.tokenizer), "dropout": 0.5}
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.5, attn_pdrop=0.5, **sizes)
    elif kind == "opt":
        config = OPTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24,
                           word_embed_proj_dim=16, attention_dropout=0.5, layerdrop=0.5, **sizes)  # fmt: skip
    else:
        config = BloomConfig(hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.5, attention_dropout=0.5,
                             vocab_size=sizes["vocab_size"])  # fmt: skip
    fresh = AutoModelForCausalLM.from_config(config)
    fresh.save_pretrained(tmp_path)
    tiny_lm.tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        wanted = fresh.eval()(input_ids=ids).logits
        assert not torch.equal(fresh.train()(input_ids=ids).logits, wanted)
        model, _ = load_lm(LmConfig(path=str(tmp_path)))
        torch.testing.assert_close(model.train()(input_ids=ids).logits, wanted)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (LmConfig(), "path is empty"),
        (LmConfig(path="/no/such/folder"), "no such folder"),
        (LmConfig(path="nobody/nothing-of-this-name"), "cannot be loaded"),
        (LmConfig(path="x", dtype="float8"), "dtype is 'float8'"),
        (LmConfig(path="x/y", quantization="3bit"), "quantization is '3bit'"),
    ],
)
def test_errors_are_one_line_that_names_the_key(config, match, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=match) as caught:
        load_lm(config)
    assert "\n" not in str(caught.value)
    assert "lm.model." in str(caught.value)
