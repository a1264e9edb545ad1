"""SIM: Search-based User Interest Modeling (Pi et al., CIKM 2020, arXiv 2006.05639)."""

from __future__ import annotations

import torch
from torch import Tensor

from recllm.crm.config import CrmConfig, Fields
from recllm.crm.layers import Batch, Model, TargetAttention, Tower


class SIM(Model):
    """Search in the whole history first, then attend to what was found and to what is recent.

        S*     = top-k events of the user's history by relevance to the target     general search unit
        z_t    = [e_t, interval_t, rank_t]                                         exact search unit
        U_long = sum_{t in S*} a(z_t, v_A) z_t
        U_rec  = sum_{t recent} a'(z_t, v_A) z_t                                   short-term part
        logit  = MLP([user fields, item fields, U_long, U_rec])

    The search is done before the model sees the batch (`retrieved_*`, `semantic` retrieval: neighbors of the
    target by item vectors among the row's own earlier events), as the paper does offline for its hard search.

    Differences from the paper: retrieval by fixed item vectors instead of hard (category) or jointly trained
    soft search; the exact search unit is DIN's activation unit without softmax, not multi-head softmax
    attention; retrieved events carry their rank by similarity, so that the nearest can count most;
    the short-term part is DIN, not DIEN; no auxiliary loss for the search unit, which
    has no weights.

    Args:
        fields: table sizes.
        config: widths and rates.
    """

    def __init__(self, fields: Fields, config: CrmConfig) -> None:
        """Builds tables, two attention units and the MLP."""
        super().__init__(fields, config, retrieved=True)
        query_dim, dim = self.embeddings.query_dim, self.embeddings.event_dim
        retrieved_dim = self.embeddings.retrieved_dim
        self.attention_retrieved = TargetAttention(query_dim, retrieved_dim, config.attention_mlp)
        self.attention_recent = TargetAttention(query_dim, dim, config.attention_mlp)
        self.tower = Tower(self.embeddings.sample_dim + dim + retrieved_dim, config)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logit [B] and representation [B, d_c] of a batch, float.

        Raises:
            ValueError: the batch holds no retrieved events.
        """
        if "retrieved_item" not in batch:
            raise ValueError(
                "got a batch without retrieved_item; wanted CrmInputs(retrieved=30, stored=...); "
                "run `make stage1 CRM=sim`, which retrieves first"
            )
        sample, query = self.embeddings.sample(batch)
        found = self.attention_retrieved(query, *self.embeddings.events(batch, "retrieved"))
        recent = self.attention_recent(query, *self.embeddings.events(batch, "recent"))
        return self.tower(torch.cat([sample, found, recent], dim=1))
