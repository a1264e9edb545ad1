"""DeepFM: a factorization machine and an MLP (Guo et al., IJCAI 2017, arXiv 1703.04247)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recllm.crm.config import CrmConfig, Fields
from recllm.crm.layers import Batch, FieldModel, HistoryFields, Tower
from recllm.crm.table import Table


class DeepFM(FieldModel):
    """A factorization machine and an MLP over the same embeddings.

        y_FM  = sum_f w_f + sum_{f < g} <v_f, v_g>               eq. 2
        logit = y_FM + MLP([v_1, ..., v_F])                      eq. 1, 3, 4

    with v_f the embedding of field f (`Embeddings.sample`, and the history as `HistoryFields`), and
    w_f the weight of its value. The representation is the MLP's last hidden layer; the FM is in the logit
    only.

    Differences from the paper: the history fields and the statistics, which have no first-order weight.

    Args:
        fields: table sizes.
        config: widths and rates.
    """

    def __init__(self, fields: Fields, config: CrmConfig) -> None:
        """Builds tables, first-order weights and MLP."""
        super().__init__(fields, config)
        self.history = HistoryFields(config)
        sizes = fields.user_sizes + fields.item_sizes
        self.weights = nn.ModuleList(Table(size, 1) for size in sizes)
        for weight in self.weights.parameters():
            nn.init.zeros_(weight)
        self.tower = Tower(self.embeddings.sample_dim + self.history.count * config.embedding_dim, config)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logit [B] and representation [B, d_c] of a batch, float."""
        ids = self.embeddings.ids(batch)
        sample, _ = self.embeddings.lookup(batch, *ids)
        history = self.history(self.embeddings, batch)
        fields = torch.cat([sample.view(sample.shape[0], -1, history.shape[2]), history], dim=1)
        logit, representation = self.tower(fields.flatten(1))
        return logit + self.first_order(torch.cat(ids, dim=1)) + pairs(fields), representation

    def id_tables(self) -> list[nn.Embedding]:
        """The first-order weights have a row an id too."""
        return [*super().id_tables(), *self.weights]

    def first_order(self, ids: Tensor) -> Tensor:
        """Sum over fields of the weight of each field's value; ids [B, F_u + F_i] -> [B]."""
        weights = [table(ids[:, index]) for index, table in enumerate(self.weights)]
        return torch.cat(weights, dim=1).sum(1)


def pairs(fields: Tensor) -> Tensor:
    """sum_{f < g} <v_f, v_g> over fields [B, F, d] -> [B]: half of (square of sum - sum of squares)."""
    total = fields.sum(1)
    joined = fields.flatten(1)
    return 0.5 * (torch.linalg.vecdot(total, total) - torch.linalg.vecdot(joined, joined))
