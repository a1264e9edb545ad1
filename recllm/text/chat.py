"""What an instruct LM's own chat template puts around a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROMPT = "the-prompt-stands-here"


def chat_frame(tokenizer: PreTrainedTokenizerBase, system: str = "") -> tuple[str, str]:
    """Text before a prompt and text between it and its answer, as the chat template writes them.

    Args:
        tokenizer: with a chat template.
        system: what the system message says; empty: there is none of ours, and the template puts its own.

    Returns:
        The two texts; the first one without a BOS, which every prompt begins with by itself.

    Raises:
        ValueError: there is no chat template, it cannot be filled, or it leaves something out.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "lm.model.chat=true, but the tokenizer has no chat template: set it to false for an LM that was "
            "not tuned as chat, or write what belongs around prompts into lm.model.prefix and lm.model.suffix"
        )
    messages = [{"role": "user", "content": _PROMPT}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    try:
        # Templates of LMs that think before they answer take this word; others have no use for it.
        filled: Any = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except Exception as error:  # a template is a program of its own and may raise anything
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the LM's chat template cannot be filled: {reason}"
            + ("; wanted one that takes a system message: set lm.model.system to nothing" if system else "")
        ) from error
    before, found, behind = str(filled).partition(_PROMPT)
    if not found or _PROMPT in behind:
        raise ValueError(
            "the LM's chat template does not hold the user's message once; set lm.model.chat=false"
        )
    if system and system not in before:
        raise ValueError(
            f"the LM's chat template drops the system text {system[:60]!r}; wanted one that says it: set "
            "lm.model.system to nothing, and say it in wording.intro"
        )
    bos = tokenizer.bos_token
    if isinstance(bos, str) and before.startswith(bos):
        before = before[len(bos) :]
    return before, behind
