"""DCN V2: Improved Deep & Cross Network (Wang et al., WWW 2021, arXiv 2008.13535)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recllm.crm.config import CrmConfig, Fields
from recllm.crm.layers import Batch, FieldModel, HistoryFields, Tower


class CrossNetwork(nn.Module):
    """Explicit feature crosses, one order more with each layer.

        x_{l+1} = x_0 * (W_l x_l + b_l) + x_l                    eq. 1

    Args:
        dim: width of x.
        layers: cross layers.
    """

    def __init__(self, dim: int, layers: int) -> None:
        """Draws the weights as `nn.Linear` does."""
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))

    def forward(self, inputs: Tensor) -> Tensor:
        """Crosses inputs [B, dim] -> [B, dim]."""
        crossed = inputs
        for layer in self.layers:
            crossed = torch.addcmul(crossed, inputs, layer(crossed))
        return crossed


class DCNv2(FieldModel):
    """A cross network, and an MLP on top of it (the paper's stacked structure, section 3.3).

        logit = MLP(cross([v_1, ..., v_F]))

    with v_f the embedding of field f: user fields, item fields, and the history as `HistoryFields`.

    Differences from the paper: the history fields; full-rank cross layers only, no mixture of low-rank
    experts (its section 3.4 saves time where the joined embeddings are thousands wide).

    Args:
        fields: table sizes.
        config: widths and rates; `layers` of the cross network.
    """

    def __init__(self, fields: Fields, config: CrmConfig) -> None:
        """Builds tables, cross network and MLP."""
        super().__init__(fields, config)
        self.history = HistoryFields(config)
        dim = self.embeddings.sample_dim + self.history.count * config.embedding_dim
        self.cross = CrossNetwork(dim, config.layers)
        self.tower = Tower(dim, config)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logit [B] and representation [B, d_c] of a batch, float."""
        sample, _ = self.embeddings.sample(batch)
        history = self.history(self.embeddings, batch)
        return self.tower(self.cross(torch.cat([sample, history.flatten(1)], dim=1)))
