"""Loading: frozen weights of somebody else, BOS, and errors of one line."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from recllm.lm.load import LmConfig, _reads_padding, context_length, load_checked_lm, load_lm
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


@pytest.fixture
def lm_folder(tiny_lm, tmp_path):
    """The tiny LM saved, and a function that rewrites weights and configuration there."""
    tiny_lm.model.save_pretrained(tmp_path)
    tiny_lm.tokenizer.save_pretrained(tmp_path)

    def rewrite(weights=None, generation=None, **config):
        if weights is not None:
            file = tmp_path / "model.safetensors"
            save_file(weights(load_file(file)), file, metadata={"format": "pt"})
        for name, values in (("config.json", config), ("generation_config.json", generation or {})):
            file = tmp_path / name
            file.write_text(json.dumps(json.loads(file.read_text()) | values))
        return LmConfig(name="own", path=str(tmp_path))

    return rewrite


EMBEDDING = "model.embed_tokens.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
HEAD = "lm_head.0.weight"


@pytest.mark.parametrize(
    ("weights", "config", "match"),
    [
        (
            lambda w: {"base_model.model." + name: value for name, value in w.items()},
            {},
            f"lacks 21 of 21 w.* '{EMBEDDING}', in its place stands 'base_model.model.{EMBEDDING}':",
        ),
        (
            lambda w: w | {HEAD: w[EMBEDDING].clone()},
            {"tie_word_embeddings": False},
            f"lacks 1 of 21 .*'lm_head.weight', in its place stands '{HEAD}'",
        ),
        (
            None,
            {"tie_word_embeddings": False},
            "lacks 1 of 21 .*'lm_head.weight', in its place stands nothing",
        ),
        (None, {"num_hidden_layers": 3}, "lacks 9 of 30 .*first 'model.layers.2"),
        (None, {"vocab_size": 2000}, rf"another shape.*'{EMBEDDING}' \[\d+, 32\], wanted \[2000, 32\]"),
        # A part of the LM that config.json does not speak of: layers cut off, biases left out.
        (None, {"num_hidden_layers": 1}, "has 9 weights for which .*first 'model.layers.1"),
        (lambda w: w | {BIAS: torch.ones(32)}, {}, f"has 1 weights for which .*first '{BIAS}'"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(lm_folder, weights, config, match):
    with pytest.raises(ValueError, match=match) as caught:
        load_lm(lm_folder(weights, **config))
    assert "\n" not in str(caught.value)


def test_weights_that_nothing_depends_on_are_left_out_and_told(lm_folder, tiny_lm):
    extra = {
        "v_head.summary.weight": torch.ones(1, 32),
        "score.weight": torch.ones(2, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    config = lm_folder(lambda w: w | extra)
    model, _, notes = load_checked_lm(config)
    for name, value in tiny_lm.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert len(notes) == 1
    assert "'score.weight'" in notes[0]


def test_an_untouched_folder_has_nothing_to_tell(lm_folder):
    assert load_checked_lm(lm_folder())[2] == []


def test_what_a_folder_says_about_sampling_does_not_act(lm_folder, tiny_lm):
    plain, _ = load_lm(lm_folder())
    ids = torch.tensor([[5, 6, 7, 8]])
    wanted = plain.generate(ids, max_new_tokens=12, do_sample=False)
    settings = {"repetition_penalty": 50.0, "min_length": 100, "no_repeat_ngram_size": 1, "num_beams": 3}
    model, _, notes = load_checked_lm(lm_folder(generation=settings))
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), wanted)
    assert "repetition_penalty=50.0" in notes[0]
    assert "num_beams=3" in notes[0]


def test_an_adapter_is_no_lm(lm_folder, tmp_path):
    config = lm_folder()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "other/lm"}))
    with pytest.raises(ValueError, match=r"holds an adapter .*merge_and_unload"):
        load_lm(config)


@pytest.mark.parametrize("broken", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_broken_file_is_told_in_one_line(lm_folder, tmp_path, broken):
    config = lm_folder()
    (tmp_path / broken).write_bytes(b"{broken")
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load_lm(config)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_refused(lm_folder):
    config = lm_folder(
        lambda w: {name: value * (torch.nan if "mlp.up" in name else 1) for name, value in w.items()}
    )
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.up_proj.weight'.* not finite"):
        load_checked_lm(config)


def test_an_encoder_is_no_causal_lm(tiny_lm, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=len(tiny_lm.tokenizer), hidden_size=16, num_hidden_layers=2,
                        num_attention_heads=2, intermediate_size=24)  # fmt: skip
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tiny_lm.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"BertLMHeadModel.* reads tokens that come later"):
        load_checked_lm(LmConfig(path=str(tmp_path)))


def test_a_padding_token_beyond_the_embedding_gives_way_to_one_that_the_lm_has(lm_folder, tmp_path):
    from transformers import AutoTokenizer

    config = lm_folder()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = load_lm(config)[0].get_input_embeddings().weight.shape[0]
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= rows
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer, _ = load_checked_lm(config)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id < rows
    # A row that ends before the other is padded, and the LM is asked to read that.
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad():
        eos = int(model(ids).logits[0, -1].argmax())
    answer = model.generate(
        ids, max_new_tokens=6, do_sample=False, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id
    )
    assert int(answer.max()) < rows


@pytest.mark.parametrize("token", ["eos_token", "bos_token"])
def test_tokens_that_texts_need_lie_within_the_embedding(lm_folder, tmp_path, token):
    from transformers import AutoTokenizer

    config = lm_folder()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({token: "<new>"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 tokens of the tokenizer lie beyond .*'<new>'.*wanted ids below"):
        load_lm(config)


def test_a_tokenizer_of_another_lm_is_refused(lm_folder):
    config = lm_folder(lambda w: w | {EMBEDDING: w[EMBEDDING][:500].clone()}, vocab_size=500)
    with pytest.raises(ValueError, match=r"tokens of the tokenizer lie beyond the LM's embedding.*below 500"):
        load_lm(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_lm_that_reads_padding_is_refused(tiny_lm, tmp_path, dtype):
    """Its convolution and its state walk over padding, so that an answer would depend on the batch."""
    sizes = {"vocab_size": len(tiny_lm.tokenizer), "hidden_size": 32, "num_hidden_layers": 3}
    griffin = RecurrentGemmaConfig(**sizes, num_attention_heads=4, intermediate_size=48, lru_width=32)
    rwkv = RwkvConfig(**sizes, attention_hidden_size=32)
    for kind, lm_config in ((RecurrentGemmaForCausalLM, griffin), (RwkvForCausalLM, rwkv)):
        torch.manual_seed(0)
        kind(lm_config).to(dtype).save_pretrained(tmp_path / kind.__name__)
        tiny_lm.tokenizer.save_pretrained(tmp_path / kind.__name__)
        with pytest.raises(
            ValueError, match=rf"\({kind.__name__}\) reads padding, .* choose another LM"
        ) as caught:
            load_checked_lm(LmConfig(path=str(tmp_path / kind.__name__)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, 0.02, 0.3])
def test_rounding_is_not_taken_for_padding_that_is_read(dtype, scale):
    """Experts are chosen by token, and rows share their products: padding moves others by rounding."""
    sizes = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    lm_config = MixtralConfig(**sizes, intermediate_size=48, num_key_value_heads=2, num_local_experts=4)
    for seed in range(3):
        torch.manual_seed(seed)
        model = MixtralForCausalLM(lm_config).to(dtype).eval()
        for value in model.parameters() if scale else ():
            if value.dim() > 1:
                value.data.normal_(0, scale)
        assert not _reads_padding(model)


class Bomb:
    """Pickled, it runs a command where it is loaded."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("bomb", r"holds pickled objects that are no weights.*; wanted safetensors"),
        ("cut", r".*cannot be loaded: "),
    ],
)
def test_pickled_weights_run_nothing_and_are_one_line(lm_folder, tmp_path, monkeypatch, content, match):
    config = lm_folder()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    torch.save({"model.embed_tokens.weight": Bomb()}, path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"^lm\.model\.path '.*' {match}") as caught:
        load_lm(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()
