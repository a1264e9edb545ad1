"""DIN: Deep Interest Network for Click-Through Rate Prediction (Zhou et al., KDD 2018, arXiv 1706.06978)."""

from __future__ import annotations

import torch
from torch import Tensor

from recllm.crm.config import CrmConfig, Fields
from recllm.crm.layers import Batch, FieldModel, TargetAttention, Tower


class DIN(FieldModel):
    """User interest as a sum of history events, weighted by their relevance to the target item.

        v_U(A) = sum_t a(e_t, v_A) e_t                           eq. 3
        logit  = MLP([user fields, item fields, v_U(A)])
        loss   = mean binary cross-entropy (+ l2)

    with e_t the embedding of recent event t (item, category, rating, time interval), v_A that of the target
    (item, category), a(.) the activation unit without softmax (`TargetAttention`).

    Differences from the paper: ReLU for Dice; events also carry their rating and the time since; the
    mini-batch aware regularizer counts a row once a sample that looks it up, on identifying fields
    only.

    Args:
        fields: table sizes.
        config: widths and rates.
    """

    def __init__(self, fields: Fields, config: CrmConfig) -> None:
        """Builds tables, attention and MLP."""
        super().__init__(fields, config)
        self.attention = TargetAttention(
            self.embeddings.query_dim, self.embeddings.event_dim, config.attention_mlp
        )
        self.tower = Tower(self.embeddings.sample_dim + self.embeddings.event_dim, config)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logit [B] and representation [B, d_c] of a batch, float."""
        sample, query = self.embeddings.sample(batch)
        interest = self.attention(query, self.embeddings.history(batch, "recent"))
        return self.tower(torch.cat([sample, interest], dim=1))
