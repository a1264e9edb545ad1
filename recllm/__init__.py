"""LLM-enhanced recommendation: a conventional model, an LM personalized by it, preference alignment.

    import recllm

    stage = recllm.Finished.open("artifacts/demo/stage2/reclora")  # read-only: config, manifest, parents
    crm = recllm.load_crm("artifacts/demo/stage1/sim")
    lm, tokenizer = recllm.load_lm("artifacts/demo/lm/tiny/prompts")
    recommender = recllm.Recommender.load("artifacts/demo/bundle/reclora")
    recommender.recommend([1, 2, 3], k=10)  # a table: user, item, score, rank, title
    recllm.losses.softmax_dpo, recllm.reclora.RecLoraConfig, recllm.reclora.export_user

What is named here is imported when it is asked for: `import recllm` itself takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recllm import losses, reclora
    from recllm.pipeline.finished import Finished
    from recllm.serving.loading import load_crm, load_lm
    from recllm.serving.recommender import Recommender

__version__ = "0.1.0"

__all__ = ["Finished", "Recommender", "load_crm", "load_lm", "losses", "reclora"]

_WHERE = {
    "Finished": "recllm.pipeline.finished",
    "Recommender": "recllm.serving.recommender",
    "load_crm": "recllm.serving.loading",
    "load_lm": "recllm.serving.loading",
}
"""Name -> the module that defines it; other names of `__all__` are modules."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in __all__:
        return importlib.import_module(f"recllm.{name}")
    raise AttributeError(f"module 'recllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted([*globals(), *__all__])
