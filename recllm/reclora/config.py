"""The configuration of a RecLoRA adapter, and RECLORA as a PEFT type."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig
from peft.utils import PeftType

MIXTURES = ("product",)
INITS = ("gaussian",)
GATES = ("shared", "module")


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


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"RecLoraConfig: {name}={value!r} is unknown; allowed: {', '.join(allowed)}")


@dataclass
class RecLoraConfig(PeftConfig):
    """Configuration of a RecLoRA adapter: `num_meta` meta-LoRAs of rank `r` and the gate that mixes them.

    Attributes:
        r: Rank of each meta-LoRA. Default: the paper's 8.
        lora_alpha: Numerator of the scale s = lora_alpha / r. Default: the paper's 16.
        num_meta: Number of meta-LoRAs N_m that the gate mixes.
        mixture: How they are mixed. `product` is the paper's y = W x + s sum_k alpha_k B_k A_k x.
        representation_dim: Width d of the representation that `model(..., representation=R)` is given.
        gate_temperature: t_p of alpha = softmax(beta / t_p); higher is nearer to uniform.
        gate_hidden: Hidden width of the gate's MLP.
        gate: `shared` for one gate for all target modules, `module` for one gate per target module.
        init: Start of A and B. `gaussian`: A_k independent random draws (kaiming-uniform with LoRA's
            fan-in), B zero.
        rescale: Whether the update is multiplied by N_m. Alpha is near 1/N_m at first, which shrinks the
            update; with `rescale` a uniform gate has the scale lora_alpha / r of a plain LoRA. Off is the
            paper's formula.
        target_modules: Names (or name endings) of the `nn.Linear` modules to adapt, or one regular
            expression.
        exclude_modules: Names, or one regular expression, of modules to leave alone.

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
    init: str = field(default="gaussian", metadata={"help": f"one of {INITS}"})
    rescale: bool = field(default=False, metadata={"help": "multiply the update by num_meta"})
    target_modules: list[str] | str = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "modules to adapt"}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "modules to leave alone"})

    def __post_init__(self) -> None:
        """Checks the values."""
        super().__post_init__()
        self.peft_type = PeftType["RECLORA"]
        _one_of("mixture", self.mixture, MIXTURES)
        _one_of("init", self.init, INITS)
        _one_of("gate", self.gate, GATES)
        for name in ("r", "lora_alpha", "num_meta", "representation_dim", "gate_temperature", "gate_hidden"):
            if not getattr(self, name) > 0:
                raise ValueError(f"RecLoraConfig: {name}={getattr(self, name)!r}, wanted a number above 0")
        if not self.target_modules:
            raise ValueError(
                "RecLoraConfig: target_modules is empty; name modules, e.g. target_modules=['q_proj']"
            )
        # A sorted list (PEFT's own configs hold a set) gives the same adapter_config.json in every process.
        if not isinstance(self.target_modules, str):
            self.target_modules = sorted(set(self.target_modules))

    @property
    def scale(self) -> float:
        """Factor of sum_k alpha_k B_k A_k: s = lora_alpha / r, times N_m with `rescale`."""
        return self.lora_alpha / self.r * (self.num_meta if self.rescale else 1)
