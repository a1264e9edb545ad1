"""Text on which an LM is trained before it is tuned: rows of pieces, packed into blocks of tokens.

Every function gives piece ids [documents, P] out of the prompts' table; `pack` makes tokens of them.
The documents are of the rows that the caller gives, so of training rows only if those are. Of a history they
hold the events that the caller allows: in a random split held-out events stand there too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from recllm.eventlog.log import EventLog
    from recllm.text.prompts import Pieces, Prompts

Ints = NDArray[np.integer[Any]]
Matrix = NDArray[np.int32]
Mask = NDArray[np.bool_]


def descriptions(pieces: Pieces, items: Ints) -> Matrix:
    """Descriptions of dense items [n]: BOS, title, what the description says behind it, EOS."""
    items = np.asarray(items)
    return _columns(len(items), pieces.head, pieces.item[items], pieces.description[items], pieces.eos)


def timelines(
    log: EventLog,
    pieces: Pieces,
    rows: Ints,
    length: int,
    statistics_sentence: Callable[[Ints, Ints], Matrix] | None = None,
) -> Matrix:
    """Events of a user, one after another, as the history of a prompt shows them.

    Args:
        log: The event log.
        pieces: The text pieces.
        rows: Events, in any order; each stands in one document.
        length: Most events of a document; a longer timeline goes on in the next one.
        statistics_sentence: `Prompts.statistics_sentence`, what then stands between a title and its rating;
            None: nothing does.

    Returns:
        [documents, 2 length + 4]: BOS, profile, sentence, title, rating, title, rating, ..., EOS; with
        statistics as many more an event as their sentence has parts.
    """
    rows = np.sort(np.asarray(rows, np.int64))
    user = log.user[rows]
    first = np.flatnonzero(np.diff(user, prepend=-1))
    index = np.arange(len(rows))
    place = index - np.repeat(first, np.diff(np.append(first, len(rows))))
    document = np.cumsum(place % length == 0) - 1
    count = int(document[-1]) + 1 if len(rows) else 0
    sentence = [] if statistics_sentence is None else [statistics_sentence(rows, log.item[rows])]
    event = _columns(len(rows), pieces.item[log.item[rows]], *sentence, pieces.rating[log.rating[rows]])
    events = np.zeros((count, length, event.shape[1]), np.int32)
    events[document, place % length] = event
    owner = user[place % length == 0]
    timeline = events.reshape(count, length * event.shape[1])
    return _columns(count, pieces.head, pieces.profile[owner], pieces.intro, timeline, pieces.eos)


def questions(prompts: Prompts, rows: Ints, history: Ints, allowed: Mask) -> Matrix:
    """Yes/No prompts of labeled rows [n], their answers, EOS; of history [n, k] the `allowed` [N] events."""
    pieces = prompts.pieces
    matrix, _ = prompts.ctr_matrix(rows, _without_others(allowed, history))
    answer = np.where(prompts.log.label[np.asarray(rows)] > 0, pieces.yes, pieces.no)
    return _columns(len(matrix), matrix, answer, pieces.eos)


def rated(prompts: Prompts, rows: Ints, history: Ints, allowed: Mask) -> Matrix:
    """The rows' events [n], with their rating and EOS, behind the `allowed` [N] events of a history [n, k].

    With retrieved histories this is what a prompt looks like, and the rating is what it has to teach. With
    statistics their sentence stands between the title and its rating, as it follows the title of a question.
    """
    pieces = prompts.pieces
    rows = np.asarray(rows, np.int64)
    events = prompts.events(_without_others(allowed, history))
    title, rating = prompts.events(rows[:, None]).T
    sentence = prompts.statistics_sentence(rows, prompts.log.item[rows])
    profile = pieces.profile[prompts.log.user[rows]]
    return _columns(
        len(rows), pieces.head, profile, pieces.intro, events, title, sentence, rating, pieces.eos
    )


def next_titles(prompts: Prompts, rows: Ints, history: Ints, allowed: Mask) -> Matrix:
    """Next-title prompts of rows [n], their titles, and EOS; of history [n, k] the `allowed` [N] events."""
    pieces = prompts.pieces
    matrix, _ = prompts.ranking_matrix(rows, _without_others(allowed, history))
    return _columns(len(matrix), matrix, pieces.item[prompts.log.item[np.asarray(rows)]], pieces.eos)


def pack(
    pieces: Pieces,
    documents: Sequence[Matrix],
    context: int,
    rng: np.random.Generator,
    label_weight: float = 4.0,
    title_weights: Sequence[float] = (),
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Documents of all kinds, shuffled, one behind another in blocks; EOS and BOS stand between them.

    A document that does not fit goes on in the next block. Unfilled places of the last block hold EOS with
    weight 0.

    Args:
        pieces: The text pieces.
        documents: Piece ids [n, P] each.
        context: Tokens of a block.
        rng: Draws the order of the documents.
        label_weight: Loss weight of the tokens of ratings and answers; template and profiles weigh 0.
        title_weights: That of titles and EOS, of each of the kinds of documents; 1 of all where it is empty.

    Returns:
        Tokens i32 [blocks, context], and each token's weight as a target, f32 [blocks, context].
    """
    kinds = zip(documents, title_weights or [1.0] * len(documents), strict=True)
    tokens = [pieces.assemble(matrix) for matrix in documents]
    weighed = [pieces.weights(matrix, (0.0, title, label_weight)) for matrix, title in kinds]
    weights = np.concatenate([np.zeros(0, np.float32), *weighed])
    lengths = np.concatenate([np.zeros(0, np.int64), *(part.lengths for part in tokens)])
    flat = np.concatenate([np.zeros(0, np.int32), *(part.tokens for part in tokens)])
    order = rng.permutation(len(lengths))
    ends = np.cumsum(lengths)
    length = lengths[order]
    # Token number t of the shuffled stream lies where its document does, as far in.
    source = np.repeat((ends - lengths)[order] - (np.cumsum(length) - length), length) + np.arange(len(flat))
    blocks = -(-len(flat) // context)
    fill = int(pieces.table[pieces.eos][0])
    out = np.full(blocks * context, fill, np.int32)
    weight = np.zeros(blocks * context, np.float32)
    out[: len(flat)] = flat[source]
    weight[: len(flat)] = weights[source]
    return out.reshape(blocks, context), weight.reshape(blocks, context)


def _without_others(allowed: Mask, history: Ints) -> NDArray[np.int64]:
    """The history [n, k] with -1 in place of events that are not allowed."""
    history = np.asarray(history, np.int64)
    return np.where(allowed[history], history, -1)


def _columns(count: int, *parts: int | Ints) -> Matrix:
    """Piece ids side by side: a number fills a column, [n] is a column, [n, P] are P columns."""
    wide = [np.full((count, 1), part) if isinstance(part, int) else part for part in parts]
    return np.concatenate([part if part.ndim == 2 else part[:, None] for part in wide], 1).astype(np.int32)
