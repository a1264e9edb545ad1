"""Opens what parent stages left on disk, in the way that every later stage needs it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from recllm import paths
from recllm.columns import UNKNOWN
from recllm.crm import Model, load
from recllm.crm.features import FeatureCache
from recllm.data.batches import CrmInputs, chronological
from recllm.data.candidates import KINDS, candidate_lists
from recllm.data.log import EventLog, Rows
from recllm.data.pieces import sentence
from recllm.data.prompts import Pieces, Prompts, fill
from recllm.data.statistics import Statistics
from recllm.lm.config import EncoderConfig, LmConfig, TinyConfig
from recllm.lm.encoder import load_encoder
from recllm.lm.layout import SEPARATE, SHARED
from recllm.lm.load import context_length, load_lm
from recllm.lm.probe import layout_of, windows
from recllm.lm.tasks import Answers, Titles, Verdicts
from recllm.lm.tiny import train_tokenizer
from recllm.manifest import Manifest
from recllm.retrieval.category import SameCategory
from recllm.retrieval.neighbours import Neighbours
from recllm.run import Run, StageError, read_config, say
from recllm.schema import Config

NEIGHBOURS = "neighbours.npy"
VECTORS = "vectors.npy"
FOLDS = "folds.npy"


def event_log(run: Run) -> EventLog:
    """The event log."""
    return EventLog.open(run.parent("log"))


def check_same_prompts(run: Run, role: str) -> None:
    """Refuse a parent that was tuned on other prompts than this run would ask with.

    Whether histories are retrieved is a system's own choice (`recllm.parents.retrieves`).

    Raises:
        StageError: the first key that differs, with both values.
    """
    theirs, ours = read_config(run.parent(role))["config"], run.content["config"]
    for section in ("prompt", "wording"):
        for name, value in theirs[section].items():
            if name != "retrieved" and value != ours[section][name]:
                key, stage = f"{section}.{name}", run.parents[role].partition("/")[0]
                raise StageError(
                    f"{run.parents[role]} was tuned with {key}={value!r}, and this stage would ask with "
                    f"{ours[section][name]!r}; add ARGS={key}=..., or tune it anew with `make {stage}`"
                )


def retrieves(run: Run, folder: str) -> bool:
    """Whether Yes/No prompts of a system of stage 2, or of what stage 3 made of it, show nearest events."""
    content = read_config(run.root / folder)
    return bool(
        retrieves(run, content["parents"]["stage2"])
        if content["stage"] == "stage3"
        else content["config"]["prompt"]["retrieved"]
    )


def ranking(run: Run, log: EventLog, split: str, kind: str) -> tuple[Rows, NDArray[np.int32]]:
    """Rows of the ranking task and their candidates; hard ones lie where the vectors are."""
    return log.ranking(split, kind, run.parent("neighbours") if kind.startswith("hard") else None)


def ranks(log: EventLog) -> bool:
    """Whether validation rows of the ranking task are stored, by which checkpoints can be selected."""
    return all(len(log.ranking("valid", kind)[0]) for kind in log.lists)


def check_ranks(log: EventLog) -> None:
    """Refuse a log without such rows.

    Raises:
        StageError: what to set.
    """
    if not ranks(log):
        raise StageError(
            "no validation rows are ranked, so nothing selects a checkpoint; wanted "
            "prepare.ranking_valid_rows above 0, and validation rows whose item was liked"
        )


@dataclass(frozen=True)
class Retrieval:
    """Nearest earlier events: stored for the rows' own items, searched for other targets."""

    stored: NDArray[np.int32]
    searcher: Neighbours

    @classmethod
    def open(cls, run: Run, log: EventLog) -> Retrieval:
        """Map the parent's neighbours and vectors."""
        folder = run.parent("neighbours")
        searcher = Neighbours(log, np.load(folder / VECTORS, mmap_mode="r"), np.load(folder / FOLDS))
        return cls(np.load(folder / NEIGHBOURS, mmap_mode="r"), searcher)

    def nearest(self, rows: Rows, k: int) -> Rows:
        """The k earlier events nearest to each row's own item, `[B, k]`, in time order, -1 on the left."""
        if self.stored.shape[1] < k:
            raise ValueError(
                f"{self.stored.shape[1]} neighbours are stored, {k} wanted; add ARGS=retrieval.k={k}"
            )
        return chronological(self.stored[rows, :k])


