"""The text pieces of a dataset's prompts, each tokenized exactly once.

A prompt is a row of piece ids, and its tokens are gathered from one flat table. Tuning, preference and
evaluation read the same table: a text has the same tokens, BOS and boundaries everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recllm.eventlog.ids import FIRST_ID
from recllm.eventlog.statistics import LEVELS, STATISTICS, words
from recllm.files import load_array, write_array, write_json
from recllm.text.collate import Ragged
from recllm.text.config import Wording
from recllm.text.formats import Field, Format, parse_format

if TYPE_CHECKING:
    import polars as pl
    from transformers import PreTrainedTokenizerBase

Ints = NDArray[np.integer[Any]]

CONSTANT = 0
"""Kind of a piece that the template gives: nothing to learn."""
TEXT = 1
"""Kind of a piece that is text to learn in pretraining: titles, descriptions, EOS."""
LABEL = 2
"""Kind of a piece that is an opinion: a rating or an answer."""

# What a piece is tokenized behind. A letter stands for the title before it: many tokenizers merge `)` with a
# line break, none merges a letter with one.
# The tiny LM merges letters with anything; a line break is a token of its own there, hence the second choice.
AFTER_LINE = ("\n",)
AFTER_TITLE = ("a", "\n")


def fill(template: str, frame: pl.DataFrame, key: str = "wording") -> list[str]:
    r"""One text for each row of a table: the format string over its columns.

    Args:
        template: Format string, for example `"The user is a {gender}.\n"`; empty: every text is empty.
        frame: Rows by dense id. A column that is empty leaves its line out, or reads `unknown` there, see
            `recllm.text.formats`; the reserved ids 0 and 1 have no text.
        key: Where the template is configured, for errors.

    Raises:
        ConfigError: The template names a column that the table lacks.
        ValueError: A value does not go with the format behind its column's name.
    """
    if not template:
        return [""] * frame.height
    form = Format.of(template, frame.columns, key)
    names = form.columns
    if not names:
        return [form.text({})] * frame.height
    rows = frame.select(names).rows()
    texts = {}
    for row in set(rows[FIRST_ID:]):
        try:
            texts[row] = form.text(dict(zip(names, row, strict=True)))
        except ValueError as error:
            raise ValueError(f"{key}={template!r}: {error}, of {row}; change the format there") from error
    return [""] * min(FIRST_ID, len(rows)) + [texts[row] for row in rows[FIRST_ID:]]


def continuations(names: Sequence[str], descriptions: Sequence[str]) -> list[str]:
    """What descriptions say behind the items' names: the rest of one that begins with the name, else a line.

    Args:
        names: of the items.
        descriptions: of the same items.
    """
    return [
        description[len(name) :] if description.startswith(name) else f"\n{description}"
        for name, description in zip(names, descriptions, strict=True)
    ]


def sentence_parts(template: str) -> list[tuple[int, list[str]]]:
    """Parts of the sentence of statistics, in order.

    Args:
        template: Format string over the names of `STATISTICS` (`wording.known`).

    Returns:
        Of each part the column of the statistics' codes that says which of its texts it is, and the text of
        each code, [LEVELS]; a part between two statistics has one text for all.

    Raises:
        ConfigError: It names what is no statistic.
    """
    parts = []
    for part in parse_format(template, STATISTICS, "wording.known"):
        if isinstance(part, Field):
            parts.append((STATISTICS.index(part.column), words(part.column)))
        else:
            parts.append((0, [part] * LEVELS))
    return parts


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _answers(
    tokenizer: PreTrainedTokenizerBase, ask: str, yes: str, no: str
) -> tuple[list[int], list[int], list[int]]:
    """Tokens behind `ask` that both answers share, and what is left of each answer."""
    start = _ids(tokenizer, ask)
    full = [_ids(tokenizer, ask + answer) for answer in (yes, no)]
    for answer, tokens in zip((yes, no), full, strict=True):
        if tokens[: len(start)] != start:
            raise ValueError(f"answer {answer!r} merges with {ask[-10:]!r} before it: change `wording.ask`")
    same = len(start)
    while same < min(map(len, full)) and full[0][same] == full[1][same]:
        same += 1
    if same in map(len, full):
        raise ValueError(
            f"answers {yes!r} and {no!r} have no token in which they differ: change wording.yes or wording.no"
        )
    return full[0][len(start) : same], full[0][same:], full[1][same:]


def resolve_answers(
    tokenizer: PreTrainedTokenizerBase, ask: str, yes: str, no: str
) -> tuple[list[int], int, int]:
    """Tokens in which the two answers differ.

    Args:
        tokenizer: Of the LM.
        ask: Text right before the answer.
        yes: Answer for a liked item, with its leading space.
        no: The other answer.

    Returns:
        Token ids that both answers begin with (they belong to the prompt), the next token of yes, that of no.

    Raises:
        ValueError: An answer merges with the text before it, or one answer is the beginning of the other.
    """
    shared, rest_yes, rest_no = _answers(tokenizer, ask, yes, no)
    return shared, rest_yes[0], rest_no[0]


_ARRAYS = ("kind", "item", "description", "rating", "profile")
_CONSTANTS = (
    *(
        "head",
        "intro",
        "question",
        "ask",
        "next",
        "choose",
        "newline",
        "suffix",
        "eos",
        "answer",
        "yes",
        "no",
    ),
    *("yes_id", "no_id"),
)
_CONSTANTS_FILE = "constants.json"


@dataclass(frozen=True)
class Pieces:
    """Every text piece of a dataset's prompts, tokenized once.

    Attributes:
        table: Tokens of every piece; piece 0 is empty.
        kind: i8 [pieces], CONSTANT, TEXT or LABEL.
        item: i32 [n_items], piece of a dense item id's name.
        description: i32 [n_items], piece of what its description says behind the name.
        rating: i32 [codes], piece of a rating code.
        profile: i32 [n_users], piece of a dense user id's profile.
        statistics_sentence: The sentence about the target's statistics, part by part: the column of the
            statistics' codes that chooses the piece, and i32 [LEVELS], the piece of each code. Empty: prompts
            have no such sentence.
        head: Piece of BOS and the LM's prefix.
        answer: Piece of the tokens that both answers begin with.
        yes: Piece of what is left of the answer yes.
        no: Piece of what is left of the answer no.
        yes_id: First token of `yes`, the one that is scored.
        no_id: First token of `no`.
        intro, question, ask, next, choose, newline, suffix, eos: Pieces of the constants.
    """

    table: Ragged
    kind: NDArray[np.int8]
    item: NDArray[np.int32]
    description: NDArray[np.int32]
    rating: NDArray[np.int32]
    profile: NDArray[np.int32]
    head: int
    intro: int
    question: int
    ask: int
    next: int
    choose: int
    newline: int
    suffix: int
    eos: int
    answer: int
    yes: int
    no: int
    yes_id: int
    no_id: int
    statistics_sentence: tuple[tuple[int, NDArray[np.int32]], ...] = ()
    lengths: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        """Keeps the lengths of all pieces, i64 [pieces]."""
        object.__setattr__(self, "lengths", self.table.lengths)

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        wording: Wording,
        titles: Sequence[str | None],
        rating_levels: Sequence[str],
        profiles: Sequence[str],
        prefix: str = "",
        suffix: str = "",
        descriptions: Sequence[str] | None = None,
        statistics: bool = False,
        shows_labels: bool = False,
    ) -> Pieces:
        """Tokenizes all pieces.

        A BOS opens the prompt if and only if the tokenizer names one, whether or not it adds it itself. Where
        a title or profile spells a special token, it is read as plain text: no title can end a prompt.

        Args:
            tokenizer: A fast tokenizer.
            wording: The dataset's words.
            titles: Title of every dense item id; None or empty: no text.
            rating_levels: Text of the rating codes 1, 2, ...
            profiles: Text of every dense user id, see `fill`.
            prefix: Text before the prompt, what a chat LM wants there.
            suffix: Text between the prompt and the answer or title.
            descriptions: What pretraining says of every dense item id, see `fill`; None: nothing. One that
                begins with the item's name continues it, another one stands on its own line.
            statistics: Whether Yes/No prompts have the sentence of statistics, `wording.known`.
            shows_labels: Whether two codes follow, of events without a rating: disliked, liked.

        Raises:
            ValueError: `wording.known` names what is no statistic, a piece merges with the text before it,
                the answers do not differ, or there is no EOS.
        """
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no EOS token, an LM needs one to end a title: choose another LM"
            )
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        answers = [wording.yes, wording.no]
        if suffix[-1:].isspace():  # an answer that begins a line has no space before it
            answers = [answer.lstrip() for answer in answers]
        shared, yes, no = _answers(tokenizer, wording.ask + suffix, *answers)
        names = wording.names(titles)
        table = _Table(tokenizer)
        lines = [wording.intro, wording.question, wording.next, wording.choose]
        intro, question, next_, choose = table.add_texts(lines, AFTER_LINE, CONSTANT, plain=False).tolist()
        ends = [wording.ask, "\n", suffix]
        ask, newline, end = table.add_texts(ends, AFTER_TITLE, CONSTANT, plain=False).tolist()
        item = table.add_texts(names, AFTER_LINE, TEXT)
        behind = [""] * len(names) if descriptions is None else continuations(names, descriptions)
        description = table.add_texts(behind, AFTER_TITLE, TEXT)
        profile = table.add_texts(profiles, AFTER_LINE, CONSTANT)
        rating = table.add_texts(wording.ratings(rating_levels, shows_labels)[1:], AFTER_TITLE, LABEL)
        statistics_sentence = [
            (column, table.add_texts(texts, AFTER_TITLE, CONSTANT))
            for column, texts in sentence_parts(wording.known if statistics else "")
        ]
        return cls(
            item=item,
            description=description,
            profile=profile,
            statistics_sentence=tuple(statistics_sentence),
            rating=np.concatenate([np.array([newline], np.int32), rating]),
            head=table.add([*bos, *_ids(tokenizer, prefix)], CONSTANT),
            intro=intro,
            question=question,
            next=next_,
            choose=choose,
            ask=ask,
            newline=newline,
            suffix=end,
            eos=table.add([tokenizer.eos_token_id], TEXT),
            answer=table.add(shared, CONSTANT),
            yes=table.add(yes, LABEL),
            no=table.add(no, LABEL),
            yes_id=yes[0],
            no_id=no[0],
            table=Ragged.from_lists(table.tokens),
            kind=np.array(table.kinds, np.int8),
        )

    def save(self, folder: Path) -> None:
        """Write the pieces into a folder, so that nobody who opens it needs to tokenize."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {"tokens": self.table.tokens, "offsets": self.table.offsets}
        parts = [pieces for _, pieces in self.statistics_sentence]
        arrays["sentence"] = np.array(parts, np.int32).reshape(len(parts), LEVELS)
        for name, values in arrays.items():
            write_array(folder / f"{name}.npy", values)
        constants: dict[str, Any] = {name: int(getattr(self, name)) for name in _CONSTANTS}
        constants["sentence"] = [column for column, _ in self.statistics_sentence]
        write_json(folder / _CONSTANTS_FILE, constants)

    @classmethod
    def open(cls, folder: Path) -> Pieces:
        """What `save` wrote, memory-mapped.

        Raises:
            OSError: a file is missing.
        """
        constants = json.loads((folder / _CONSTANTS_FILE).read_text(encoding="utf-8"))
        columns = constants.pop("sentence")
        arrays: dict[str, Any] = {name: load_array(folder / f"{name}.npy") for name in _ARRAYS}
        table = Ragged(load_array(folder / "tokens.npy"), load_array(folder / "offsets.npy"))
        sentence = tuple(zip(columns, load_array(folder / "sentence.npy"), strict=True))
        return cls(table=table, statistics_sentence=sentence, **arrays, **constants)

    def count_tokens(self, matrix: Ints) -> NDArray[np.int64]:
        """Lengths i64 [B] of what `assemble(matrix)` gives, without a token of it."""
        return self.lengths[np.asarray(matrix)].sum(1)

    def assemble(self, matrix: Ints) -> Ragged:
        """Tokens of rows of pieces: piece ids [B, P] -> B sequences, the row's pieces one after another."""
        pieces = np.asarray(matrix)
        lengths = self.lengths[pieces]
        offsets = np.zeros(len(pieces) + 1, np.int64)
        np.cumsum(lengths.sum(1), out=offsets[1:])
        flat = lengths.ravel()
        shift = self.table.offsets[pieces.ravel()] - (np.cumsum(flat) - flat)
        return Ragged(self.table.tokens[np.repeat(shift, flat) + np.arange(offsets[-1])], offsets)

    def weights(self, matrix: Ints, by_kind: Sequence[float]) -> NDArray[np.float32]:
        """Weight of every token of `assemble(matrix)`, f32; `by_kind`: those of CONSTANT, TEXT, LABEL."""
        pieces = np.asarray(matrix).ravel()
        return np.repeat(np.asarray(by_kind, np.float32)[self.kind[pieces]], self.lengths[pieces])

    @property
    def longest_completion(self) -> int:
        """Tokens of the longest title, with its EOS."""
        return int(self.lengths[self.item].max()) + 1


