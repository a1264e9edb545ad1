"""What a chat template puts around a prompt, and what it must not drop."""

import pytest

from recllm.text.chat import chat_frame

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OWN_SYSTEM = "{% if messages[0].role != 'system' %}<s>SYSTEM be nice</s>{% endif %}" + CHATML
NO_SYSTEM = "[{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}] "
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML


@pytest.fixture
def templated(tiny_lm):
    """The tiny LM's tokenizer with a chat template."""
    import copy

    def make(template):
        tokenizer = copy.deepcopy(tiny_lm.tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.mark.parametrize(
    ("template", "system", "frame"),
    [
        (CHATML, "", ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")),
        (
            CHATML,
            "Be brief.",
            (
                "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
                "<|im_end|>\n<|im_start|>assistant\n",
            ),
        ),
        (NO_SYSTEM, "", ("[", "] ")),
    ],
)
def test_the_frame_is_what_the_template_writes(templated, template, system, frame):
    assert chat_frame(templated(template), system) == frame


def test_a_bos_of_the_template_is_left_to_the_prompt(templated):
    tokenizer = templated("{{ bos_token }}" + CHATML)
    assert tokenizer.bos_token
    assert chat_frame(tokenizer)[0] == "<|im_start|>user\n"


@pytest.mark.parametrize(
    ("template", "system", "match"),
    [
        (None, "", "the tokenizer has no chat template"),
        (NO_SYSTEM, "Be brief.", "drops the system text 'Be brief.'; wanted one that says it"),
        (REFUSES, "Be brief.", "cannot be filled: no system here; wanted one that takes a system message"),
        ("{{ nothing.at.all }}", "", "cannot be filled: 'nothing' is undefined"),
        ("hello", "", "does not hold the user's message once"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "", "does not hold the user's message once"),
    ],
)
def test_a_template_that_will_not_do_is_one_line(templated, template, system, match):
    with pytest.raises(ValueError, match=match) as caught:
        chat_frame(templated(template), system)
    assert "\n" not in str(caught.value)