@functools.lru_cache(maxsize=1)
def _statistics(log: EventLog) -> Statistics:
    """Running statistics of a log, sorted once however many CRMs of an evaluation read them."""
    return Statistics(log)


def crm_inputs(log: EventLog, shown: Mapping[str, Any], retrieval: Retrieval | None) -> CrmInputs:
    """Batches for a CRM that reads what `shown` says: `Stage1Config.inputs`, which its manifest repeats."""
    recent, retrieved = shown["recent"], shown["retrieved"]
    statistics = _statistics(log) if shown["statistics"] else None
    if shown["search"] == "semantic":
        assert retrieval is not None  # the plan makes the neighbours a parent
        return CrmInputs(log, recent, retrieved, retrieval.stored, retrieval.searcher, statistics)
    searcher = SameCategory(log) if shown["search"] else None
    return CrmInputs(log, recent, retrieved, searcher=searcher, statistics=statistics)


@dataclass(frozen=True)
class Crm:
    """A trained CRM, its inputs, and its cached representations."""

    model: Model
    cache: FeatureCache
    manifest: Manifest
    gate_input: str = "target"
    seed: int = 0
    ranks: bool = False
    """Whether it was trained to tell liked items from drawn ones: its logit is then no click's."""

    @classmethod
    def open(cls, run: Run, log: EventLog, retrieval: Retrieval | None, role: str = "stage1") -> Crm:
        """Load the export of the parent with this role; the cache lies in the CRM's own folder."""
        folder, manifest = run.parent(role), run.manifest(role)
        model = load(folder / paths.EXPORT)
        inputs = crm_inputs(log, manifest.metrics["inputs"], retrieval)
        cache = FeatureCache(folder / paths.FEATURES, model, inputs, manifest.identity)
        ranks = read_config(folder)["config"]["stage1"]["objective"] == "rank"
        return cls(model, cache, manifest, ranks=ranks)

    def read_as(self, gate_input: str | None, seed: int) -> Crm | None:
        """The CRM as a gate reads it (`AdapterConfig.gate_input`), or None where nothing is read.

        Args:
            gate_input: `user` asks for every row with an unknown item; `shuffled` gives every row another
                row's representation, by a permutation of all rows of a call; `target` changes nothing.
            seed: of the permutation.
        """
        return None if gate_input is None else dataclasses.replace(self, gate_input=gate_input, seed=seed)

    def representations(self, rows: Rows, targets: NDArray[np.int32] | None = None) -> torch.Tensor:
        """float32 `[n, d_c]` for pairs, or the mean over targets `[n, C]` of each row."""
        if self.gate_input == "user":
            targets = np.full(len(rows), UNKNOWN, np.int32)
        if targets is None or targets.ndim == 1:
            found = np.array(self.cache.get(rows, targets)[1])
        else:
            flat = self.cache.get(np.repeat(rows, targets.shape[1]), targets.ravel())[1]
            found = np.array(flat).reshape(*targets.shape, -1).mean(1)
        if self.gate_input == "shuffled":
            # The next one on a random circle through all rows: no row keeps its own.
            circle = np.random.default_rng(self.seed).permutation(len(rows))
            found[circle] = found[np.roll(circle, 1)]
        return torch.from_numpy(found)

    def each(self, rows: Rows, targets: NDArray[np.int32]) -> torch.Tensor:
        """float32 `[n, C, d_c]` for targets `[n, C]`: every pair's own."""
        flat = self.representations(np.repeat(rows, targets.shape[1]), targets.ravel())
        return flat.view(*targets.shape, -1)

    def trained_on(self, log: EventLog, rows: Rows) -> int:
        """How many of these training samples the CRM was trained on."""
        held = self.manifest.metrics["hold_out"]
        return len(rows) if held == "none" else int((~np.isin(rows, log.rows("train", held))).sum())

    def logits(self, rows: Rows, targets: NDArray[np.int32] | None = None) -> NDArray[np.float32]:
        """float32 `[n]` for pairs, `[n, C]` for targets `[n, C]`."""
        if targets is None or targets.ndim == 1:
            return np.array(self.cache.get(rows, targets)[0])
        flat = self.cache.get(np.repeat(rows, targets.shape[1]), targets.ravel())[0]
        return np.array(flat).reshape(targets.shape)


