"""RecLoRA: a personalized LoRA, as a PEFT tuner (`peft_type` RECLORA).

Importing this package registers the tuner, so it must be imported before a saved adapter is loaded. From
then on `get_peft_model`, `save_pretrained`, `PeftModel.from_pretrained`, `disable_adapter` and `generate`
work as for LoRA:

    model = get_peft_model(lm, RecLoraConfig(representation_dim=256))
    logits = model(input_ids, attention_mask=mask, representation=R).logits      # R [batch, 256]
"""

from peft.utils import register_peft_method

from recllm.reclora.card import AdapterCard, write_model_card
from recllm.reclora.config import RecLoraConfig
from recllm.reclora.export import export_mean, export_user, export_users, pick_user
from recllm.reclora.heads import Gate, SoftPrompt
from recllm.reclora.layer import RecLoraLinear
from recllm.reclora.model import RecLoraModel

register_peft_method(name="reclora", config_cls=RecLoraConfig, model_cls=RecLoraModel, prefix="reclora_")

__all__ = [
    "AdapterCard",
    "Gate",
    "RecLoraConfig",
    "RecLoraLinear",
    "RecLoraModel",
    "SoftPrompt",
    "export_mean",
    "export_user",
    "export_users",
    "pick_user",
    "write_model_card",
]
