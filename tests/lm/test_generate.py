from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recllm.lm.generate import normalize, valid_ratio
from recllm.lm.tasks import Titles


class Says(torch.nn.Module):
    """Generates given token sequences, right padded, behind whatever it is asked."""

    def __init__(self, texts, pad):
        super().__init__()
        self.texts, self.pad, self.asked = list(texts), pad, []
        self.weight = torch.nn.Parameter(torch.zeros(1))  # tells the device

    def generate(self, input_ids, attention_mask, max_new_tokens, **extra):
        said = [self.texts.pop(0) for _ in input_ids]
        width = max(map(len, said))
        self.asked.append(
            SimpleNamespace(ids=input_ids, mask=attention_mask, most=max_new_tokens, extra=extra)
        )
        made = torch.tensor([[*tokens, *[self.pad] * (width - len(tokens))] for tokens in said])
        return torch.cat([input_ids, made], 1)


@pytest.fixture
def task(demo_log, tiny_lm):
    rows, candidates = demo_log.ranking("test", "uniform20")
    rows, candidates = rows[:5], candidates[:5]
    recent = demo_log.recent(rows, 4)
    return Titles(tiny_lm.prompts, demo_log, rows, recent, candidates, torch.arange(5.0)[:, None])


def test_what_is_a_candidate_and_what_is_the_chosen_one(task, tiny_lm):
    tokenizer, pieces = tiny_lm.tokenizer, tiny_lm.pieces

    def title(row, place):
        return [int(token) for token in pieces.table[pieces.item[task.candidates[row, place]]]]

    def text(words):
        return tokenizer(words, add_special_tokens=False)["input_ids"]

    eos = tokenizer.eos_token_id
    chosen = task.chosen
    said = [
        [*title(0, chosen[0]), eos],
        [*title(1, (chosen[1] + 1) % 20), eos],
        [*title(2, chosen[2])[:-1], eos],  # cut short: no candidate's title
        text(f"  {tokenizer.decode(title(3, chosen[3])).upper()} "),  # case and spaces do not matter
        text("Nothing of the kind"),
    ]
    model = Says(said, tokenizer.pad_token_id)
    out = valid_ratio(model, tokenizer, task, size=2)
    assert out.tolist() == [[1, 1], [1, 0], [0, 0], [1, 1], [0, 0]]
    assert out.dtype == np.float32
    assert [len(call.ids) for call in model.asked] == [2, 2, 1]
    given = torch.cat([call.extra["representation"] for call in model.asked])
    assert given.flatten().tolist() == [0, 1, 2, 3, 4]
    assert all(call.extra["do_sample"] is False for call in model.asked)
    longest = max(len(title(row, place)) for row in range(5) for place in range(20)) + 1  # with EOS
    assert all(call.most >= longest for call in model.asked)


def test_prompts_are_left_padded_and_hold_neither_title_nor_list(task, tiny_lm):
    model = Says([[5]] * 5, tiny_lm.tokenizer.pad_token_id)
    valid_ratio(model, tiny_lm.tokenizer, task)
    prompts = tiny_lm.prompts.ranking(task.rows, task.history)
    for place in range(5):
        length = prompts.lengths[place]
        assert model.asked[0].ids[place, -length:].tolist() == prompts[place].tolist()
        assert model.asked[0].mask[place].sum() == length


def test_greedy_generation_is_the_same_in_any_batch(task, tiny_lm):
    """A real model, left padding and all: one row at a time says what all say together."""
    task.representation = None
    torch.manual_seed(0)
    together = valid_ratio(tiny_lm.model, tiny_lm.tokenizer, task, size=5)
    alone = valid_ratio(tiny_lm.model, tiny_lm.tokenizer, task, size=1)
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(("text", "wanted"), [(" A  b\nC ", "a b c"), ("STRASSE", "strasse"), ("ß", "ss")])
def test_normalize(text, wanted):
    assert normalize(text) == wanted
