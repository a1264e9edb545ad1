"""Two towers over one encoder: users' and items' texts are read apart, and a small head fuses their vectors.

CTR-BERT (Muhamed et al., 2021): since no layer of the encoder sees both texts, the vector of an item is the
same for all users and is computed once, and a pair costs a few multiplications.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recllm import processes
from recllm.eventlog.log import Rows
from recllm.files import write_json
from recllm.lm.config import EncoderConfig, TowersConfig
from recllm.lm.encoder import load_encoder
from recllm.lm.forwards import cut_for_scoring
from recllm.text.collate import Ragged, pad_right
from recllm.text.prompts import Prompts

ENCODER = "encoder"
HEAD = "head.safetensors"
SETTINGS = "towers.json"
PAIRS = 1 << 16
"""Pairs of vectors that the head fuses at a time."""


class TwoTowers(nn.Module):
    """An encoder for both texts, and the head: LayerNorm, then an MLP over (u, v, u * v) with one output.

    Args:
        encoder: a bidirectional encoder of transformers.
        config: pooling and head.
    """

    def __init__(self, encoder: Any, config: TowersConfig) -> None:
        """See the class; torch's generator draws the head's weights."""
        super().__init__()
        width = int(encoder.config.hidden_size)
        self.encoder = encoder
        self.config = config
        self.head = nn.ModuleDict(
            {
                "norm": nn.LayerNorm(width),
                "mlp": nn.Sequential(
                    nn.Linear(3 * width, config.hidden),
                    nn.GELU(),
                    nn.Dropout(config.dropout),
                    nn.Linear(config.hidden, 1),
                ),
            }
        )

    def encode(self, texts: Mapping[str, Tensor]) -> Tensor:
        """Vectors `[B, d]` of texts (`pad_right`); padding has no part in them."""
        states: Tensor = self.encoder(**texts).last_hidden_state
        if self.config.pooling == "first":
            pooled = states[:, 0]
        else:
            real = texts["attention_mask"][..., None].to(states.dtype)
            pooled = (states * real).sum(1) / real.sum(1)
        normed: Tensor = self.head["norm"](pooled)
        return normed

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """CTR logits `[B]` of pairs of vectors `[B, d]`."""
        logits: Tensor = self.head["mlp"](torch.cat([users, items, users * items], -1))
        return logits[..., 0]

    def save(self, folder: Path, tokenizer: Any, context: int) -> None:
        """Write the encoder and its tokenizer (transformers' layout), the head, and the towers' settings.

        Args:
            folder: made if absent.
            tokenizer: of the encoder.
            context: most tokens of a text.
        """
        self.encoder.save_pretrained(folder / ENCODER)
        tokenizer.save_pretrained(folder / ENCODER)
        save_file({name: value.contiguous() for name, value in self.head.state_dict().items()}, folder / HEAD)
        settings = {"context": context, "config": asdict(self.config)}
        write_json(folder / SETTINGS, settings)

    @classmethod
    def load(cls, folder: Path) -> tuple[TwoTowers, Any, int]:
        """Saved towers in eval mode, their tokenizer, and the most tokens of a text."""
        settings = json.loads((folder / SETTINGS).read_text())
        config = EncoderConfig(context=settings["context"])
        encoder, tokenizer, context = load_encoder(config, folder / ENCODER)
        model = cls(encoder, TowersConfig(**settings["config"]))
        model.head.load_state_dict(load_file(folder / HEAD))
        return model.eval(), tokenizer, context


@torch.inference_mode()
def tower_scores(
    model: TwoTowers,
    prompts: Prompts,
    pad_id: int,
    rows: Rows,
    history: Rows,
    targets: NDArray[np.int32] | None = None,
    size: int = 256,
) -> NDArray[np.float32]:
    """CTR logits; every row's user is read once, and every distinct item once, however many pairs there are.

    Args:
        model: the towers, in eval mode.
        prompts: builds the texts.
        pad_id: token at padding.
        rows: int64 `[n]` rows of the log.
        history: int64 `[n, k]` events that a user's text shows.
        targets: int32 `[n, C]` dense items to score for each row; None: the rows' own.
        size: texts of a forward pass.

    Returns:
        float32 `[n]`, or `[n, C]`.
    """
    items = prompts.log.item[rows] if targets is None else targets
    distinct, item = np.unique(items, return_inverse=True)
    item = item.ravel()
    user = np.repeat(np.arange(len(rows)), 1 if targets is None else targets.shape[1])

    def item_texts(indices: Rows) -> Ragged:
        return prompts.items(distinct[indices])

    def user_texts(indices: Rows) -> Ragged:
        return prompts.users(rows[indices], history[indices])

    item_vectors = _encode_texts(model, prompts.item_lengths(distinct), item_texts, pad_id, size)
    user_vectors = _encode_texts(model, prompts.user_lengths(rows, history), user_texts, pad_id, size)
    logits = [torch.zeros(0)]
    for start in range(0, len(user), PAIRS):
        users = user_vectors[user[start : start + PAIRS]]
        logits.append(model(users, item_vectors[item[start : start + PAIRS]]).float().cpu())
    return torch.cat(logits).numpy().reshape(items.shape)


def _encode_texts(
    model: TwoTowers, lengths: NDArray[np.int64], make: Callable[[Rows], Ragged], pad_id: int, size: int
) -> Tensor:
    """Vectors `[n, d]` of the n texts that `make(indices)` gives, texts of like length together.

    Batches are dealt over the processes of a stage, all of which get all vectors.
    """
    device = next(model.parameters()).device
    forwards = cut_for_scoring(lengths, size, device.type)
    vectors = np.zeros((len(lengths), int(model.encoder.config.hidden_size)), np.float32)
    for number, is_own in processes.dealt(len(forwards)):
        if is_own:
            indices = forwards[number]
            texts = pad_right(make(indices), pad_id)
            encoded = model.encode({name: value.to(device) for name, value in texts.items()})
            vectors[indices] = encoded.float().cpu().numpy()
    processes.complete(vectors)
    return torch.from_numpy(vectors).to(device)
