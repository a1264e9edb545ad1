"""AutoInt: interactions by self-attention (Song et al., CIKM 2019, arXiv 1810.11921)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from recllm.crm.config import CrmConfig, Fields
from recllm.crm.layers import Batch, FieldModel, HistoryFields, Tower


class InteractingLayer(nn.Module):
    """Multi-head self-attention over fields, with a residual.

        a_mk^h = softmax_k <W_q^h e_m, W_k^h e_k>                eq. 5
        e_m^h  = sum_k a_mk^h W_v^h e_k                          eq. 6
        out_m  = ReLU([e_m^1, ..., e_m^H] + W_res e_m)           eq. 7, 8

    Args:
        dim: width of a field that comes in.
        hidden: width of a field that goes out, all heads joined.
        heads: H.
    """

    def __init__(self, dim: int, hidden: int, heads: int) -> None:
        """Draws the weights as `nn.Linear` does."""
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(dim, 4 * hidden, bias=False)  # W_q, W_k, W_v and W_res in one product

    def forward(self, fields: Tensor) -> Tensor:
        """Fields [B, F, dim] -> [B, F, hidden]."""
        *projected, residual = self.project(fields).chunk(4, dim=2)
        query, key, value = [part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in projected]
        attended = functional.scaled_dot_product_attention(query, key, value, scale=1.0)
        return functional.relu(attended.transpose(1, 2).flatten(2) + residual)


class AutoInt(FieldModel):
    """Fields that attend to each other, layer on layer, and an MLP.

        logit = MLP([v_1, ..., v_F, out_1, ..., out_F])

    with v_f the embedding of field f (`Embeddings.sample`, and the history as `HistoryFields`), and
    out_f what `config.layers` interacting layers make of it.

    Differences from the paper: the history fields; where AutoInt+ adds the logits of a linear layer on
    out_f and of an MLP on v_f (section 5.5), one MLP reads both, so that its last hidden layer, the
    representation, knows the interactions.

    Args:
        fields: table sizes.
        config: widths and rates; `hidden`, `heads` and `layers` of the interacting layers.
    """

    def __init__(self, fields: Fields, config: CrmConfig) -> None:
        """Builds tables, interacting layers and MLP."""
        super().__init__(fields, config)
        self.history = HistoryFields(config)
        widths = [config.embedding_dim, *[config.hidden] * (config.layers - 1)]
        self.interacting = nn.Sequential(
            *(InteractingLayer(width, config.hidden, config.heads) for width in widths)
        )
        count = self.embeddings.field_count + self.history.count
        self.tower = Tower(count * (config.embedding_dim + config.hidden), config)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logit [B] and representation [B, d_c] of a batch, float."""
        sample, _ = self.embeddings.sample(batch)
        history = self.history(self.embeddings, batch)
        fields = torch.cat([sample.view(sample.shape[0], -1, history.shape[2]), history], dim=1)
        return self.tower(torch.cat([fields.flatten(1), self.interacting(fields).flatten(1)], dim=1))
