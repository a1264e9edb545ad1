"""SASRec: Self-Attentive Sequential Recommendation (Kang & McAuley, ICDM 2018, arXiv 1808.09781)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from recllm.crm.config import CrmConfig, Fields
from recllm.crm.layers import POSITIONS, Batch, FieldModel, SequenceHead, aligned


class Block(nn.Module):
    """Causal self-attention and a point-wise feed-forward network, each as x + dropout(g(LN(x))).

        S = softmax(Q K^T / sqrt(d) + mask) V                    eq. 2, 3
        F = ReLU(S W_1 + b_1) W_2 + b_2                          eq. 4

    Args:
        config: `hidden`, `heads`, `dropout`.
    """

    def __init__(self, config: CrmConfig) -> None:
        """Draws the weights as `nn.Linear` does."""
        super().__init__()
        self.heads = config.heads
        width = config.hidden
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, mask: Tensor, last: bool) -> Tensor:
        """One block.

        Args:
            tokens: [B, T, hidden].
            mask: [B, 1, Q, T] bool, true where position q (of all T, or of the last one) sees position t.
            last: whether only the last position is wanted.

        Returns:
            [B, Q, hidden] with Q = 1 where only the last position is wanted, else T.
        """
        normed = self.norm(tokens)
        key, value = self.key_value(normed).chunk(2, dim=2)
        if last:
            tokens = tokens[:, -1:]
            normed = normed[:, -1:]
        projected = (self.query(normed), key, value)
        query, key, value = [part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in projected]
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        tokens = tokens + self.dropout(attended.transpose(1, 2).flatten(2))
        return tokens + self.dropout(self.feed_forward(tokens))


class SASRec(FieldModel):
    """A causal transformer reads the history; its state at the latest event meets the target in an MLP.

        x_t   = W e_t + p_{T - t}                                eq. 1
        s     = LN(block(...block(x)))_T
        logit = MLP([user fields, item fields, s, (W' s) * v_A])

    with e_t the event (item, category, rating, time interval), p a learned position counted from the latest
    event (events more than 256 back share one). The last block computes its last position only: nothing
    else is read of it, so nothing changes.

    Differences from the paper: events for items; LayerNorm on keys and values as on queries; the head is
    `SequenceHead` with binary cross-entropy on the target's label, not on next items at every position.

    Args:
        fields: table sizes.
        config: widths and rates; `hidden`, `heads` and `layers` of the transformer.
    """

    def __init__(self, fields: Fields, config: CrmConfig) -> None:
        """Builds tables, blocks and head."""
        super().__init__(fields, config)
        self.token = nn.Linear(self.embeddings.event_dim, config.hidden)
        self.position = nn.Embedding(POSITIONS, config.hidden)
        nn.init.normal_(self.position.weight, std=config.embedding_std)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden)
        self.head = SequenceHead(self.embeddings, config.hidden, config)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logit [B] and representation [B, d_c] of a batch, float. The state of an empty history is zero."""
        sample, query = self.embeddings.sample(batch)
        events, mask = self.embeddings.events(aligned(batch, "right"), "recent")
        length = mask.shape[1]
        place = torch.arange(length - 1, -1, -1, device=mask.device).clamp_max(POSITIONS - 1)
        tokens = self.dropout(self.token(events) + self.position(place))
        causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        # A padded position sees itself, so that no softmax is over nothing; no event sees it.
        itself = torch.eye(length, dtype=torch.bool, device=mask.device)
        seen = ((causal & mask.unsqueeze(1)) | itself).unsqueeze(1)
        for index, block in enumerate(self.blocks, 1):
            last = index == len(self.blocks)
            tokens = block(tokens, seen[:, :, -1:] if last else seen, last)
        state = self.norm(tokens[:, -1]) * mask[:, -1:]
        return self.head(sample, query, state)
