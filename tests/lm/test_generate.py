import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recllm.lm.generate import decode_constrained, normalize, valid_ratio
from recllm.lm.layout import title_batch
from recllm.lm.predict import candidate_scores, title_choices
from recllm.lm.tasks import NextTitleLists
from recllm.text.collate import Ragged
from recllm.text.prompts import Prompts


class Says(torch.nn.Module):
    """Generates given token sequences, right padded, behind whatever it is asked."""

    def __init__(self, texts, pad):
        super().__init__()
        self.texts, self.pad, self.calls = list(texts), pad, []
        self.weight = torch.nn.Parameter(torch.zeros(1))  # tells the device

    def generate(self, input_ids, attention_mask, max_new_tokens, **extra):
        generated = [self.texts.pop(0) for _ in input_ids]
        width = max(map(len, generated))
        self.calls.append(
            SimpleNamespace(ids=input_ids, mask=attention_mask, most=max_new_tokens, extra=extra)
        )
        made = torch.tensor([[*tokens, *[self.pad] * (width - len(tokens))] for tokens in generated])
        return torch.cat([input_ids, made], 1)


@pytest.fixture
def task(demo_log, tiny_lm):
    rows, candidates = demo_log.ranking("test", "uniform20")
    rows, candidates = rows[:5], candidates[:5]
    recent = demo_log.recent(rows, 4)
    return NextTitleLists(tiny_lm.prompts, demo_log, rows, recent, candidates, torch.arange(5.0)[:, None])


def test_what_is_a_candidate_and_what_is_the_chosen_one(task, tiny_lm):
    tokenizer, pieces = tiny_lm.tokenizer, tiny_lm.pieces

    def title(row, place):
        return [int(token) for token in pieces.table[pieces.item[task.candidates[row, place]]]]

    def text(words):
        return tokenizer(words, add_special_tokens=False)["input_ids"]

    eos = tokenizer.eos_token_id
    chosen = task.chosen
    generated = [
        [*title(0, chosen[0]), eos],
        [*title(1, (chosen[1] + 1) % 20), eos],
        [*title(2, chosen[2])[:-1], eos],  # cut short: no candidate's title
        text(f"  {tokenizer.decode(title(3, chosen[3])).upper()} "),  # case and spaces do not matter
        text("Nothing of the kind"),
    ]
    model = Says(generated, tokenizer.pad_token_id)
    out = valid_ratio(model, tokenizer, task, size=2)
    assert out.tolist() == [[1, 1], [1, 0], [0, 0], [1, 1], [0, 0]]
    assert out.dtype == np.float32
    assert [len(call.ids) for call in model.calls] == [2, 2, 1]
    representation = torch.cat([call.extra["representation"] for call in model.calls])
    assert representation.flatten().tolist() == [0, 1, 2, 3, 4]
    assert all(call.extra["do_sample"] is False for call in model.calls)
    longest = max(len(title(row, place)) for row in range(5) for place in range(20)) + 1  # with EOS
    assert all(call.most >= longest for call in model.calls)


def test_prompts_are_left_padded_and_hold_neither_title_nor_list(task, tiny_lm):
    model = Says([[5]] * 5, tiny_lm.tokenizer.pad_token_id)
    valid_ratio(model, tiny_lm.tokenizer, task)
    prompts = tiny_lm.prompts.ranking(task.rows, task.history)
    for place in range(5):
        length = prompts.lengths[place]
        assert model.calls[0].ids[place, -length:].tolist() == prompts[place].tolist()
        assert model.calls[0].mask[place].sum() == length


def test_greedy_generation_is_the_same_in_any_batch(task, tiny_lm):
    """A real model, left padding and all: one row at a time says what all say together."""
    task.representation = None
    torch.manual_seed(0)
    together = valid_ratio(tiny_lm.model, tiny_lm.tokenizer, task, size=5)
    alone = valid_ratio(tiny_lm.model, tiny_lm.tokenizer, task, size=1)
    np.testing.assert_array_equal(together, alone)


