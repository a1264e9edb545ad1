"""The encoder of two-tower systems: trains a small BERT on masked tokens, or checks one that is named.

Its text are the texts that the towers will read: timelines of training events, as many as a history holds,
and item descriptions. No label of a sample is read but the ratings of training events.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import MeanMetric
from transformers.utils import logging

from recllm.config.stages import FitConfig
from recllm.console import is_first_process, say
from recllm.errors import StageError
from recllm.eventlog.log import EventLog, Rows
from recllm.files import load_weights
from recllm.lm.config import EncoderTrainingConfig, LmConfig
from recllm.lm.encoder import add_mask_token, build_encoder, load_encoder, mask_tokens
from recllm.lm.wheel import unpack
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Role
from recllm.systems.texts import build_pieces, tiny_tokenizer, tower_prompts
from recllm.text import documents
from recllm.text.collate import Ragged, pad_right
from recllm.text.prompts import Pieces
from recllm.training.checkpoints import best, best_scores
from recllm.training.fit import fit
from recllm.training.loaders import Loaders, Stream, plan_steps
from recllm.training.optimizer import optimizer

KINDS = (0.0, 1.0)  # weights of template and title; a rating's is configured


class MaskedModule(lightning.LightningModule):
    """Cross-entropy of masked tokens, weighted by token; the head runs at those tokens only."""

    def __init__(self, model: Any, settings: FitConfig, steps: int) -> None:
        """Train all of `model`, a BERT with its masked-token head."""
        super().__init__()
        self.model, self.settings, self.steps = model, settings, steps
        self.score = MeanMetric()

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Mean weighted loss in nats; the divisor is the weight that is to be expected, not that drawn."""
        states = self.model.base_model(**batch["text"]).last_hidden_state
        logits = self.model.cls(states[batch["at_text"], batch["at_token"]])
        losses = F.cross_entropy(logits.float(), batch["target"], reduction="none")
        return (losses * batch["weight"]).sum() / batch["expected"]

    def training_step(self, batch: dict[str, Any], index: int) -> dict[str, Tensor]:
        """The loss of a step."""
        self.model.train()
        return {"loss": self.loss(batch)}

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        """Negative loss on held-out texts of the training split (higher is better, as all monitors)."""
        self.score.update(-self.loss(batch), len(batch["text"]["input_ids"]))
        self.log("valid/score", self.score)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and linear decay."""
        return optimizer(self, self.settings, self.steps)


class Texts:
    """Texts with masked tokens, as functions from indices and a seed to batches.

    Args:
        pieces: the text pieces.
        matrix: i32 [n, P] pieces of each text.
        training: share of guessable tokens that are to be guessed, loss weight of a rating.
        tokenizer: its mask, padding and size.
    """

    def __init__(
        self, pieces: Pieces, matrix: documents.Matrix, training: EncoderTrainingConfig, tokenizer: Any
    ) -> None:
        """See the class."""
        self.pieces, self.matrix, self.share = pieces, matrix, training.mask_share
        self.kinds = (*KINDS, training.label_weight)
        self.mask_id, self.pad_id = tokenizer.mask_token_id, tokenizer.pad_token_id
        self.vocabulary = len(tokenizer)

    def __call__(self, indices: Rows, seed: list[int], rank: int = 0, world: int = 1) -> dict[str, Any]:
        """This process's share of a batch; what is masked is drawn for the batch as a whole.

        Returns:
            `text` (right padded); of the M tokens that are to be guessed `at_text`, `at_token`, `target` and
            loss `weight` [M]; `expected`, the weight that a process guesses on average: the same for all, so
            that the mean of their losses is one process's.
        """
        matrix = self.matrix[indices]
        texts, weights = self.pieces.assemble(matrix), self.pieces.weights(matrix, self.kinds)
        weights[texts.offsets[1:] - 1] = 0  # that a text ends at its end is nothing to guess
        rng = np.random.default_rng(seed)
        read, chosen = mask_tokens(texts.tokens, weights > 0, self.share, self.mask_id, self.vocabulary, rng)
        text, place = texts.place()
        own = text % world == rank
        lengths = texts.lengths[rank::world]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        guessed = own & chosen
        return {
            "text": pad_right(Ragged(read[own], offsets), self.pad_id),
            "at_text": torch.from_numpy(text[guessed] // world),
            "at_token": torch.from_numpy(place[guessed]),
            "target": torch.from_numpy(texts.tokens[guessed].astype(np.int64)),
            "weight": torch.from_numpy(weights[guessed]),
            "expected": self.share * float(weights.sum()) / world,
        }


def texts_of(log: EventLog, pieces: Pieces, history: int, context: int) -> documents.Matrix:
    """Pieces i32 [n, P] of timelines of `history` training events and of trained items' descriptions.

    Those of more than `context` tokens are left out, and it is said how many.
    """
    timelines = documents.timelines(log, pieces, np.flatnonzero(log.train_events()), history)
    descriptions = documents.descriptions(pieces, log.described_items)
    padding = timelines.shape[1] - descriptions.shape[1]
    matrix = np.concatenate([timelines, np.pad(descriptions, ((0, 0), (0, padding)))])
    fits = pieces.lengths[matrix].sum(1) <= context
    if not fits.all():
        say(f"{(~fits).sum():,} of {len(fits):,} texts are longer than {context} tokens and left out")
    if not fits.any():
        raise StageError(f"no text fits {context} tokens; wanted a larger encoder.tiny.context")
    return matrix[fits]


def pretrain(run: Run, model: Any, texts: Texts, lengths: NDArray[np.int64]) -> dict[str, Any]:
    """Train on masked tokens; the last hundredth of the texts is held out for the curve."""
    training, seed = run.config.encoder.training, run.config.encoder.seed
    order = np.random.default_rng([seed, 0]).permutation(len(lengths))
    num_held_out = max(2, len(order) // 100)
    count = len(order) - num_held_out
    read, checked = order[:count], order[count:]
    settings = FitConfig(
        epochs=training.tokens / float(lengths[read].sum()),
        batch_size=8 * max(1, round(training.batch_tokens / float(lengths.mean()) / 8)),  # shared out evenly
        lr=training.lr,
        weight_decay=0.01,
        validations=4,
        patience=4,
        precision=training.precision,
    )
    steps, interval = plan_steps(count, settings.batch_size, settings.epochs, settings.validations)
    stream = Stream(count, settings.batch_size, seed, lengths[read])
    loaders = Loaders(
        train=lambda step, rank, world: texts(read[stream.indices(step)], [seed, 1, step], rank, world),
        steps=steps,
        valid=[(lambda indices: texts(checked[indices], [seed, 2, int(indices[0])]), num_held_out)],
        valid_batch=64,
    )
    module = MaskedModule(model, settings, steps)
    fit(run, module, loaders, settings, interval, ["valid/score"])
    module.load_state_dict(load_weights(best(run, "valid/score"))["state_dict"])
    tokens = round(steps * settings.batch_size * float(lengths[read].mean()))
    return {"tokens": tokens, "texts": len(lengths), **best_scores(run, "valid/score")}


def unpacked(run: Run) -> Path:
    """The folder of the stage into which the encoder of a package was put.

    Raises:
        ValueError: the package cannot be had, is not the stated one, or holds no such folder.
    """
    config = run.config.encoder
    with tempfile.TemporaryDirectory(prefix="recllm-encoder-") as temporary:
        source = unpack(config, Path(temporary), "encoder")
        if not source.is_dir():
            raise ValueError(
                f"encoder.path is {config.path!r}, a file of {config.package}; wanted an encoder's folder"
            )
        shutil.rmtree(run.export, ignore_errors=True)
        shutil.copytree(source, run.export)
    return run.export


def work(run: Run) -> None:
    """Train the tiny encoder, or check one that is loaded by path, hub id or package."""
    config, log = run.config.encoder, EventLog.open(run.parents[Role.LOG].folder)
    facts = {"path": config.path, "revision": config.revision, "context": config.context}
    if config.path is not None:
        outputs = [unpacked(run)] if config.package else []
        named, tokenizer, context = load_encoder(config, *outputs)
        prompts = tower_prompts(run.config, log, tokenizer, context)
        prompts.item_matrix(np.flatnonzero(log.item_count))  # refuses a text that is too long
        name = config.package.partition("==")[0] or Path(config.path).name
        run.finish(outputs, {**facts, "name": name, "ratings_as_text": 0, **_size(named)})
        return
    tokenizer = add_mask_token(tiny_tokenizer(run.config, log, config.tiny), config.tiny.context)
    torch.manual_seed(config.seed)
    bert: Any = build_encoder(config.tiny, tokenizer)
    pieces = build_pieces(run.config, log, tokenizer, LmConfig())
    matrix = texts_of(log, pieces, run.config.prompt.history, config.tiny.context)
    lengths = pieces.lengths[matrix].sum(1)
    training = config.training
    say(
        f"{lengths.sum():,} tokens of text, {training.tokens:,} to train on, "
        f"{_size(bert)['weights']:,} weights"
    )
    figures = pretrain(run, bert, Texts(pieces, matrix, training, tokenizer), lengths)
    if not is_first_process():
        return
    logging.disable_progress_bar()
    export = run.export
    bert.base_model.save_pretrained(export)
    tokenizer.save_pretrained(export)
    ratings = int((log.rating[log.train_events()] > 0).sum())
    run.finish([export], {**facts, "name": "tiny", "ratings_as_text": ratings, **figures, **_size(bert)})


def _size(model: Any) -> dict[str, int]:
    return {"weights": sum(value.numel() for value in model.parameters())}
