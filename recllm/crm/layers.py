"""Layers that the CRMs share: embeddings of fields and events, target attention, the prediction MLP."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from recllm.crm.attention import Attend
from recllm.crm.config import CrmConfig, Fields
from recllm.crm.inputs import INTERVAL_BUCKETS
from recllm.crm.table import Table, rows_of, weighted_sums
from recllm.eventlog.statistics import LEVELS, STATISTICS

Batch = Mapping[str, Tensor]

RANK_BUCKETS = 16
"""Buckets of a retrieved event's rank by similarity: 0 padding, else 1 + floor(log2(rank))."""

MERGED = 4096
"""Most pairs of values of two marks, such as a rating and a time interval, that are looked up as one."""

POSITIONS = 256
"""Positions that sequential models tell apart, counted from the latest event."""


def _identifying(sizes: Sequence[int]) -> list[int]:
    """Fields with at least half as many values as field 0: they name the user or item nearly as its id."""
    return [index for index, size in enumerate(sizes) if 2 * size >= sizes[0]]


@dataclass(frozen=True)
class Events:
    """A list of history events, in parts."""

    vectors: list[Tensor]
    """[B, T, d] each, laid out as the query: item, category and, with `config.text_dim`, text."""
    marks: list[tuple[Table, Tensor]]
    """What a target lacks, each one's table, of few rows, and ids [B, T]: rating, interval, rank."""
    mask: Tensor
    """[B, T] bool, true where an event is; elsewhere vectors are zero and ids 0."""

    def joined(self) -> Tensor:
        """The parts side by side [B, T, d_e]."""
        return torch.cat([*self.vectors, *(table(ids) for table, ids in self.marks)], dim=-1)


