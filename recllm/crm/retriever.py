"""A retriever: a causal transformer over the history whose user vector meets item vectors in a dot product.

    x_t = v(i_t) + r(rating_t) + g(t_{t+1} - t_t)
    H   = blocks(x)
    u_t = LN(H_t)
    score of item i behind event t = u_t . v(i)

where v is the item table, shared by input and output (Kang & McAuley 2018, arXiv 1808.09781, eq. 6), and g a
table of the time from an event to the next one: what is asked behind the last event is asked at a second that
is known, the request's. Every position is trained to find the event behind it (`stages/retriever.py`).

Blocks, `stage1.crm.block`, both pre-norm:

- `gated`: softmax attention and a SwiGLU feed-forward network (Shazeer 2020, arXiv 2002.05202), each behind
  a gate, x + sigmoid(W x) * f(LN(x)), as in LiGR (Borisyuk et al. 2025, arXiv 2502.03417, eq. 2);
- `hstu`: the pointwise block of HSTU (Zhai et al. 2024, arXiv 2402.17152, eq. 1 to 3), whose attention is
  SiLU and not softmax.

How far an event is from another, in events and in time, is in the angle of queries and keys (RoPE, Su et al.
2021, arXiv 2104.09864): of each head half of the pairs of columns turn with the place in the history, half
with time, at periods from a minute to four years. A query turns with the second at which its answer comes,
that of the next event, so that attention knows how long ago each event was at that second.

Differences from HSTU: its bias by distance and time, which needs a table lookup for every pair of events, is
these angles; its attention is divided by the number of events seen, not by the longest history.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from recllm.crm.config import CrmConfig, Fields
from recllm.crm.inputs import INTERVAL_BUCKETS
from recllm.crm.layers import Model, aligned
from recllm.crm.table import Table

Batch = Mapping[str, Tensor]

PLACES = (4.0, 1024.0)
"""Shortest and longest period of angles by place, in events."""
SECONDS = (60.0, 4 * 365 * 86400.0)
"""Shortest and longest period of angles by time, in seconds."""


class Rotation(nn.Module):
    """Angles of queries and keys: by place in the history, and by time.

    Args:
        width: of a head, even.
        timed: whether time turns; otherwise all pairs of columns turn with the place.
    """

    def __init__(self, width: int, timed: bool) -> None:
        """Deals out the pairs."""
        super().__init__()
        pairs = width // 2
        by_time = pairs // 2 if timed else 0
        self.by_place = _frequencies(pairs - by_time, *PLACES)
        self.by_time = _frequencies(by_time, *SECONDS)

    def forward(self, places: Tensor, seconds: Tensor) -> Tensor:
        """Cosines and sines [B, 1, T, width / 2, 2] for places [T] and seconds [B, T], float32."""
        # In float64: a time is large beside the periods that are told apart.
        by_place = torch.tensor(self.by_place, dtype=torch.float64, device=places.device)
        by_time = torch.tensor(self.by_time, dtype=torch.float64, device=places.device)
        of_place = places.double()[:, None] * by_place
        of_time = seconds.double()[..., None] * by_time
        angle = torch.cat([of_place.expand(seconds.shape[0], *of_place.shape), of_time], dim=2)
        return torch.stack([angle.cos(), angle.sin()], dim=3).float().unsqueeze(1)


def _frequencies(count: int, shortest: float, longest: float) -> list[float]:
    """Angles a unit, of `count` geometric periods."""
    ends = math.log10(shortest), math.log10(longest)
    periods = torch.logspace(*ends, count, dtype=torch.float64, device="cpu")
    angles: list[float] = (2 * math.pi / periods).tolist()
    return angles


def rotate(values: Tensor, angles: Tensor) -> Tensor:
    """Columns [B, heads, T, width] turned in pairs, by what `Rotation` returns."""
    pairs = values.float().unflatten(3, (-1, 2))
    if torch.compiler.is_compiling():  # neither the compiler nor ONNX knows complex numbers
        first, second = pairs.unbind(4)
        cosine, sine = angles.unbind(4)
        turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=4)
    else:  # the same numbers; forward and backward in a sixth of the time
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(angles))
    return turned.flatten(3).to(values.dtype)


class GatedBlock(nn.Module):
    """Softmax attention and SwiGLU, each behind a gate: see the file.

    Args:
        config: `hidden`, `heads`, `dropout`.
    """

    def __init__(self, config: CrmConfig) -> None:
        """Draws the weights as `nn.Linear` does."""
        super().__init__()
        width = config.hidden
        self.heads = config.heads
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.join = nn.Linear(width, width, bias=False)
        self.attention_gate = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.feed_gate = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, asks: Tensor, lies: Tensor) -> Tensor:
        """One block: tokens [B, T, hidden], angles of queries and keys as `Rotation` gives them."""
        parts = self.query_key_value(self.norm(tokens)).chunk(3, dim=2)
        query, key, value = [part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts]
        query = rotate(query, asks)
        key = rotate(key, lies)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = self.join(attended.transpose(1, 2).flatten(2))
        tokens = tokens + self.dropout(attended) * self.attention_gate(tokens).sigmoid()
        gate, up = self.up(self.feed_norm(tokens)).chunk(2, dim=2)
        fed = self.down(functional.silu(gate) * up)
        return tokens + self.dropout(fed) * self.feed_gate(tokens).sigmoid()


class HstuBlock(nn.Module):
    """Pointwise aggregated attention of HSTU: see the file.

        U, V, Q, K = SiLU(W_1 LN(x))                      eq. 1
        A V        = SiLU(Q K^T) / n  V                   eq. 2
        y          = x + W_2 (LN(A V) * U)                eq. 3

    Args:
        config: `hidden`, `heads`, `dropout`.
    """

    def __init__(self, config: CrmConfig) -> None:
        """Draws the weights as `nn.Linear` does."""
        super().__init__()
        width = config.hidden
        self.heads = config.heads
        self.norm = nn.LayerNorm(width)
        self.parts = nn.Linear(width, 4 * width)
        self.attended_norm = nn.LayerNorm(width)
        self.join = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, asks: Tensor, lies: Tensor) -> Tensor:
        """One block: tokens [B, T, hidden], angles of queries and keys as `Rotation` gives them."""
        gate, *parts = functional.silu(self.parts(self.norm(tokens))).chunk(4, dim=2)
        value, query, key = [part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts]
        seen = torch.ones(tokens.shape[1], tokens.shape[1], device=tokens.device).tril()
        weights = functional.silu(rotate(query, asks) @ rotate(key, lies).transpose(2, 3))
        weights = weights * (seen / seen.sum(1, keepdim=True)).to(weights.dtype)
        attended = (weights @ value).transpose(1, 2).flatten(2)
        return tokens + self.dropout(self.join(self.attended_norm(attended) * gate))


class Retriever(Model):
    """The model of this file.

    With `config.text_dim` the vector of an item is v(i) + W t(i), t being its text vector, and v that of the
    unknown item where it has no training event. Of the events, and of the items that are to be found, a share
    `config.mask_items` reads as unknown in training, so that such a sum is known to be worth something.

    Args:
        fields: table sizes.
        config: `hidden`, `heads`, `layers`, `block`, `dropout`, `mask_items`, `query_time`, `text_dim`,
            `embedding_std`.
    """

    texts: Tensor
    trained: Tensor

    def __init__(self, fields: Fields, config: CrmConfig) -> None:
        """Draws the tables from N(0, embedding_std^2), row 0 of each zero, and the blocks."""
        super().__init__(fields, config)
        width = config.hidden
        self.item = Table(fields.item_sizes[0], width)
        self.rating = Table(fields.rating_levels + 1, width)
        self.gap = Table(INTERVAL_BUCKETS, width) if config.query_time else None
        for table in self.children():
            assert isinstance(table, Table)
            nn.init.normal_(table.weight, std=config.embedding_std)
            with torch.no_grad():
                table.weight[0] = 0.0
        self.rotation = Rotation(width // config.heads, config.query_time)
        kind = HstuBlock if config.block == "hstu" else GatedBlock
        self.text: nn.Linear | None = None
        if config.text_dim:
            self.text = nn.Linear(config.text_dim, width, bias=False)
            self.register_buffer("texts", torch.zeros(fields.item_sizes[0], config.text_dim))
            self.register_buffer("trained", torch.ones(fields.item_sizes[0], dtype=torch.bool))
        self.blocks = nn.ModuleList(kind(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def representation_dim(self) -> int:
        """See `Model`: the width of a user vector."""
        return self.config.hidden

    def id_tables(self) -> list[nn.Embedding]:
        """See `Model`."""
        return [self.item]

    def set_texts(self, texts: Tensor, trained: Tensor) -> None:
        """See `Model`."""
        self.texts.copy_(texts)
        self.trained.copy_(trained)

    def l2(self, batch: Batch) -> Tensor:
        """See `Model`: none."""
        return batch["user"].new_zeros((), dtype=torch.get_default_dtype())

    def states(self, items: Tensor, ratings: Tensor, seconds: Tensor) -> Tensor:
        """User vectors behind every event.

        Args:
            items: int [B, T], dense items in time order, 0 behind the last event.
            ratings: int [B, T], rating codes.
            seconds: int64 [B, T + 1], of the events, and of what comes behind the last one.

        Returns:
            [B, T, hidden]; what stands behind the last event means nothing. An event reads nothing that
            stands behind it, but the second of the next one.
        """
        tokens = self._vectors(items, masked=True) + self.rating(ratings)
        lies = seconds[:, :-1]
        asks = seconds[:, 1:]
        if self.gap is not None:
            tokens = tokens + self.gap(_bucket(asks - lies))
        tokens = self.dropout(tokens)
        places = torch.arange(items.shape[1], device=items.device)
        asking = self.rotation(places, asks)
        lying = self.rotation(places, lies)
        for block in self.blocks:
            tokens = block(tokens, asking, lying)
        return self.norm(tokens)

    def user_vectors(self, batch: Batch) -> Tensor:
        """Vectors [B, hidden] behind the last event of each history; of an empty history zero.

        Args:
            batch: of `recllm.crm.inputs.CrmInputs`; nothing of the target is read but the second at which it
                is asked for.
        """
        batch = aligned(batch, "left")
        mask = batch["recent_mask"]
        items = self._ids(batch, "recent_item", "recent_dense").masked_fill(~mask, 0)
        ratings = batch["recent_rating"].masked_fill(~mask, 0)
        # In seconds before the sample, which stands behind the last event.
        seconds = -batch["recent_elapsed"].masked_fill(~mask, 0)
        seconds = functional.pad(seconds, (0, 1))
        last = mask.sum(1).clamp(min=1) - 1
        states = self.states(items, ratings, seconds)
        state = states[torch.arange(last.shape[0], device=last.device), last]
        return state * mask[:, :1]

    def item_vectors(self, items: Tensor | None = None) -> Tensor:
        """Vectors [..., hidden] of dense items, int [...], or of all of them.

        That of an item without a training event means nothing where there are no texts.
        """
        if items is None:
            items = torch.arange(self.item.num_embeddings, device=self.item.weight.device)
        return self._vectors(items, masked=self.text is not None)

    def _ids(self, batch: Batch, fields: str, dense: str) -> Tensor:
        """What `_vectors` looks up: of an item without a training event its text, or the unknown item."""
        return batch[fields][..., 0] if self.text is None else batch[dense]

    def _vectors(self, items: Tensor, masked: bool) -> Tensor:
        """Vectors of items; in training some of them read as unknown, where they may be `masked`."""
        known = items
        if self.text is not None:
            known = torch.where(self.trained[items], items, items.clamp(max=1))
        if masked and self.training and self.config.mask_items:
            unknown = torch.rand(items.shape, device=items.device) < self.config.mask_items
            known = torch.where(unknown, items.clamp(max=1), known)
        vectors: Tensor = self.item(known)
        return vectors if self.text is None else vectors + self.text(self.texts[items])

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Score [B] of each target, and user vector [B, hidden]; see `Model`."""
        users = self.user_vectors(batch)
        items = self._vectors(self._ids(batch, "item", "dense"), masked=False)
        return (users * items).sum(1), users


def _bucket(elapsed: Tensor) -> Tensor:
    """Buckets of times in seconds, 1 + floor(log2(1 + t)), the last one for all that are longer."""
    # Whole numbers are compared: ONNX's logarithm to base 2 is no whole number at the powers of 2.
    bounds = 2 ** torch.arange(INTERVAL_BUCKETS - 1, device=elapsed.device) - 1
    return torch.bucketize(elapsed.clamp(min=0), bounds, right=True)
