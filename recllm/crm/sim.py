"""SIM: Search-based User Interest Modeling (Pi et al., CIKM 2020, arXiv 2006.05639)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from recllm.crm.config import CrmConfig, Fields
from recllm.crm.layers import Batch, Events, FieldModel, TargetAttention, Tower, aligned
from recllm.crm.table import Table, products, weighted_sums


class SoftSearch(nn.Module):
    """SIM's general search unit with learned inner products, trained by a click prediction of its own.

        r_t    = (W_b e_t) . (W_a v_A)                           eq. 1, soft search
        S*     = the k events with the largest r_t
        logit' = MLP([sum_t r_t e_t, v_A])                       for the auxiliary loss

    Padded events have r = -inf in the search.

    Args:
        query_dim: width of the target's vector v_A.
        event_dim: width d_e of an event.
        config: `soft_k`; `attention_mlp[0]` is the width of the products and of the MLP's hidden layer.
    """

    def __init__(self, query_dim: int, event_dim: int, config: CrmConfig) -> None:
        """Draws the weights as `nn.Linear` does."""
        super().__init__()
        width = config.attention_mlp[0]
        self.k = config.soft_k
        self.event = nn.Linear(event_dim, width, bias=False)
        self.query = nn.Linear(query_dim, width, bias=False)
        self.click = nn.Sequential(nn.Linear(event_dim + query_dim, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(
        self, query: Tensor, parts: Sequence[tuple[Table, Tensor]], mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Searches the events, of which no vectors [B, T, d_e] are made.

        Args:
            query: [B, d_q].
            parts: what the events are made of, as `Embeddings.parts` returns it.
            mask: [B, T] bool.

        Returns:
            Places of the best events, best first, int64 [B, min(k, T)]; which of them are events (the
            others are padding, where the history is shorter), bool of that shape; and in training logit'
            [B].
        """
        # (W_b e) . (W_a v) = e . (W_b^T W_a v): the product with W_b once a sample, not once an event.
        wanted = self.query(query) @ self.event.weight
        pieces = wanted.split([table.embedding_dim for table, _ in parts], dim=1)
        terms = [products(*part, piece) for part, piece in zip(parts, pieces, strict=True)]
        relevance = torch.stack(terms).sum(0)
        best = relevance.masked_fill(~mask, -torch.inf).topk(min(self.k, mask.shape[1]), dim=1)
        click = None
        if self.training:
            # Padded events are zero rows: their relevance is 0.
            pooled = [weighted_sums(*part, relevance.unsqueeze(1)).squeeze(1) for part in parts]
            click = self.click(torch.cat([*pooled, query], dim=1)).squeeze(1)
        return best.indices, best.values > -torch.inf, click


class SIM(FieldModel):
    """Search in the whole history first, then attend to what was found and to what is recent.

        S*     = top-k events of the user's history by relevance to the target     general search unit
        z_t    = [e_t, interval_t, rank_t]                                         exact search unit
        U_long = sum_{t in S*} a(z_t, v_A) z_t
        U_rec  = sum_{t recent} a'(z_t, v_A) z_t                                   short-term part
        logit  = MLP([user fields, item fields, U_long, U_rec])

    `config.retrieval` says how S* is found:

    - `semantic`: before the model sees the batch (`retrieved_*`), nearest to the target by item vectors;
    - `hard`: likewise, the latest events of the target's category (the paper's hard search);
    - `soft`: here, by `SoftSearch` in the long list `recent_*`, of which the short-term part then reads the
      latest `config.soft_recent`. The search's own loss is added to the model's (`l2`), with weight 1 as in
      the paper; no other gradient reaches its weights.

    Differences from the paper: the exact search unit is DIN's activation unit without softmax, not
    multi-head softmax attention; retrieved events carry their rank by similarity (by recency in hard
    search), so that the nearest can count most; the short-term part is DIN, not DIEN; semantic retrieval is
    the default.

    Args:
        fields: table sizes.
        config: widths and rates.
    """

    def __init__(self, fields: Fields, config: CrmConfig) -> None:
        """Builds tables, two attention units, the MLP, and for soft retrieval the search unit."""
        super().__init__(fields, config, retrieved=True)
        query_dim = self.embeddings.query_dim
        dim = self.embeddings.event_dim
        retrieved_dim = self.embeddings.retrieved_dim
        self.attention_retrieved = TargetAttention(query_dim, retrieved_dim, config.attention_mlp)
        self.attention_recent = TargetAttention(query_dim, dim, config.attention_mlp)
        self.tower = Tower(self.embeddings.sample_dim + dim + retrieved_dim, config)
        self.search = SoftSearch(query_dim, dim, config) if config.retrieval == "soft" else None
        self._click: Tensor | None = None

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logit [B] and representation [B, d_c] of a batch, float.

        Raises:
            ValueError: the batch holds no retrieved events, and retrieval is not soft.
        """
        sample, query = self.embeddings.sample(batch)
        if self.search is not None:
            batch = aligned(batch, "right")  # so that the latest events are the last ones
            retrieved = self._search_softly(self.search, query, batch)
            latest = slice(-self.config.soft_recent, None)
            recent = {name: batch[name][:, latest] for name in batch if name.startswith("recent_")}
            batch = {**batch, **recent}
        elif "retrieved_item" in batch:
            retrieved = self.embeddings.history(batch, "retrieved")
        else:
            raise ValueError(
                "got a batch without retrieved_item; wanted CrmInputs(retrieved=30, stored=...); "
                "run `make stage1 CRM=sim`, which retrieves first"
            )
        long_term = self.attention_retrieved(query, retrieved)
        short_term = self.attention_recent(query, self.embeddings.history(batch, "recent"))
        return self.tower(torch.cat([sample, long_term, short_term], dim=1))

    def _search_softly(self, search: SoftSearch, query: Tensor, batch: Batch) -> Events:
        """Events of the search unit, with ranks; keeps the logit of the unit's click."""
        parts = self.embeddings.parts(batch, "recent")
        places, mask, self._click = search(query, parts, batch["recent_mask"])
        item, category, *marks = [(table, ids.gather(1, places)) for table, ids in parts]
        rank = torch.arange(1, places.shape[1] + 1, device=places.device) * mask
        vectors = [table(ids) for table, ids in (item, category)]
        return Events(vectors, [*marks, self.embeddings.ranks(rank)], mask)

    def l2(self, batch: Batch) -> Tensor:
        """What to add to the loss: the regularizer and, with soft retrieval, the search unit's loss; scalar.

        The latter is of the latest `forward`, which must have been of this batch.
        """
        regularizer = super().l2(batch)
        if self._click is None:
            return regularizer
        click = self._click
        self._click = None
        return regularizer + functional.binary_cross_entropy_with_logits(click, batch["label"])
