"""Caser: convolutions over the history (Tang & Wang, WSDM 2018, arXiv 1809.07426)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from recllm.crm.config import CrmConfig, Fields
from recllm.crm.layers import POSITIONS, Batch, FieldModel, SequenceHead, aligned


class Convolutions(nn.Module):
    """Horizontal filters find what happened in a row, vertical ones weigh the whole history.

        c_t^k = F^k . [e_{t-h+1}, ..., e_t]                      horizontal filter k of height h, at event t
        o^k   = ReLU(max_t c_t^k + b^k)
        o~^k  = sum_t f_t^k e_t                                  vertical filter k

    A horizontal filter ends at every event; before the first event it sees zeros, so that a history shorter
    than the filter still counts, and one event more or less of padding does not.

    Args:
        dim: width d_e of an event.
        config: `heights`, `filters` of each height, `vertical` filters.
    """

    def __init__(self, dim: int, config: CrmConfig) -> None:
        """Draws the filters: horizontal ones as `nn.Linear` does, vertical ones from N(0, 0.1^2)."""
        super().__init__()
        self.heights = list(config.heights)
        self.filters = config.filters
        # One product serves all heights and rows of filters: row r of height h looks h - 1 - r events back.
        self.rows = nn.Linear(dim, sum(self.heights) * self.filters, bias=False)
        self.bias = nn.Parameter(torch.zeros(len(self.heights) * self.filters))
        self.vertical = nn.Parameter(0.1 * torch.randn(POSITIONS, config.vertical))
        self.out = len(self.heights) * self.filters + config.vertical * dim

    def forward(self, events: Tensor, mask: Tensor) -> Tensor:
        """Events [B, T, d_e], padded on the left, and mask [B, T] bool -> [o, o~] [B, out], float."""
        rows = self.rows(events).split(self.filters, dim=2)
        maxima = []
        first_row = 0  # of this height's filters
        for height in self.heights:
            last_row = first_row + height - 1
            total = rows[last_row]
            for back in range(1, min(height, events.shape[1])):
                total = total + functional.pad(rows[last_row - back][:, :-back], (0, 0, back, 0))
            maxima.append(total.masked_fill(~mask.unsqueeze(2), -torch.inf).amax(1))
            first_row += height
        horizontal = functional.relu(torch.cat(maxima, dim=1) + self.bias)
        weights = self.vertical[: events.shape[1]].flip(0).t()  # row 0 is the latest event's
        vertical = torch.matmul(weights, events).flatten(1)
        return torch.cat([horizontal, vertical], dim=1)


class Caser(FieldModel):
    """Convolutions over the history as an image of events; what they find meets the target in an MLP.

        z     = ReLU(W [o, o~] + b)                              eq. 10
        logit = MLP([user fields, item fields, z, (W' z) * v_A])

    with o and o~ what `Convolutions` finds (eq. 4-9) in the latest events.

    Differences from the paper: events (item, category, rating, time interval) for items; the whole history
    that the batch holds (at most 256 events) for the latest 5 or so; the user's embedding joins z in the
    head, `SequenceHead`, with the other fields; binary cross-entropy on the target's label, not on the next
    items against sampled ones.

    Args:
        fields: table sizes.
        config: widths and rates; `hidden`, `heights`, `filters` and `vertical` of the convolutions.
    """

    def __init__(self, fields: Fields, config: CrmConfig) -> None:
        """Builds tables, convolutions and head."""
        super().__init__(fields, config)
        self.convolutions = Convolutions(self.embeddings.event_dim, config)
        self.join = nn.Sequential(
            nn.Dropout(config.dropout), nn.Linear(self.convolutions.out, config.hidden), nn.ReLU()
        )
        self.head = SequenceHead(self.embeddings, config.hidden, config)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logit [B] and representation [B, d_c] of a batch, float."""
        sample, query = self.embeddings.sample(batch)
        events, mask = self.embeddings.events(aligned(batch, "right"), "recent")
        state = self.join(self.convolutions(events[:, -POSITIONS:], mask[:, -POSITIONS:]))
        return self.head(sample, query, state)
