"""RecTools' sequential models on a leave-one-out log: `rectools_next FOLDER`, in RecTools' own environment.

`bench/next_item.py` writes what this reads: `job.json`, and two folders up `events.npz`. It trains one model
with one seed on the training events, keeps the weights of the epoch with the best HR@10 on the validation
rows, and writes what it recommends to the users of the test rows (`lists.npz`) and how it got there
(`fit.json`). The items of the test rows are not in what it reads. A run that was broken off goes on behind
its last whole epoch.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from rectools import Columns
from rectools.dataset import Dataset
from rectools.dataset.context import get_context
from rectools.models import HSTUModel, SASRecModel
from rectools.models.nn.item_net import IdEmbeddingsItemNet
from rectools.models.nn.transformers.ligr import LiGRLayers
from rectools.models.nn.transformers.similarity import DistanceSimilarityModule
from rectools.models.nn.transformers.utils import leave_one_out_mask

MODELS = {"sasrec": SASRecModel, "esasrec": SASRecModel, "hstu": HSTUModel}
LISTED = 500
"""Items that a user is recommended, at most."""
LIBRARIES = ("rectools", "pytorch-lightning", "torch", "numpy", "pandas")
K = 10
"""Cutoff of the hit rate by which an epoch is chosen."""


class HitRate(Callback):
    """HR@10 on the validation rows, over all items that the model knows but those of the history it reads."""

    def __init__(self) -> None:
        """Nothing is measured yet."""
        self.by_epoch: list[float] = []
        self._found: list[torch.Tensor] = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Whether fewer than 10 items have a larger score than the row's own."""
        model = pl_module.torch_model
        vectors = model.encode_sessions(batch, pl_module.item_embs)[:, -1, :]
        scores = model.similarity_module(vectors, pl_module.item_embs)
        scores[:, 0] = -torch.inf  # padding
        scores.scatter_(1, batch["x"], -torch.inf)
        own = scores.gather(1, batch["y"])
        better = (scores > own).sum(dim=1)
        self._found.append((better < K) & own.squeeze(1).isfinite())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean."""
        rate = float(torch.cat(self._found).float().mean())
        self._found.clear()
        self.by_epoch.append(rate)
        pl_module.log("hit_rate", rate)
        print(f"epoch {len(self.by_epoch)}: HR@{K} {rate:.4f} on validation", file=sys.stderr, flush=True)

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on knows of the epochs before."""
        return {"by_epoch": self.by_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.by_epoch = state_dict["by_epoch"]


class CatalogProducts(DistanceSimilarityModule):
    """RecTools' logits of the positive and the negatives, taken out of one product with the whole catalog.

    RecTools gathers a vector for each of them, 1.7 GB a batch, and as much for the gradient: a CPU takes five
    times as long. The logits are the same, up to rounding; those of padding are 0, and no loss reads them.
    """

    def _get_pos_neg_logits(
        self, session_embs: torch.Tensor, item_embs: torch.Tensor, candidate_item_ids: torch.Tensor
    ) -> torch.Tensor:
        # Of a validation batch only the last position has candidates.
        at = session_embs[:, -candidate_item_ids.shape[1] :]
        there = candidate_item_ids[..., 0] != 0
        logits = (at[there] @ item_embs.T).gather(-1, candidate_item_ids[there])
        return logits.new_zeros(candidate_item_ids.shape).index_put((there,), logits)


class Resuming(Trainer):
    """A trainer that goes on from the last whole epoch's checkpoint, where there is one."""

    def fit(self, model: Any, *loaders: Any, **words: Any) -> None:
        """As `Trainer.fit`."""
        last = Path(self.checkpoint_callback.dirpath) / "last.ckpt"
        model.is_fitted = last.exists()  # RecTools draws the initial weights anew where this is False
        super().fit(model, *loaders, ckpt_path=str(last) if last.exists() else None, **words)


def make_trainer(folder: str, epochs: int, patience: int, device: str, steps: int | None) -> Trainer:
    """A trainer that keeps the best epoch's weights, and the last one's.

    Args:
        folder: where both are kept.
        epochs: at most.
        patience: epochs without a better HR@10 before it ends.
        device: `cpu` or `gpu`.
        steps: of an epoch, of training and of validation; None: all.
    """
    best = ModelCheckpoint(folder, "best", monitor="hit_rate", mode="max", save_last=True)
    return Resuming(
        accelerator=device,
        devices=1,
        max_epochs=epochs,
        limit_train_batches=steps,
        limit_val_batches=steps,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[HitRate(), best, EarlyStopping("hit_rate", mode="max", patience=patience)],
    )


def interactions(events: Any) -> pd.DataFrame:
    """Training events and validation rows as RecTools takes them, in the log's order.

    RecTools sorts by time, stably, and then by user: in each user's events the log's order is kept.
    """
    return pd.DataFrame(
        {
            Columns.User: events["user"],
            Columns.Item: events["item"],
            Columns.Datetime: pd.to_datetime(events["second"], unit="s"),
            Columns.Weight: 1.0,
        }
    )


def build(job: dict[str, Any], folder: Path, validated: list[int]) -> Any:
    """The model of a job.

    Args:
        job: what `bench/next_item.py` asks for.
        folder: where checkpoints are kept.
        validated: users of the validation rows.
    """
    settings = dict(job["settings"])
    if job["model"] == "esasrec":
        settings |= {"transformer_layers_type": LiGRLayers, "use_key_padding_mask": True}
    if job["catalog_products"]:
        settings["similarity_module_type"] = CatalogProducts
    training = {name: job[name] for name in ("epochs", "patience", "device", "steps")}
    return MODELS[job["model"].partition("-")[0]](
        **settings,
        item_net_block_types=(IdEmbeddingsItemNet,),
        get_val_mask_func=leave_one_out_mask,
        get_val_mask_func_kwargs={"val_users": validated},
        get_trainer_func=make_trainer,
        get_trainer_func_kwargs={"folder": str(folder / "checkpoints"), **training},
        deterministic=False,
        recommend_torch_device="cuda" if job["device"] == "gpu" else "cpu",
    )


def lists(model: Any, dataset: Dataset, events: Any) -> np.ndarray:
    """What the test rows' users are recommended, int32 `[R, 500]`: best first, 0 behind the last one."""
    users = events["test_user"]
    context = None
    if model.require_recommend_context:
        seconds = pd.to_datetime(events["test_second"], unit="s")
        context = get_context(pd.DataFrame({Columns.User: users, Columns.Datetime: seconds}))
    recommended = model.recommend(
        users, dataset, LISTED, filter_viewed=True, on_unsupported_targets="ignore", context=context
    )
    items = np.zeros((len(users), LISTED), np.int32)
    place = np.argsort(users)
    row = place[np.searchsorted(users, recommended[Columns.User].to_numpy(), sorter=place)]
    items[row, recommended[Columns.Rank].to_numpy() - 1] = recommended[Columns.Item].to_numpy()
    return items


def main(folder: Path) -> None:
    """Train, recommend, and write both down."""
    warnings.simplefilter("ignore")
    job = json.loads((folder / "job.json").read_text())
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    seed_everything(job["seed"], workers=True, verbose=False)
    events = np.load(folder.parent.parent / "events.npz")
    table = interactions(events)
    validated = np.unique(events["user"][events["held"]]).tolist()
    held = leave_one_out_mask(table, validated)
    if not np.array_equal(held, events["held"]):
        raise SystemExit("error: RecTools would validate on other rows than the log's; wanted split last")
    dataset = Dataset.construct(table)
    model = build(job, folder, validated)
    began = time.perf_counter()
    model.fit(dataset)
    seconds = time.perf_counter() - began
    model.load_weights_from_checkpoint(model.fit_trainer.checkpoint_callback.best_model_path)
    began = time.perf_counter()
    items = lists(model, dataset, events)
    recommending = time.perf_counter() - began
    rates = next(
        callback for callback in model.fit_trainer.callbacks if isinstance(callback, HitRate)
    ).by_epoch
    figures = {
        "valid_hr@10_by_epoch": [round(rate, 4) for rate in rates],
        "best_epoch": int(np.argmax(rates)) + 1,
        "seconds_of_training": round(seconds, 1),
        "milliseconds": 1000 * recommending / len(items),
        "items_known": len(model.data_preparator.get_known_item_ids()),
        "users_without_a_list": int((items[:, 0] == 0).sum()),
        "parameters": sum(weight.numel() for weight in model.torch_model.parameters()),
        "versions": {
            name: version(name) for name in ("rectools", "pytorch-lightning", "torch", "numpy", "pandas")
        },
    }
    np.savez_compressed(folder / "lists.npz", items=items)
    (folder / "fit.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
