"""The configuration of a RecLoRA adapter, and RECLORA as a PEFT type."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

MIXTURES = ("product", "factor", "core")
INITS = ("gaussian", "milora", "pissa", "random-svd")
GATES = ("shared", "module")
GATE_INPUTS = ("target", "user", "shuffled", "none")


def _add_peft_type(name: str) -> None:
    """Adds a member to PEFT's enum of methods.

    PEFT has no hook for methods that live outside its own tree: `register_peft_method` and every look-up of
    a saved adapter ask this enum, so a new member is the smallest thing that makes all of them work.
    """
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    # Since Python 3.12 a member is an ordinary class attribute; `setattr` of an enum class might refuse one.
    type.__setattr__(PeftType, name, member)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)


if "RECLORA" not in PeftType.__members__:
    _add_peft_type("RECLORA")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"RecLoraConfig: {name}={value!r} is unknown; allowed: {', '.join(allowed)}")


@dataclass
class RecLoraConfig(PeftConfig):
    """Configuration of a RecLoRA adapter: meta-LoRAs A_k [r, d_in], B_k [d_out, r] and what mixes them.

    With s = lora_alpha / r, R the representation and alpha = gate(R), the update of y = W x is

        product  s sum_k alpha_k B_k A_k x                      (the paper's formula; rank N_m r)
        factor   s (sum_k alpha_k B_k) (sum_k alpha_k A_k) x    (what its public code computes; rank r)
        core     s B G(R) A x                                   (CFLoRA of ReLLaX; one A and B, rank r)

    An initialization by singular vectors starts from A0, B0 that are not zero and subtracts the same mixture
    of them, so that the update is zero at the start for every R and W stays as it is:
    mix(A, B) - mix(A0, B0).

    Attributes:
        r: Rank of each meta-LoRA. Default: the paper's 8.
        lora_alpha: Numerator of the scale s. Default: the paper's 16.
        num_meta: Number of meta-LoRAs N_m that the gate mixes; `core` has one, whatever is said here.
        mixture: `product`, `factor` or `core`, as above.
        representation_dim: Width d of the representation that `model(..., representation=R)` is given.
        gate_temperature: t_p of alpha = softmax(beta / t_p); higher is nearer to uniform. `core` has none.
        gate_hidden: Hidden width of the MLPs that read the representation (gate and soft prompt).
        gate: `shared` for one gate for all target modules, `module` for one gate per target module.
        gate_input: What R is, for whoever loads the adapter: the CRM's representation of the `target`, of the
            `user` alone, or `shuffled` (another row's, a control). The tuner itself only knows `none`: alpha
            = 1 / N_m, there is no gate, and no representation is needed (unless for a soft prompt).
        soft_prompt: Virtual tokens m that an MLP makes of the representation and puts before the prompt
            (after ReLLaX, which writes them into placeholders); 0 for none.
        init: Start of A and B. `gaussian`: A_k independent random draws (kaiming-uniform with LoRA's
            fan-in), B zero. Or singular triplets of W, dealt out to the meta-LoRAs: `pissa` (the largest),
            `milora` (the smallest), `random-svd` (drawn at random, a control).
        rescale: Whether the `product` update is multiplied by N_m. Alpha is near 1/N_m at first, which
            shrinks the update; with `rescale` a uniform gate has the scale lora_alpha / r of a plain LoRA.
            Off is the paper's formula.
        target_modules: Names (or name endings) of the `nn.Linear` modules to adapt, or one regular
            expression.
        exclude_modules: Names, or one regular expression, of modules to leave alone.
        layers_to_transform: Numbers of the layers in which `target_modules` are adapted, as in PEFT's LoRA;
            None: in all. With names only.
        layers_pattern: What the LM calls its list of layers, where PEFT cannot tell (`layers`, `h`).
        modules_to_save: Names of modules that train whole and are saved with the adapter; PEFT puts the new
            head of a classifier (`task_type="SEQ_CLS"`) here.
        init_weights: Whether a start by singular vectors is computed. False in a saved configuration: there
            it comes from the adapter's file, and what the file lacks is NaN.
        svd_cache: Folder in which singular triplets are kept; None: they are computed each time. Not saved.

    Raises:
        ValueError: If a value is out of range or a name unknown.
    """

    r: int = field(default=8, metadata={"help": "rank of each meta-LoRA"})
    lora_alpha: int = field(default=16, metadata={"help": "numerator of the scale lora_alpha / r"})
    num_meta: int = field(default=16, metadata={"help": "number of meta-LoRAs"})
    mixture: str = field(default="product", metadata={"help": f"one of {MIXTURES}"})
    representation_dim: int = field(default=256, metadata={"help": "width of the representation"})
    gate_temperature: float = field(default=5.0, metadata={"help": "temperature of the gate's softmax"})
    gate_hidden: int = field(default=64, metadata={"help": "hidden width of the gate"})
    gate: str = field(default="shared", metadata={"help": f"one of {GATES}"})
    gate_input: str = field(default="target", metadata={"help": f"one of {GATE_INPUTS}"})
    soft_prompt: int = field(default=0, metadata={"help": "virtual tokens made of the representation"})
    init: str = field(default="gaussian", metadata={"help": f"one of {INITS}"})
    rescale: bool = field(default=False, metadata={"help": "multiply the product form by num_meta"})
    target_modules: list[str] | str = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "modules to adapt"}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "modules to leave alone"})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "layers in which modules are adapted"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "name of the LM's list of layers"}
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules that train whole"})
    init_weights: bool = field(default=True, compare=False, metadata={"help": "compute the start"})
    svd_cache: str | None = field(
        default=None, compare=False, metadata={"help": "folder of singular triplets"}
    )

    def __post_init__(self) -> None:
        """Checks the values."""
        super().__post_init__()
        self.peft_type = PeftType["RECLORA"]
        _check_choice("mixture", self.mixture, MIXTURES)
        _check_choice("init", self.init, INITS)
        _check_choice("gate", self.gate, GATES)
        _check_choice("gate_input", self.gate_input, GATE_INPUTS)
        for name in ("r", "lora_alpha", "num_meta", "representation_dim", "gate_temperature", "gate_hidden"):
            if not getattr(self, name) > 0:
                raise ValueError(f"RecLoraConfig: {name}={getattr(self, name)!r}, wanted a number above 0")
        if self.soft_prompt < 0:
            raise ValueError(f"RecLoraConfig: soft_prompt={self.soft_prompt!r}, wanted 0 or more tokens")
        if self.mixture == "core" and not self.gated:
            raise ValueError(
                "RecLoraConfig: mixture='core' with gate_input='none' is a plain LoRA; "
                "set mixture='product', num_meta=1"
            )
        if not self.target_modules:
            raise ValueError(
                "RecLoraConfig: target_modules is empty; name modules, e.g. target_modules=['q_proj']"
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"RecLoraConfig: layers_to_transform={self.layers_to_transform!r} with the regular "
                f"expression target_modules={self.target_modules!r}; wanted names, or layers "
                "within the expression"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"RecLoraConfig: layers_pattern={self.layers_pattern!r} without layers_to_transform; "
                "name both"
            )
        # A sorted list (PEFT's own configs hold a set) gives the same adapter_config.json in every process.
        if not isinstance(self.target_modules, str):
            self.target_modules = sorted(set(self.target_modules))

    @property
    def gated(self) -> bool:
        """Whether a gate reads the representation."""
        return self.gate_input != "none"

    @property
    def reads_representation(self) -> bool:
        """Whether a forward needs `representation`."""
        return self.gated or self.soft_prompt > 0

    @property
    def metas(self) -> int:
        """Number of meta-LoRAs that are held: N_m, or the one of `core`."""
        return 1 if self.mixture == "core" else self.num_meta

    @property
    def scale(self) -> float:
        """Factor of the mixture: s = lora_alpha / r, in the product form with `rescale` times N_m."""
        rescaled = self.rescale and self.mixture == "product"
        return self.lora_alpha / self.r * (self.num_meta if rescaled else 1)

    def to_dict(self) -> dict[str, Any]:
        """What is saved: no path of this machine, and that the start is in the adapter's file."""
        values = super().to_dict()
        values.pop("svd_cache", None)
        values["init_weights"] = False
        return values