def test_one_long_title_shortens_its_own_prompts_only(demo_log, tiny_lm, task):
    """Of 150 tokens: rows that do not list it keep their history; all are decoded within the context."""
    pieces = copy.copy(tiny_lm.pieces)
    lists = [set(row) for row in task.candidates.tolist()]
    long = next(item for item in task.candidates[0].tolist() if sum(item in row for row in lists) < 5)
    number = len(pieces.table)
    table = Ragged(
        np.concatenate([pieces.table.tokens, np.full(150, pieces.table[pieces.item[long]][0], np.int32)]),
        np.append(pieces.table.offsets, pieces.table.offsets[-1] + 150),
    )
    item = pieces.item.copy()
    item[long] = number
    pieces = replace(pieces, table=table, item=item, kind=np.append(pieces.kind, 1))
    limit = int(tiny_lm.prompts.ranking(task.rows, task.history).lengths.max()) + 40
    limited = Prompts(demo_log, pieces, max(limit, 151 + 40))
    outlier = NextTitleLists(limited, demo_log, task.rows, task.history, task.candidates, None)
    prompts = limited.ranking(task.rows, task.history, reserve=limited.room(task.candidates))
    has = (task.candidates == long).any(1)
    assert not prompts.cut[~has].any()
    for batch in (outlier(np.arange(5)), outlier(np.arange(5), outlier.chosen[:, None])):
        first = batch["prompt"]["branch"] == 0  # the prompt is the same, whichever candidates are scored
        assert first.sum() == prompts.lengths.sum()
    model = Says([[5]] * 5, tiny_lm.tokenizer.pad_token_id)
    valid_ratio(model, tiny_lm.tokenizer, outlier)
    for call in model.calls:
        assert int(call.mask.sum(1).max()) + call.most <= limited.max_length
    assert sum(len(call.ids) for call in model.calls) == 5


@pytest.mark.parametrize(("text", "wanted"), [(" A  b\nC ", "a b c"), ("STRASSE", "strasse"), ("ß", "ss")])
def test_normalize(text, wanted):
    assert normalize(text) == wanted


@pytest.mark.parametrize("seed", range(4))
def test_constrained_decoding_equals_generation_that_may_only_spell_candidates(task, tiny_lm, seed):
    """The walk down the trie of scored titles, and transformers' own constrained greedy search."""
    model = copy.deepcopy(tiny_lm.model)
    torch.manual_seed(seed)
    with torch.no_grad():  # an untrained LM has hardly a preference
        model.get_output_embeddings().weight.normal_(0, 1)
    task.representation = None
    tokenizer, pieces = tiny_lm.tokenizer, tiny_lm.pieces
    choices = title_choices(model, task)
    np.testing.assert_allclose(choices[..., 0], candidate_scores(model, task), rtol=1e-6)
    assert (choices[..., 1].sum(1) == 1).all()
    for row in range(5):
        titles = [[*pieces.table[piece].tolist(), tokenizer.eos_token_id] for piece in task.texts[row]]
        prompt = task.prompts.ranking(task.rows[[row]], task.history[[row]])[0].tolist()

        def allowed(_, ids, titles=titles, prompt=prompt):
            generated = ids[len(prompt) :].tolist()
            return [
                title[len(generated)]
                for title in titles
                if title[: len(generated)] == generated and len(title) > len(generated)
            ]

        made = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=40, do_sample=False, prefix_allowed_tokens_fn=allowed,
        )  # fmt: skip
        generated = made[0, len(prompt) :].tolist()
        assert choices[row, :, 1].argmax() == titles.index(generated)


def test_constrained_decoding_by_hand():
    # Titles A B E, A C E, D E, A B E again, and (second prompt) D E alone. p(A) > p(D), so D is out at once,
    # although it is likelier as a whole; then p(B) > p(C): both that read A B share the choice.
    titles = [[3, 4, 2], [3, 5, 2], [6, 2], [3, 4, 2], [6, 2]]
    batch = title_batch(Ragged.from_lists([[1], [1]]), Ragged.from_lists(titles), np.array([4, 1]))
    p = [[0.6, 0.3, 0.1], [0.6, 0.2, 0.9], [0.3, 0.9], [0.6, 0.3, 0.1], [0.01, 0.01]]
    logps = torch.tensor([value for title in p for value in title]).log()
    assert decode_constrained(batch, logps).tolist() == [[0.5, 0, 0, 0.5], [1, 0, 0, 0]]


def test_a_title_that_begins_another_ends_where_its_end_is_likelier():
    titles = [[3, 2], [3, 4, 2]]
    batch = title_batch(Ragged.from_lists([[1]]), Ragged.from_lists(titles), 2)
    for end, wanted in ((0.6, [[1, 0]]), (0.3, [[0, 1]])):
        logps = torch.tensor([0.5, end, 0.5, 0.4, 0.001]).log()
        assert decode_constrained(batch, logps).tolist() == wanted
