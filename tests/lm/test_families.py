"""The matrix of LM families: everything that this package asks of an LM, of each that docs/stage2.md names.

All but the soft prompts of a few take minutes together.
"""

import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F

from recllm.lm.layout import title_batch
from recllm.lm.load import _reads_ahead, _reads_padding
from recllm.lm.logprobs import answer_logits, title_logps
from recllm.lm.probe import find_layout
from recllm.reclora import RecLoraConfig
from recllm.text.collate import Ragged, pad_left
from tests.lm.families import CONTEXT, FAMILIES

D, M, STEPS = 5, 3, 5
PROMPTS = [
    [3 + (7 * row + 5 * place + place * place) % 70 for place in range(n)] for row, n in enumerate((12, 7, 3))
]
TITLES = [[9, 2], [9, 10, 2], [9, 2, 11, 2], [12, 13, 2], [14, 2], [15, 16, 17, 18, 2]]
QUICK = (
    "OPT", "Llama-4", "Mistral with a window", "Gemma-2", "Gemma-3", "Mamba", "Qwen3-Next", "Jamba", "LFM2",
)  # fmt: skip
"""Families on which a soft prompt was ignored, or counted the padding: always tried."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def lm(family):
    return FAMILIES[family].build()


def representations():
    return torch.randn(len(PROMPTS), D, generator=torch.Generator().manual_seed(2))


def adapted(family, lm, **arguments):
    """The LM with an adapter whose weights matter; `unload` takes it off again."""
    config = RecLoraConfig(
        r=2, num_meta=2, representation_dim=D, gate_hidden=8, target_modules=list(FAMILIES[family].targets),
        **arguments,
    )  # fmt: skip
    model = get_peft_model(lm, config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if value.requires_grad and "norm_" not in name and "bias_2" not in name:
            value.data += 0.2 * torch.randn(value.shape, generator=generator)
    return model


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=5e-5)


def greedy(last_logits, count=STEPS):
    """Tokens that greedy decoding chooses, by a function of the tokens so far that gives the last logits."""
    made = []
    for _ in range(count):
        made.append(int(last_logits(made).argmax()))
    return made


def generated(model, representation, **arguments):
    batch = pad_left(Ragged.from_lists(PROMPTS))
    tokens = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], representation=representation,
        max_new_tokens=STEPS, do_sample=False, pad_token_id=0, eos_token_id=999, **arguments,
    )  # fmt: skip
    return tokens[:, len(PROMPTS[0]) :].tolist()


@torch.no_grad()
def check_soft_prompt(family, lm):
    """Logits and decoding as with explicit embeddings in front of each unpadded prompt."""
    model = adapted(family, lm, soft_prompt=M)
    try:
        representation = representations()
        virtual = model.base_model.reclora_prompt["default"](representation[:, None])[:, 0]
        embed = lm.get_input_embeddings()

        def literal(row, tokens):
            """Logits behind a row's prompt and tokens: the embeddings given, the gates set by hand."""
            parts = [virtual[row], embed(torch.tensor(PROMPTS[row]))]
            if tokens:
                parts.append(embed(torch.tensor(tokens)))
            tuner = model.base_model
            state = tuner._gate_state(representation[row : row + 1])
            tuner._enabled = False  # of the soft prompt alone: the layers know nothing of it
            try:
                with tuner._current_gates.use(state):
                    return lm(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0, -1]
            finally:
                tuner._enabled = True

        wanted = torch.stack([literal(row, []) for row in range(len(PROMPTS))])
        batch = pad_left(Ragged.from_lists(PROMPTS))
        got = answer_logits(model, batch, representation)
        close(got, wanted)
        other = answer_logits(model, batch, representation.flip(0))
        assert (other - got).abs().max() > 0.01
        # On the right, as separate titles are.
        longest = max(map(len, PROMPTS))
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in PROMPTS])
        mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in PROMPTS])
        logits = model(ids, attention_mask=mask, representation=representation, use_cache=False).logits
        close(torch.stack([logits[row, len(prompt) - 1] for row, prompt in enumerate(PROMPTS)]), wanted)
        by_hand = [greedy(lambda made, row=row: literal(row, made)) for row in range(len(PROMPTS))]
        assert generated(model, representation) == by_hand
        assert generated(model, representation, use_cache=False) == by_hand
        beams = generated(model, representation, num_beams=3)
        for row, prompt in enumerate(
            PROMPTS
        ):  # padding has no part in a search either, whose cache is reordered
            alone = model.generate(
                torch.tensor([prompt]), representation=representation[row : row + 1], num_beams=3,
                max_new_tokens=STEPS, do_sample=False, pad_token_id=0, eos_token_id=999,
            )  # fmt: skip
            assert alone[0, len(prompt) :].tolist() == beams[row]
    finally:
        model.unload()


@pytest.mark.parametrize("name", QUICK)
def test_soft_prompts_where_they_went_wrong(name):
    check_soft_prompt(name, FAMILIES[name].build())


@pytest.mark.slow
def test_soft_prompts(family, lm):
    if family in QUICK:
        pytest.skip("tried in every run")
    check_soft_prompt(family, lm)


@pytest.mark.slow
@torch.no_grad()
def test_padding_does_not_reach_an_answer(family, lm):
    assert not _reads_padding(lm)
    assert not _reads_ahead(lm)
    batch = pad_left(Ragged.from_lists(PROMPTS))
    got = answer_logits(lm, batch)
    for row, prompt in enumerate(PROMPTS):
        close(got[row], lm(torch.tensor([prompt]), use_cache=False).logits[0, -1])


@pytest.mark.slow
@torch.no_grad()
def test_titles_score_as_literal_sequences(family, lm):
    """In the layout that is found; by the LM alone, and gated by a representation for each prompt."""
    layout = find_layout(lm, CONTEXT)
    assert layout == FAMILIES[family].layout
    batch = title_batch(Ragged.from_lists(PROMPTS), Ragged.from_lists(TITLES), 2, layout)

    def check(model, representation):
        got = title_logps(model, batch, representation)
        for number, title in enumerate(TITLES):
            row = number // 2
            inputs = {} if representation is None else {"representation": representation[row : row + 1]}
            ids = torch.tensor([PROMPTS[row] + title])
            logits = model(ids, use_cache=False, **inputs).logits[0, len(PROMPTS[row]) - 1 : -1]
            close(got[row, number % 2], -F.cross_entropy(logits, torch.tensor(title), reduction="sum"))
        return got

    plain = check(lm, None)
    model = adapted(family, lm)
    try:
        assert (check(model, representations()) - plain).abs().max() > 1e-3
    finally:
        model.unload()


@pytest.mark.slow
@torch.no_grad()
def test_decoding_is_greedy_by_hand(family, lm):
    model = adapted(family, lm)
    try:
        representation = representations()
        by_hand = []
        for row, prompt in enumerate(PROMPTS):

            def last(made, row=row, prompt=prompt):
                ids = torch.tensor([prompt + made])
                return model(ids, representation=representation[row : row + 1], use_cache=False).logits[0, -1]

            by_hand.append(greedy(last))
        assert generated(model, representation) == by_hand
    finally:
        model.unload()


def test_the_documents_promise_these_families():
    text = (Path(__file__).parents[2] / "docs/stage2.md").read_text()
    named = re.search(r"Tested families: (.*?)\.\s", text, re.S).group(1)
    assert [name.strip() for name in re.sub(r"\s+", " ", named).split(",")] == list(FAMILIES)