@dataclass(frozen=True)
class Lm:
    """A frozen causal LM and everything that turns rows of the log into its input."""

    model: Any
    tokenizer: Any
    prompts: Prompts
    log: EventLog
    config: Config
    retrieval: Retrieval | None
    layout: str = SHARED

    @classmethod
    def open(cls, run: Run, log: EventLog, retrieval: Retrieval | None, reserved: int = 0) -> Lm:
        """Load the LM of the parent `lm`, or by hub id or path; prompts leave `reserved` tokens free."""
        model, tokenizer = causal_lm(run)
        pieces = build_pieces(run.config, log, tokenizer)
        context = context_length(run.config.lm.model, model.config)
        layout = layout_of(model, context)
        if layout == SEPARATE:
            window = min(windows(model.config), default=context)
            mend = f"; lm.model.context={window} would mend it" if window < context else ""
            say(
                f"{run.config.lm.model.name} cannot share a prompt of {context:,} tokens among titles: "
                f"each title is a sequence of its own, several times slower{mend}"
            )
        if run.config.trainer.attention == "flex":
            if not torch.cuda.is_available():
                raise ValueError("trainer.attention=flex needs a GPU; wanted sdpa here")
            if layout == SHARED:
                model.set_attn_implementation("flex_attention")  # after the example, which runs on any device
        prompts = Prompts(log, pieces, context - reserved)
        return cls(model, tokenizer, prompts, log, run.config, retrieval, layout)

    def shown(self, rows: Rows, retrieved: bool) -> Rows:
        """Short histories `[B, k]` of Yes/No prompts: nearest to the target, or the most recent events."""
        k = self.config.prompt.history
        if retrieved:
            assert self.retrieval is not None
            return self.retrieval.nearest(rows, k)
        return self.log.recent(rows, k)

    def answers(self, rows: Rows, crm: Crm | None, retrieved: bool, mixed: bool = False) -> Answers:
        """The Yes/No task on rows; a gate reads the CRM's representation of each row's own target.

        With `mixed`, all rows follow once more with the other kind of history.
        """
        shown = self.shown(rows, retrieved)
        if mixed:
            shown = np.concatenate([shown, self.shown(rows, not retrieved)])
            rows = np.concatenate([rows, rows])
        return Answers(self.prompts, rows, shown, crm.representations(rows) if crm else None)

    def titles(
        self, rows: Rows, candidates: NDArray[np.int32], crm: Crm | None, each: bool = False
    ) -> Titles:
        """The next-title task on liked rows, after the most recent events, which tell nothing of the target.

        A gate reads the mean over all candidates of the CRM's representation; with `each` every title's own.
        """
        recent = self.log.recent(rows, self.config.prompt.history)
        representation = None
        if crm:
            representation = (crm.each if each else crm.representations)(rows, candidates)
        return Titles(
            self.prompts,
            self.log,
            rows,
            recent,
            candidates,
            representation,
            self.config.prompt.list_candidates,
            self.layout,
        )

    def verdicts(
        self, rows: Rows, candidates: NDArray[np.int32], crm: Crm | None, retrieved: bool
    ) -> Verdicts:
        """The Yes/No task on every candidate of liked rows; a gate reads each candidate's representation."""
        k, shape = self.config.prompt.history, candidates.shape
        if retrieved:
            assert self.retrieval is not None
            shown = self.retrieval.searcher.search(rows, candidates, k, "time")
        else:
            shown = np.broadcast_to(self.log.recent(rows, k)[:, None], (*shape, k))
        representation = crm.each(rows, candidates) if crm else None
        return Verdicts(self.prompts, self.log, rows, shown, candidates, representation)

    def valid_titles(self, count: int, crm: Crm | None, each: bool = False) -> Titles:
        """The next-title task on stored validation rows, each once with every kind of candidate list."""
        return self.titles(*self._valid(count), crm, each)

    def valid_verdicts(self, count: int, crm: Crm | None, retrieved: bool) -> Verdicts:
        """The Yes/No task on the candidates of the rows of `valid_titles`."""
        return self.verdicts(*self._valid(count), crm, retrieved)

    def _valid(self, count: int) -> tuple[Rows, NDArray[np.int32]]:
        parts = [self.log.ranking("valid", kind) for kind in self.log.lists]
        rows = np.concatenate([rows[:count] for rows, _ in parts])
        return rows, np.concatenate([lists[:count] for _, lists in parts])


