"""The LM: trains `LM=tiny` on text of the training split in two phases; checks any other LM that is named.

Phase `text` (before neighbors exist): item descriptions, timelines of training events, questions with answers
of the subsample. Phase `prompts`: prompts as the LM will be asked, with retrieved histories: for all training
samples the retrieved events and then the rated target, for the subsample also the question with its answer.
Events that are held out stand in no text, and others are asked in their place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import MeanMetric
from transformers.utils import logging

from recllm.config.stages import FitConfig
from recllm.console import is_first_process, say
from recllm.errors import StageError
from recllm.eventlog.log import EventLog, Rows
from recllm.files import load_weights
from recllm.lm.gguf import export_lm
from recllm.lm.load import context_length, load_checked_lm
from recllm.lm.tiny import build_model
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Role
from recllm.retrieval.stored import Retrieval
from recllm.systems.lm import causal_lm
from recllm.systems.texts import build_pieces, check_fit, tiny_tokenizer
from recllm.text import documents
from recllm.text.pieces import Pieces
from recllm.text.prompts import Prompts
from recllm.training.blocked_cross_entropy import blocked_cross_entropy
from recllm.training.checkpoints import best, best_scores
from recllm.training.fit import fit
from recllm.training.loaders import Loaders, Stream, plan_steps
from recllm.training.optimizer import optimizer

Blocks = tuple[NDArray[np.int32], NDArray[np.float32]]
Kinds = list[tuple[documents.Matrix, float]]
"""Documents of each kind, and the loss weight of a title token in them."""


class PretrainModule(lightning.LightningModule):
    """Next-token cross-entropy, weighted by token, over packed blocks."""

    def __init__(self, model: Any, settings: FitConfig, steps: int, mean_weight: float) -> None:
        """Train all of `model`; `mean_weight` is the mean token weight of the text."""
        super().__init__()
        self.model, self.settings, self.steps, self.mean_weight = (
            model.requires_grad_(True),
            settings,
            steps,
            mean_weight,
        )
        self.score = MeanMetric()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean weighted loss in nats; the head runs only where a token has weight.

        The divisor is the text's mean weight, not the batch's, so that the parts of a batch add up.
        """
        ids, weights = batch["ids"], batch["weights"][:, 1:]
        scored = weights > 0
        hidden = self.model.get_decoder()(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[scored]
        head = self.model.get_output_embeddings().weight
        loss = blocked_cross_entropy(hidden, head, ids[:, 1:][scored], weights[scored])
        return loss / (weights.numel() * self.mean_weight)

    def training_step(self, batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        """The loss of a step."""
        self.model.train()
        return {"loss": self.loss(batch) * batch["loss_scale"]}

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Negative loss on held-out blocks of training text (higher is better, as all monitors)."""
        # A metric, as Lightning's own mean over processes rounds the number of rows a process has down.
        self.score.update(-self.loss(batch), len(batch["ids"]))
        self.log("valid/score", self.score)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and linear decay."""
        return optimizer(self, self.settings, self.steps)


@dataclass(frozen=True)
class TextRows:
    """What of the log the text is made of."""

    events: NDArray[np.bool_]
    """`[N]`, training events that are not held out."""
    questions: Rows
    """Training samples that stand as questions with answers."""

    @classmethod
    def open(cls, run: Run, log: EventLog) -> TextRows:
        """The subsample's questions; in place of those held out, as many of the other samples'.

        Raises:
            StageError: all samples are held out.
        """
        events = log.train_events().copy()
        questions = log.rows("train", run.config.subsample)
        hold_out = run.config.lm.training.hold_out
        if hold_out != "none":
            rows = log.rows("train", hold_out)
            events[log.anchors(rows)] = False
            order = log.rows("train", "1.0")
            others = order[~np.isin(order, np.concatenate([questions, rows]))]
            remaining = questions[~np.isin(questions, rows)]
            questions = np.concatenate([remaining, others])[: len(questions)]
            if not len(questions):
                raise StageError(
                    f"lm.training.hold_out={hold_out} leaves none of {len(order):,} training samples to tell "
                    "of; wanted fewer, e.g. ARGS=lm.training.hold_out=0.1"
                )
        return cls(events, questions)


def first_phase(run: Run, log: EventLog, prompts: Prompts, text_rows: TextRows) -> Kinds:
    """Descriptions, timelines of all events that are not held out, and questions with recent histories."""
    config = run.config
    k = config.prompt.history
    timelines = documents.timelines(log, prompts.pieces, np.flatnonzero(text_rows.events), 2 * k)
    # Blocks are read in random order until the budget is spent: of a large log most would be packed in vain.
    share = 2 * config.lm.training.text_tokens / max(1, _tokens(prompts, [timelines]))
    if share < 1:
        timelines = _thinned(timelines, share, config.lm.seed)
    story = [documents.descriptions(prompts.pieces, log.described_items), timelines]
    questions = documents.questions(
        prompts, text_rows.questions, log.recent(text_rows.questions, k), text_rows.events
    )
    share = config.lm.training.question_share
    return [(matrix, 1.0) for matrix in (*story, *_repeated(prompts, questions, story, share))]


def second_phase(
    run: Run, log: EventLog, prompts: Prompts, text_rows: TextRows, retrieval: Retrieval
) -> Kinds:
    """Retrieved histories before rated targets (all samples not held out) and before answers."""
    training, k = run.config.lm.training, run.config.prompt.history
    rows = log.rows("train", "1.0")
    events = rows[~log.is_drawn(rows)]  # a sampled negative was never watched
    chosen = events[text_rows.events[events]][: _documents_for(training.prompt_tokens, k)]
    rated = documents.rated(prompts, chosen, retrieval.nearest(chosen, k), text_rows.events)
    questions = documents.questions(
        prompts, text_rows.questions, retrieval.nearest(text_rows.questions, k), text_rows.events
    )
    liked = text_rows.questions[log.label[text_rows.questions] == 1]
    titles = documents.next_titles(prompts, liked, log.recent(liked, k), text_rows.events)
    body = [rated, questions, titles]
    statistics_sentence = prompts.statistics_sentence if training.timeline_events else None
    length = training.timeline_events or 2 * k
    timelines = documents.timelines(
        log, prompts.pieces, np.flatnonzero(text_rows.events), length, statistics_sentence
    )
    share = min(1.0, _share(prompts, body, [timelines], training.timeline_share))
    shown_weight = training.shown_weight
    thinned = _thinned(timelines, share, run.config.lm.seed)
    return [(rated, shown_weight), (questions, shown_weight), (titles, 1.0), (thinned, 1.0)]


def _thinned(matrix: documents.Matrix, share: float, seed: int) -> documents.Matrix:
    """A random share of the documents, in random order."""
    order = np.random.default_rng([seed, 2]).permutation(len(matrix))
    return matrix[order[: math.ceil(len(matrix) * share)]]


def _documents_for(tokens: int, history: int) -> int:
    """About as many prompts as fill that many tokens (four tokens an event); none is built in vain."""
    return max(1, tokens // (4 * history))


def _tokens(prompts: Prompts, matrices: list[documents.Matrix]) -> int:
    return int(sum(prompts.pieces.lengths[matrix].sum() for matrix in matrices))


def _share(
    prompts: Prompts, body: list[documents.Matrix], other: list[documents.Matrix], share: float
) -> float:
    """How often `other` must stand beside `body` to make up a share of all tokens."""
    return share / (1 - share) * _tokens(prompts, body) / max(1, _tokens(prompts, other))


def _repeated(
    prompts: Prompts, questions: documents.Matrix, story: list[documents.Matrix], share: float
) -> list[documents.Matrix]:
    """Questions, repeated or thinned so that they make up `share` of the text's tokens."""
    times = _share(prompts, story, [questions], share)
    whole = [questions] * int(times)
    return [*whole, questions[: round((times - int(times)) * len(questions))]]


def pack(run: Run, prompts: Prompts, text: Kinds, phase: int) -> Blocks:
    """Packed blocks, in an order drawn by the LM's seed."""
    training = run.config.lm.training
    rng = np.random.default_rng([run.config.lm.seed, phase])
    matrices, titles = zip(*text, strict=True)
    return documents.pack(prompts.pieces, matrices, training.block, rng, training.label_weight, titles)


def pretrain(run: Run, model: Any, blocks: Blocks, tokens: int, lr: float) -> dict[str, Any]:
    """Train on packed blocks; the last hundredth of them is held out for the curve."""
    training = run.config.lm.training
    ids, weights = blocks
    num_held_out = max(2, len(ids) // 100)
    count = len(ids) - num_held_out
    settings = FitConfig(
        epochs=tokens / (count * training.block),
        batch_size=max(1, training.batch_tokens // training.block),
        lr=lr,
        weight_decay=0.01,
        validations=4,
        patience=4,
        precision=training.precision,
    )
    steps, interval = plan_steps(count, settings.batch_size, settings.epochs, settings.validations)
    stream = Stream(count, settings.batch_size, run.config.lm.seed)

    def batch(indices: Rows) -> dict[str, Tensor]:
        return {
            "ids": torch.from_numpy(ids[indices].astype(np.int64)),
            "weights": torch.from_numpy(weights[indices]),
        }

    def train(step: int, rank: int, world: int) -> dict[str, Any]:
        loss_scale = stream.loss_scale(rank, world)
        return batch(stream.indices(step, rank, world)) | {"loss_scale": loss_scale}

    loaders = Loaders(
        train=train,
        steps=steps,
        valid=[(lambda indices: batch(indices + count), num_held_out)],
        valid_batch=16,
    )
    module = PretrainModule(model, settings, steps, float(weights[:, 1:].mean()))
    fit(run, module, loaders, settings, interval, ["valid/score"])
    module.load_state_dict(load_weights(best(run, "valid/score"))["state_dict"])
    tokens_seen = steps * settings.batch_size * training.block
    return {"tokens": tokens_seen, "blocks": len(ids), **best_scores(run, "valid/score")}


def check_tokens(pieces: Pieces, model: Any, tokenizer: Any) -> None:
    """Refuse texts with a token that the LM has no row for: one that was added to the tokenizer alone.

    Raises:
        StageError: the data set's texts or `wording` have such a token.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    largest = int(pieces.table.tokens.max(initial=0))
    if largest >= rows:
        raise StageError(
            f"texts hold the token {tokenizer.convert_ids_to_tokens(largest)!r} ({largest}), which the "
            f"tokenizer has and the LM has not; wanted ids below {rows}: take it out of the tokenizer "
            "or of the texts"
        )


def work(run: Run) -> None:
    """Train a phase of `tiny`, or check an LM that is loaded by path or hub id."""
    config = run.config.lm
    log = EventLog.open(run.parents[Role.LOG].folder)
    if config.model.path is not None:
        exports = []
        if config.model.is_exported:
            say(f"{config.model.package or 'the file'} {config.model.path}: its weights are made dense")
            export_lm(config.model, run.export)
            exports = [run.export]
        model, tokenizer, notes = load_checked_lm(config.model, *exports)
        for note in notes:
            say(note)
        pieces = build_pieces(run.config, log, tokenizer)
        check_tokens(pieces, model, tokenizer)
        check_fit(log, pieces, context_length(config.model, model.config))
        facts = {"path": config.model.path, "revision": config.model.revision, "answers_as_text": 0}
        run.finish(exports, {**facts, "context": context_length(config.model, model.config), **_size(model)})
        return
    export = run.export
    text_rows = TextRows.open(run, log)
    counts = {
        "answers_as_text": len(text_rows.questions),
        "ratings_as_text": int((log.rating[text_rows.events] > 0).sum()),
    }
    if Role.LM in run.parents:
        model, tokenizer = causal_lm(config.model, run.parents[Role.LM])
        prompts = Prompts(log, build_pieces(run.config, log, tokenizer), config.tiny.context)
        text = second_phase(
            run, log, prompts, text_rows, Retrieval.open(run.parents[Role.NEIGHBORS].folder, log)
        )
        tokens, lr, phase = config.training.prompt_tokens, config.training.prompt_lr, 2
    else:
        tokenizer = tiny_tokenizer(run.config, log, config.tiny)
        torch.manual_seed(config.seed)
        model = build_model(config.tiny, tokenizer)
        prompts = Prompts(log, build_pieces(run.config, log, tokenizer), config.tiny.context)
        check_fit(log, prompts.pieces, prompts.max_length)
        text = first_phase(run, log, prompts, text_rows)
        tokens, lr, phase = config.training.text_tokens, config.training.lr, 1
    blocks = pack(run, prompts, text, phase)
    say(
        f"{len(blocks[0]) * config.training.block:,} tokens of text, "
        f"{tokens:,} to train on, {_size(model)['weights']:,} weights"
    )
    figures = pretrain(run, model, blocks, tokens, lr)
    if not is_first_process():
        return
    logging.disable_progress_bar()
    model.save_pretrained(export)
    tokenizer.save_pretrained(export)
    run.finish([export], {**figures, **counts, **_size(model), "vocabulary": len(tokenizer)})


def _size(model: Any) -> dict[str, int]:
    return {"weights": sum(value.numel() for value in model.parameters())}
