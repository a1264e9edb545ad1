"""In which order the samples of each split are read, which of them rank, and among which candidates."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import polars as pl

from recllm.eventlog import candidates, draws
from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.given import Given
from recllm.eventlog.log import EventLog
from recllm.eventlog.names import CandidateKind
from recllm.files import write_array

Array = npt.NDArray[Any]


def write_row_orders(
    log: EventLog, config: PrepareConfig, order: dict[str, Array], external: pl.Series, given: Given
) -> dict[str, float]:
    """Writes orders, permutations, ranking rows and candidate lists; counts ranking targets that are cold.

    Where the data set has lists of its own for a split, those samples are its ranking rows.

    Raises:
        ValueError: no row can be ranked, as the users have met nearly everything.
    """
    metrics: dict[str, float] = {}
    most = {"valid": config.ranking_valid_rows, "test": config.ranking_test_rows}
    liked = {}
    for name, rows in order.items():
        write_array(log.folder / f"order_{name}.npy", rows)
        permuted = draws.permutation(draws.derive(config.seed, "permutation", name), rows)
        write_array(log.folder / f"permutation_{name}.npy", permuted)
        if name in log.meta["given_candidates"]:
            liked[name] = given.of(permuted[log.label[permuted] == 1])[0]
        elif name != "train":
            liked[name], counts = _without_repeats(log, config, permuted[log.label[permuted] == 1], name)
            metrics |= counts
    rankable = {
        name: rows[candidates.have_new_items(log, rows, config.candidates - 1)]
        for name, rows in liked.items()
    }
    seen_all = [name for name, rows in liked.items() if most[name] and len(rows) > len(rankable[name]) == 0]
    if seen_all:
        raise ValueError(_nothing_to_rank(log, config, {name: liked[name] for name in seen_all}, external))
    for name, rows in rankable.items():
        ranking = rows[: most[name]]
        write_array(log.folder / f"ranking_{name}.npy", ranking)
        metrics[f"ranking_{name}_rows"] = len(ranking)
        metrics[f"ranking_{name}_cold_targets"] = int((log.item_count[log.item[ranking]] == 0).sum())
        if name in log.meta["given_candidates"]:
            _write_lists(log, name, CandidateKind("given", config.candidates), given.of(ranking)[1])
        if most[name]:
            metrics[f"not_ranking_{name}_seen_much"] = len(liked[name]) - len(rows)
            met = int(candidates.met_before(log, ranking).sum()) if config.repeats == "keep" else 0
            metrics[f"ranking_{name}_met_before"] = met
            metrics[f"ranking_{name}_candidates_met_before_share"] = 0.0
        for kind in candidates.KINDS:
            lists = candidates.candidate_lists(log, ranking, kind, config.candidates, config.seed)
            _write_lists(log, name, CandidateKind(kind, config.candidates), lists)
            if kind == "uniform" and log.draws_met and len(ranking):
                others = candidates.met_before(log, ranking, lists) & (lists != log.item[ranking, None])
                share = others.sum() / (len(ranking) * (config.candidates - 1))
                metrics[f"ranking_{name}_candidates_met_before_share"] = float(share)
    return metrics


def _write_lists(log: EventLog, split: str, kind: CandidateKind, lists: Array) -> None:
    """Write the candidates of a split's ranking rows, int32 `[R, C]`."""
    write_array(log.folder / f"candidates_{split}_{kind}.npy", lists)


def _without_repeats(
    log: EventLog, config: PrepareConfig, liked: Array, name: str
) -> tuple[Array, dict[str, int]]:
    """The liked samples of a split that may be ranked, without those of an item met before; counts of these.

    Raises:
        ValueError: all of them are such.
    """
    is_ranked = bool({"valid": config.ranking_valid_rows, "test": config.ranking_test_rows}[name])
    if config.repeats == "keep" or not is_ranked or not len(liked):
        return liked, {}
    new = liked[~candidates.met_before(log, liked)]
    if not len(new):
        # Then other candidates may be items that were met, too.
        is_known = log.item_count > 0
        others = is_known.sum() - is_known[log.item[liked]]
        keeping_helps = (others >= config.candidates - 1).any()
        mend = "repeats=keep" if keeping_helps else "ranking_valid_rows=0 prepare.ranking_test_rows=0"
        raise ValueError(
            f"prepare.repeats=leave_out, but all {len(liked):,} liked {name} samples are of items that their "
            f"users had met before, wanted others to rank; ARGS='prepare.{mend}'"
        )
    return new, {f"liked_{name}": len(liked), f"not_ranking_{name}_met_before": len(liked) - len(new)}


def _nothing_to_rank(
    log: EventLog, config: PrepareConfig, liked: dict[str, Array], external: pl.Series
) -> str:
    """What is wrong where no liked sample of these splits can be ranked, and what mends it in all of them."""
    found = {name: candidates.most_new_items(log, rows, external) for name, rows in liked.items()}
    name = min(found, key=lambda name: found[name][0])
    most, user = found[name]
    mend = f"prepare.candidates={most + 1}"
    if not most:
        mend = " ".join(f"prepare.ranking_{name}_rows=0" for name in found)
    return (
        f"prepare.candidates={config.candidates}, but none of the {len(liked[name]):,} liked {name} samples "
        f"has {config.candidates - 1} items of the training catalog that are new to its user; the most, "
        f"{most}, has user {user!r}; ARGS='{mend}'"
    )
