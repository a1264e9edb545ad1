"""RecTools' `recommend`: `rectools_recommend als|sasrec FOLDER THREADS K`, in RecTools' environment.

`als` searches given vectors of users and items. `sasrec` reads the users' histories first: as many blocks and
dimensions as a retriever has, weights as they are drawn, since time does not depend on them.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from implicit.cpu.als import AlternatingLeastSquares
from pytorch_lightning import Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import ImplicitALSWrapperModel, SASRecModel
from rectools.models.nn.item_net import IdEmbeddingsItemNet

from bench.clock import fastest

LENGTH = 200
"""Events of a history that SASRec reads."""


def read(folder: Path) -> tuple[Dataset, np.ndarray, int]:
    """The events as RecTools knows them, the users' ids in it, and how many others stand before them.

    RecTools recommends only items that somebody has met: others, of `LENGTH` events each, meet all, in order.
    """
    n_items = len(np.load(folder / "items.npy", mmap_mode="r"))
    seen = np.load(folder / "seen_items.npy")
    ends = np.load(folder / "seen_ends.npy")
    others = -(-n_items // LENGTH)
    own = others + np.arange(len(ends) - 1)
    users = np.concatenate([np.arange(n_items) // LENGTH, np.repeat(own, np.diff(ends))])
    items = np.concatenate([np.arange(n_items), seen])
    seconds = pd.to_datetime(np.arange(len(items)), unit="s")
    table = {Columns.User: users, Columns.Item: items, Columns.Datetime: seconds, Columns.Weight: 1.0}
    return Dataset.construct(pd.DataFrame(table)), own, others


def als(folder: Path, others: int, threads: int) -> Any:
    """Its wrapper of ALS, with the given vectors in the place of fitted ones."""
    users = np.load(folder / "users.npy")
    model = ImplicitALSWrapperModel(AlternatingLeastSquares(factors=users.shape[1], num_threads=threads))
    model.model = model._model
    model.model.user_factors = np.concatenate([np.zeros((others, users.shape[1]), np.float32), users])
    model.model.item_factors = np.load(folder / "items.npy")
    model.is_fitted = True
    return model


def no_training() -> Trainer:
    """A trainer that ends before the first step."""
    return Trainer(max_epochs=0, accelerator="cpu", logger=False, enable_checkpointing=False)


def sasrec(folder: Path, dataset: Dataset) -> Any:
    """SASRec as it is drawn."""
    width = np.load(folder / "users.npy", mmap_mode="r").shape[1]
    model = SASRecModel(
        n_blocks=2,
        n_heads=1,
        n_factors=width,
        session_max_len=LENGTH,
        loss="sampled_softmax",
        n_negatives=256,
        item_net_block_types=(IdEmbeddingsItemNet,),
        get_trainer_func=no_training,
        recommend_torch_device="cpu",
    )
    return model.fit(dataset)


def main(name: str, folder: Path, threads: int, k: int) -> None:
    """Print the users a second as JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    dataset, users, others = read(folder)
    model = als(folder, others, threads) if name == "als" else sasrec(folder, dataset)

    def recommend() -> pd.DataFrame:
        return model.recommend(users, dataset, k, filter_viewed=True)

    figures = fastest(recommend, len(users))
    lists = recommend()[Columns.Item].to_numpy().reshape(len(users), k)
    np.save(folder / f"lists_rectools_{name}.npy", lists)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