class _Table:
    """Pieces in the making, in the order of their ids; piece 0 is empty.

    Attributes:
        tokens: the token ids of each piece.
        kinds: CONSTANT, TEXT or LABEL, of each piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[list[int]] = [[]]
        self.kinds: list[int] = [CONSTANT]

    def add(self, tokens: list[int], kind: int) -> int:
        """Adds a piece of these tokens; returns its id."""
        self.tokens.append(tokens)
        self.kinds.append(kind)
        return len(self.tokens) - 1

    def add_texts(
        self, texts: Sequence[str], anchors: Sequence[str], kind: int, plain: bool = True
    ) -> NDArray[np.int32]:
        """Adds a piece for each distinct text, tokenized as `_behind` does; returns each text's, i32 [n].

        An empty text is piece 0.
        """
        distinct = list(dict.fromkeys(text for text in texts if text))
        place = {text: number for number, text in enumerate(distinct, len(self.tokens))}
        if distinct:
            self.tokens.extend(_behind(self.tokenizer, distinct, anchors, plain))
            self.kinds.extend([kind] * len(distinct))
        return np.fromiter((place.get(text, 0) for text in texts), np.int32, len(texts))


def _behind(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], anchors: Sequence[str], plain: bool
) -> list[list[int]]:
    """Tokens of each text behind the first anchor that none merges with; `plain` spells special ones out."""
    for anchor in anchors:
        start = _ids(tokenizer, anchor)
        encoded: list[list[int]] = tokenizer(
            [anchor + text for text in texts],
            add_special_tokens=False,
            split_special_tokens=plain,
            return_attention_mask=False,
        )["input_ids"]
        merged = [text for text, tokens in zip(texts, encoded, strict=True) if tokens[: len(start)] != start]
        if not merged:
            return [tokens[len(start) :] for tokens in encoded]
    raise ValueError(f"{merged[0]!r} merges with {anchor!r} before it in this tokenizer: change one")
