"""GRU4Rec: recurrent networks over the history (Hidasi et al., ICLR 2016, arXiv 1511.06939)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recllm.crm.config import CrmConfig, Fields
from recllm.crm.layers import Batch, FieldModel, SequenceHead, aligned


class GRU4Rec(FieldModel):
    """A GRU reads the history; its state after the latest event meets the target in an MLP.

        h_t   = (1 - z_t) h_{t-1} + z_t h^_t                     eq. 2-5: update gate z, reset gate in h^
        logit = MLP([user fields, item fields, h_T, (W h_T) * v_A])

    Differences from the paper: the input is an event (item, category, rating, time interval), not a one-hot
    item; the head is `SequenceHead` with binary cross-entropy on the target's label, not a ranking loss
    over items; a user's whole history is one session, so no state is carried from batch to batch.

    The events are moved to the left and the state is read at the last one: the GRU never steps over padding
    before it, and all samples go through it together (packing them is exact too, and was three times as
    slow on a CPU).

    Args:
        fields: table sizes.
        config: widths and rates; `hidden` and `layers` of the GRU.
    """

    def __init__(self, fields: Fields, config: CrmConfig) -> None:
        """Builds tables, GRU and head."""
        super().__init__(fields, config)
        self.gru = nn.GRU(
            self.embeddings.event_dim,
            config.hidden,
            config.layers,
            batch_first=True,
            dropout=config.dropout if config.layers > 1 else 0.0,
        )
        self.head = SequenceHead(self.embeddings, config.hidden, config)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logit [B] and representation [B, d_c] of a batch, float. The state of an empty history is zero."""
        sample, query = self.embeddings.sample(batch)
        events, mask = self.embeddings.events(aligned(batch, "left"), "recent")
        states, _ = self.gru(events)
        count = mask.sum(1)
        state = states[torch.arange(states.shape[0], device=states.device), (count - 1).clamp_min(0)]
        return self.head(sample, query, state * (count > 0).unsqueeze(1))