def causal_lm(run: Run) -> tuple[Any, Any]:
    """The frozen LM and its tokenizer: the one that the parent `lm` trained, or by hub id or path."""
    config = run.config.lm.model
    return load_lm(config, run.parent("lm") / paths.EXPORT if config.path is None else None)


def encoder(run: Run) -> tuple[Any, Any, int]:
    """The encoder of the parent `encoder`, its tokenizer and context: trained there, or named there."""
    facts = run.manifest("encoder").metrics
    config = EncoderConfig(**{key: facts[key] for key in ("path", "revision", "context")})
    return load_encoder(config, run.parent("encoder") / paths.EXPORT if config.path is None else None)


def tower_prompts(config: Config, log: EventLog, tokenizer: Any, context: int) -> Prompts:
    """Texts of the two towers, of `context` tokens at most."""
    return Prompts(log, build_pieces(config, log, tokenizer, LmConfig()), context)


def texts(config: Config, log: EventLog) -> tuple[list[str], list[str], list[str]]:
    """Title and card of every dense item id, profile of every dense user id; empty for the reserved ids."""
    items = pl.read_parquet(log.folder / "items.parquet")
    users = pl.read_parquet(log.folder / "users.parquet")
    titles = [title or "" for title in items["title"].to_list()]
    return titles, fill(config.dataset.card, items), fill(config.wording.profile, users)


def tiny_tokenizer(config: Config, log: EventLog, tiny: TinyConfig) -> Any:
    """The tokenizer of the tiny LM or encoder: made of the data set's texts, weighed by training events."""
    titles, cards, profiles = texts(config, log)
    names = config.wording.names(titles)
    seen = np.bincount(log.user[np.flatnonzero(log.train_events())], minlength=log.n_users)
    pieces = [*names, *cards, *profiles]
    counts = [*log.item_count.tolist(), *([1] * len(cards)), *seen.tolist()]
    if config.prompt.statistics:  # every prompt holds them: they become tokens of their own
        known = {text for _, parts in sentence(config.wording.known) for text in parts}
        pieces, counts = [*pieces, *sorted(known)], [*counts, *([log.n_events] * len(known))]
    return train_tokenizer(tiny, config.wording, log.meta["rating_levels"], pieces, counts)


def build_pieces(config: Config, log: EventLog, tokenizer: Any, model: LmConfig | None = None) -> Pieces:
    """Tokenise every text of the data set once; `model` says what stands around prompts (None: the LM's)."""
    titles, cards, profiles = texts(config, log)
    model = model or config.lm.model
    levels = log.meta["rating_levels"]
    return Pieces.build(
        tokenizer,
        config.wording,
        titles,
        levels,
        profiles,
        prefix=model.prefix,
        suffix=model.suffix,
        cards=cards,
        statistics=config.prompt is not None and config.prompt.statistics,  # retrieval asks nothing
    )


def subsample(config: Config, log: EventLog) -> Rows:
    """Training rows of stage 2, int64 `[n]`: of one kind, smaller sets lie in larger ones."""
    return log.rows("train", config.subsample)


def aligned_rows(log: EventLog, tuned: Rows, count: int) -> Rows:
    """Liked training rows for stage 3: in the order of the stored permutation those that tuned no start.

    Where the rest of the training split is too small, the `tuned` ones fill up, in the same order.
    """
    permutation = log.rows("train", "1.0")
    used = np.isin(permutation, tuned)
    rest = np.concatenate([permutation[~used], permutation[used]])
    return rest[log.label[rest] == 1][:count]


def drawn_lists(log: EventLog, rows: Rows, seed: int, kind: str = "mixed") -> NDArray[np.int32]:
    """Candidate lists `[n, C]` of training rows, as long as the stored ones.

    Of one kind, or `mixed`: uniform and popular by turns.
    """
    size = log.meta["candidates"]
    lists = np.empty((len(rows), size), np.int32)
    kinds = KINDS if kind == "mixed" else (kind,)
    for place, name in enumerate(kinds):
        lists[place :: len(kinds)] = candidate_lists(log, rows[place :: len(kinds)], name, size, seed)
    return lists


def export_folder(run: Run) -> Path:
    """Where a stage puts what others load."""
    return run.folder / paths.EXPORT