class Embeddings(nn.Module):
    """All embedding tables of a CRM: one a field, one for ratings, one for time intervals, one a statistic.

    Row 0 of every table is padding: zero, and never trained. In training mode a share `config.mask_users` of
    the samples reads 1 (unknown) in the user fields that identify the user (see `_identifying`: the id, and
    near-ids such as a zip code); likewise a share `config.mask_items`, by a draw of its own, in those of the
    target item. That is what trains row 1, which users and items without a training event read.

    With `config.text_dim` every item has a further field, W t: t is the frozen LM's vector of its text, W is
    learned. The target has it, also where its id is unknown or masked, and so have the events of histories.

    Args:
        fields: table sizes.
        config: embedding width, masking, dropout is not applied here.
        retrieved: whether retrieved events are embedded too, with their rank by similarity.
    """

    texts: Tensor

    def __init__(self, fields: Fields, config: CrmConfig, retrieved: bool = False) -> None:
        """Draws the tables from N(0, embedding_std^2)."""
        super().__init__()
        dim = config.embedding_dim
        self.category = fields.category
        self.mask_users = config.mask_users
        self.mask_items = config.mask_items
        self.user_identity = _identifying(fields.user_sizes)
        self.item_identity = _identifying(fields.item_sizes)
        self.user = nn.ModuleList(Table(size, dim) for size in fields.user_sizes)
        self.item = nn.ModuleList(Table(size, dim) for size in fields.item_sizes)
        self.text: nn.Linear | None = None
        if config.text_dim:
            self.text = nn.Linear(config.text_dim, dim, bias=False)
            self.register_buffer("texts", torch.zeros(fields.item_sizes[0], config.text_dim))
        self.query_dim = (2 if self.text is None else 3) * dim
        self.rating = Table(fields.rating_levels + 1, config.event_dim)
        self.interval = Table(INTERVAL_BUCKETS, config.event_dim) if config.interval else None
        self.rank = Table(RANK_BUCKETS, config.event_dim) if retrieved else None
        self.event_dim = self.query_dim + config.event_dim * (2 if config.interval else 1)
        self.retrieved_dim = self.event_dim + config.event_dim
        self.statistics = nn.ModuleList(Table(LEVELS, dim) for _ in (STATISTICS if config.statistics else ()))
        self.field_count = len(fields.user_sizes) + len(fields.item_sizes) + len(self.statistics)
        self.field_count += self.text is not None
        self.sample_dim = dim * self.field_count
        for table in self.modules():
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=config.embedding_std)
                with torch.no_grad():
                    table.weight[0] = 0.0

    def _mask(self, ids: Tensor, identity: list[int], fraction: float) -> Tensor:
        """In training a fraction of the samples [B, F], with 1 (unknown) in the identifying fields."""
        if not self.training or fraction == 0.0:
            return ids
        unknown = torch.rand(len(ids), 1, device=ids.device) < fraction
        hidden = torch.zeros(ids.shape[1], dtype=torch.bool, device=ids.device)
        hidden[identity] = True
        return ids.masked_fill(unknown & hidden & (ids != 0), 1)

    def ids(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Ids of the user's and the target's fields, masked in training: [B, F_u] and [B, F_i], int64."""
        users = self._mask(batch["user"], self.user_identity, self.mask_users)
        return users, self._mask(batch["item"], self.item_identity, self.mask_items)

    def lookup(self, batch: Batch, user_ids: Tensor, item_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embeds ids as `ids` returns them, and the statistics; results as those of `sample`."""
        users = [table(user_ids[:, index]) for index, table in enumerate(self.user)]
        items = [table(item_ids[:, index]) for index, table in enumerate(self.item)]
        counts = [table(batch["statistics"][:, index]) for index, table in enumerate(self.statistics)]
        texts = self._texts(batch["dense"]) if self.text is not None else []
        query = torch.cat([items[0], items[self.category], *texts], dim=1)
        return torch.cat([*users, *items, *counts, *texts], dim=1), query

    def _texts(self, items: Tensor) -> list[Tensor]:
        """The field of dense items' texts, integers [...]: [..., d], zero for item 0; in a list."""
        assert self.text is not None
        vectors: Tensor = self.text(self.texts[items.long()])
        return [vectors]

    def sample(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeds the user and the target item.

        Args:
            batch: `user` [B, F_u], `item` [B, F_i], with `config.statistics` `statistics` [B, 6], and with
                `config.text_dim` `dense` [B], integers.

        Returns:
            All fields joined [B, F d], `field_count` F of them (user, item, statistics, text), and the target
            as an attention query: item, category and text joined [B, query_dim], float.
        """
        return self.lookup(batch, *self.ids(batch))

    def parts(self, batch: Batch, kind: str) -> list[tuple[Table, Tensor]]:
        """What an event of a history is made of: item, category, rating and, if configured, interval.

        Args:
            batch: as for `events`.
            kind: `recent` or `retrieved`.

        Returns:
            Each one's table and its ids [B, T], 0 where the mask is false, whatever ids stand there.
        """
        items = batch[f"{kind}_item"]
        padding = ~batch[f"{kind}_mask"]
        parts = [(cast(Table, self.item[column]), items[..., column]) for column in (0, self.category)]
        parts.append((self.rating, batch[f"{kind}_rating"]))
        if self.interval is not None:
            parts.append((self.interval, batch[f"{kind}_interval"]))
        return [(table, ids.masked_fill(padding, 0)) for table, ids in parts]

    def history(self, batch: Batch, kind: str) -> Events:
        """Embeds one list of history events, as far as attention wants them embedded.

        Args:
            batch: `<kind>_item` [B, T, F_i], `<kind>_rating` and `<kind>_interval` [B, T], integers;
                `<kind>_mask` [B, T] bool, true where an event is; `retrieved_rank` [B, T] integer; with
                `config.text_dim` `<kind>_dense` [B, T].
            kind: `recent` or `retrieved`.

        Returns:
            Vectors: item, category, text, which a target has too; marks: rating, interval, rank.
        """
        mask = batch[f"{kind}_mask"]
        item, category, *marks = self.parts(batch, kind)
        vectors = [table(ids) for table, ids in (item, category)]
        if self.text is not None:
            vectors += self._texts(batch[f"{kind}_dense"].masked_fill(~mask, 0))
        if kind == "retrieved":
            marks.append(self.ranks(batch["retrieved_rank"].masked_fill(~mask, 0)))
        return Events(vectors, marks, mask)

    def events(self, batch: Batch, kind: str) -> tuple[Tensor, Tensor]:
        """Embeds one list of history events: item, category, text, rating, interval (and rank) joined.

        Args:
            batch: as for `history`.
            kind: `recent` or `retrieved`.

        Returns:
            Events [B, T, event_dim] (retrieved ones [B, T, retrieved_dim]), float, whose first columns are
            laid out as the query of `sample`; zero where the mask is false, whatever ids stand there; and the
            mask.
        """
        events = self.history(batch, kind)
        return events.joined(), events.mask

    def ranks(self, rank: Tensor) -> tuple[Table, Tensor]:
        """The table of ranks by similarity, 1 the best and 0 padding, and its ids; int64 of any shape."""
        assert self.rank is not None  # the model was built to read retrieved events
        # Whole numbers are compared: ONNX's logarithm to base 2 is no whole number at the powers of 2.
        bounds = 2 ** torch.arange(RANK_BUCKETS - 1, device=rank.device)
        return self.rank, torch.bucketize(rank.long(), bounds, right=True)

    def l2(self, batch: Batch) -> Tensor:
        """Squared norm of the rows that identify the users and target items, mean over samples; scalar.

        Only rows looked up in the batch are touched, so that a popular item is not held down more than once a
        sample and a whole-table product is never computed.
        """
        rows = [self.user[index](batch["user"][:, index]) for index in self.user_identity]
        rows += [self.item[index](batch["item"][:, index]) for index in self.item_identity]
        return torch.stack([row.square().sum(1).mean() for row in rows]).sum()


class Model(nn.Module):
    """What every CRM is: sizes, settings, a forward pass, a regularizer.

    Args:
        fields: table sizes.
        config: widths and rates.
    """

    def __init__(self, fields: Fields, config: CrmConfig) -> None:
        """Keeps both."""
        super().__init__()
        self.fields = fields
        self.config = config

    @property
    def representation_dim(self) -> int:
        """Width d_c of the representation."""
        return self.config.mlp[-1]

    def set_texts(self, texts: Tensor, trained: Tensor) -> None:
        """Takes the text vectors of a model with `config.text_dim`; its weights hold them from then on.

        Args:
            texts: float [n_items, text_dim].
            trained: bool [n_items], the items with a training event.
        """
        raise NotImplementedError(f"{self.config.name} reads no texts")

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores a batch of `recllm.crm.inputs.CrmInputs`.

        Returns:
            Logit [B], and representation [B, representation_dim].
        """
        raise NotImplementedError

    def id_tables(self) -> list[nn.Embedding]:
        """Tables with a row an id of the data: those that may get big, and can be trained by rows."""
        raise NotImplementedError

    def l2(self, batch: Batch) -> Tensor:
        """Regularizer to add to the loss; scalar."""
        raise NotImplementedError


class FieldModel(Model):
    """A CRM that embeds all fields of user and target; its representation ends the prediction MLP (`Tower`).

    Args:
        fields: table sizes.
        config: widths and rates.
        retrieved: whether the model reads retrieved events.
    """

    def __init__(self, fields: Fields, config: CrmConfig, retrieved: bool = False) -> None:
        """Draws the tables."""
        super().__init__(fields, config)
        self.embeddings = Embeddings(fields, config, retrieved)

    def id_tables(self) -> list[nn.Embedding]:
        """See `Model`."""
        return [*self.embeddings.user, *self.embeddings.item]

    def set_texts(self, texts: Tensor, trained: Tensor) -> None:
        """See `Model`; which items are trained is in their ids already."""
        self.embeddings.texts.copy_(texts)

    def l2(self, batch: Batch) -> Tensor:
        """See `Model`: `config.l2` times `Embeddings.l2`."""
        if self.config.l2 == 0:
            return batch["user"].new_zeros((), dtype=torch.get_default_dtype())
        return self.config.l2 * self.embeddings.l2(batch)


class TargetAttention(nn.Module):
    """DIN's activation unit and weighted sum (Zhou et al. 2018, arXiv 1706.06978, eq. 3), padding masked.

    For event e and query q the unit is an MLP over [e, q, e' - q, e' * q], where e' is the part of e that
    describes an item as q does (rating and interval, which a target lacks, come after it). Its first layer is
    linear in that vector, so with W = [W_e, W_q, W_d, W_p] it factors into

        W [e, q, e' - q, e' * q] = (W_e + [W_d, 0] + [W_p diag(q), 0]) e + (W_q - W_d) q

    whose matrix and last term are computed once a sample: the [B, T, 4 d] tensor is never made. What the
    matrix makes of an event's marks, which do not meet q, is looked up. As in the paper the weights are not
    normalized by a softmax, so that the sum keeps how strongly the history speaks.

    Differences: element-wise product in the unit's input, as in the authors' code (the paper's figure has the
    outer product); ReLU for Dice.

    Args:
        query_dim: width d_q of the query.
        event_dim: width d_e >= d_q of an event.
        hidden: widths of the unit's hidden layers, at least one.

    Raises:
        ValueError: no hidden layer.
    """

    def __init__(self, query_dim: int, event_dim: int, hidden: Sequence[int]) -> None:
        """Draws the weights as `nn.Linear` does."""
        super().__init__()
        if not hidden:
            raise ValueError("got attention_mlp=[]; wanted at least one width, e.g. attention_mlp=[64]")
        self.parts = [event_dim, query_dim, query_dim, query_dim]
        self.first = nn.Linear(sum(self.parts), hidden[0])
        widths = [*hidden, 1]
        self.rest = nn.ModuleList(nn.Linear(before, after) for before, after in itertools.pairwise(widths))

    def scores(self, query: Tensor, events: Tensor, mask: Tensor) -> Tensor:
        """Weights of the events, 0 where the mask is false, by operations on the whole batch.

        Args:
            query: [B, d_q].
            events: [B, T, d_e].
            mask: [B, T] bool.

        Returns:
            [B, T].
        """
        samples, length, event_dim = events.shape
        width = query.shape[1]
        constant, of_event, of_product = self._first(query)
        product = events[..., :width] * query.unsqueeze(1)
        hidden = events.reshape(-1, event_dim) @ of_event
        hidden = torch.addmm(hidden, product.view(-1, width), of_product)
        hidden = hidden.view(samples, length, -1) + constant.unsqueeze(1)
        for layer in self.rest:
            hidden = layer(functional.relu_(hidden))  # in place: the largest tensor of the model
        return hidden.squeeze(2).masked_fill(~mask, 0.0)

    def _first(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first layer's constant [B, h], weights of the event [d_e, h] and of the product [d_q, h]."""
        event_dim, width = self.parts[:2]
        of_event, of_query, of_difference, of_product = self.first.weight.t().split(self.parts)
        constant = torch.addmm(self.first.bias, query, of_query - of_difference)
        of_event = of_event + functional.pad(of_difference, (0, 0, 0, event_dim - width))
        return constant, of_event.contiguous(), of_product.contiguous()

    def forward(self, query: Tensor, events: Events) -> Tensor:
        """Sum of the events by weight [B, d_e]; an empty history gives zeros.

        Args:
            query: [B, d_q].
            events: of which the vectors are at least d_q wide.
        """
        if torch.compiler.is_compiling():  # the compiler fuses the plain formula better than pieces
            joined = events.joined()
            weights = self.scores(query, joined, events.mask)
            return torch.bmm(weights.unsqueeze(1), joined).squeeze(1)
        constant, of_event, of_product = self._first(query)
        widths = [table.embedding_dim for table, _ in events.marks]
        of_event, *of_marks = of_event.split([len(of_event) - sum(widths), *widths])
        outputs = [
            (ids, table.rows() @ weight) for (table, ids), weight in zip(events.marks, of_marks, strict=True)
        ]
        beyond = len(of_event) - query.shape[1]
        device = query.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
        marks = [value for ids, rows in _merged(outputs) for value in (ids, rows.to(dtype))]
        inputs = [
            events.mask,
            functional.pad(query, (0, beyond)),
            constant,
            of_event,
            functional.pad(of_product, (0, 0, 0, beyond)),
            *events.vectors,
        ]
        deeper = [value for layer in self.rest for value in (layer.weight, layer.bias)]
        with torch.autocast(device, enabled=False):
            interest, weights = Attend.apply(
                len(events.vectors),
                len(marks) // 2,
                *(value.to(dtype) for value in inputs),
                *marks,
                *(value.to(dtype) for value in deeper),
            )
        sums = [weighted_sums(*mark, weights.unsqueeze(1)).squeeze(1) for mark in events.marks]
        return torch.cat([interest, *sums], dim=1)


def _merged(marks: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Marks as ids [B, T] and what a sum over marks takes of each value [n, h]; few values become one."""
    merged: list[tuple[Tensor, Tensor]] = []
    for ids, rows in marks:
        if merged and len(merged[-1][1]) * len(rows) <= MERGED:
            before, outputs = merged.pop()
            ids = before * len(rows) + ids
            rows = (outputs.unsqueeze(1) + rows).flatten(0, 1)
        merged.append((ids, rows))
    return merged


class HistoryFields(nn.Module):
    """The history as fields, for models that know fields but no events: weighted means of its events.

        h_c = 1/T sum_t (w_c . [rating_t, interval_t] + b_c) [item_t, category_t]      for each channel c
        h_r = W 1/T sum_t [rating_t, interval_t] + b

    What the user thought of an event and how long ago it was is its weight, so that an item liked and an item
    disliked can count against each other (an unweighted mean of items beside one of ratings could not tell
    which was which). b_c starts at 1: a plain mean.

    Args:
        config: widths; whether events carry a time interval.
        channels: C.
    """

    def __init__(self, config: CrmConfig, channels: int = 2) -> None:
        """Draws the weights as `nn.Linear` does."""
        super().__init__()
        self.count = 2 * channels + 1
        self.of_rating = nn.Linear(config.event_dim, channels)
        nn.init.ones_(self.of_rating.bias)
        self.of_interval = nn.Linear(config.event_dim, channels, bias=False) if config.interval else None
        self.join = nn.Linear(config.event_dim * (2 if config.interval else 1), config.embedding_dim)

    def forward(self, embeddings: Embeddings, batch: Batch) -> Tensor:
        """Fields [B, 2 C + 1, d], float: item of each channel, category of each channel, rating."""
        mask = batch["recent_mask"]
        mean_weight = mask.to(embeddings.rating.weight.dtype) / mask.sum(1, keepdim=True).clamp_min(1)
        parts = embeddings.parts(batch, "recent")
        means = []
        weights = []
        weighing = [linear for linear in (self.of_rating, self.of_interval) if linear is not None]
        for (table, ids), weigh in zip(parts[2:], weighing, strict=True):
            means.append(weighted_sums(table, ids, mean_weight.unsqueeze(1)).squeeze(1))
            weights.append((ids, weigh(table.rows())))
        # Once a value of few. A row more in front: the first one has no gradient, and events without a
        # rating, of code 0, have a weight all the same.
        looked_up = [rows_of(functional.pad(rows, (0, 0, 1, 0)), ids + 1) for ids, rows in _merged(weights)]
        of_events = sum(looked_up[1:], looked_up[0]).transpose(1, 2)
        # Padding has weights too, but its rows are zero: the mean is taken of the sums, not of the weights.
        pooled = [weighted_sums(table, ids, of_events) for table, ids in parts[:2]]
        fields = torch.cat(pooled, dim=1) / mask.sum(1).clamp_min(1)[:, None, None]
        return torch.cat([fields, self.join(torch.cat(means, dim=1)).unsqueeze(1)], dim=1)


def aligned(batch: Batch, end: str) -> dict[str, Tensor]:
    """The batch with the recent events at one end of their list, in time order, and the padding at the other.

    Args:
        batch: as for `Embeddings.events`, padding anywhere.
        end: `left` or `right`.
    """
    mask = batch["recent_mask"]
    # As the log gives them? On a GPU asking would cost more than sorting, and a compiler cannot ask.
    asks = end == "right" and mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if asks and not (mask[:, :-1] > mask[:, 1:]).any():
        return dict(batch)
    # No two keys are the same: ONNX has no sorting that keeps the order of equal ones.
    place = torch.arange(mask.shape[1], device=mask.device)
    order = torch.where(mask if end == "right" else ~mask, place + 2**32, place).argsort(dim=1)
    columns = [f"recent_{what}" for what in ("rating", "interval", "elapsed", "dense", "mask")]
    moved = {column: batch[column].gather(1, order) for column in columns if column in batch}
    if "recent_item" in batch:
        items = batch["recent_item"]
        moved["recent_item"] = items.gather(1, order.unsqueeze(2).expand_as(items))
    return {**batch, **moved}


class SequenceHead(nn.Module):
    """CTR head of the models that were made to predict the next item: GRU4Rec, Caser, SASRec.

    Those score an item by the inner product of a state of the sequence and the item's vector. Here that
    product is not yet summed, and is joined with the state and all fields of the sample, for the prediction
    MLP:

        logit, representation = MLP([user fields, item fields, s, (W s) * v_A])

    Args:
        embeddings: the model's tables; they are not registered here again.
        width: width w of the state s.
        config: of the MLP.
    """

    def __init__(self, embeddings: Embeddings, width: int, config: CrmConfig) -> None:
        """Draws the weights as `nn.Linear` does."""
        super().__init__()
        self.match = nn.Linear(width, embeddings.query_dim)
        self.tower = Tower(embeddings.sample_dim + width + embeddings.query_dim, config)

    def forward(self, sample: Tensor, query: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Logit [B] and representation [B, d_c] of the results of `Embeddings.sample` and states [B, w]."""
        return self.tower(torch.cat([sample, state, self.match(state) * query], dim=1))


class Tower(nn.Module):
    """Prediction MLP: input dropout, hidden layers with ReLU and dropout, one logit.

    Args:
        dim: width of the input.
        config: `mlp`, `dropout`, `embedding_dropout`.
    """

    def __init__(self, dim: int, config: CrmConfig) -> None:
        """Draws the weights as `nn.Linear` does."""
        super().__init__()
        if not config.mlp:
            raise ValueError("got mlp=[]; wanted at least one width, e.g. mlp=[256,256,256]")
        layers: list[nn.Module] = [nn.Dropout(config.embedding_dropout)]
        for width in config.mlp:
            layers += [nn.Linear(dim, width), nn.ReLU(), nn.Dropout(config.dropout)]
            dim = width
        self.hidden = nn.Sequential(*layers)
        self.logit = nn.Linear(dim, 1)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Maps inputs [B, dim] to (logit [B], representation [B, mlp[-1]] = last hidden layer)."""
        representation = self.hidden(inputs)
        return self.logit(representation).squeeze(1), representation
