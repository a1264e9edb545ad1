"""RecBole's training on the log of `bench/stage1.py`: `recbole_train MODEL FOLDER THREADS [--whole]`."""

from __future__ import annotations

import itertools
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

SECONDS = 6.0


def main(name: str, folder: Path, threads: int, whole: bool) -> None:
    """Print the rates of its training steps as JSON; `whole`: the AUC after one pass instead."""
    sys.argv = sys.argv[:1]  # RecBole reads the command line itself
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    from bench.clock import rate
    from bench.peers.recbole_settings import common

    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    about = json.loads((folder / "about.json").read_text())
    settings = common(folder, about, group_by="none" if name == "DIN" else None) | {
        "eval_batch_size": about["batch_size"],
        "mlp_hidden_size": [128, 64],
    }
    config = Config(model=name, dataset="atomic", config_dict=settings)
    init_seed(0, True)
    torch.use_deterministic_algorithms(False)
    train, valid, _ = data_preparation(config, create_dataset(config))
    model = get_model(config["model"])(config, train._dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    model.train()

    def step(batch: Any) -> float:
        trainer.optimizer.zero_grad()
        loss = model.calculate_loss(batch)
        loss.backward()
        trainer.optimizer.step()
        return float(loss.item())

    if not whole:
        batches = itertools.chain.from_iterable(itertools.repeat(train))
        print(json.dumps(rate((step(batch) for batch in batches), about["batch_size"], SECONDS)))
        return
    for batch in train:
        step(batch)
    scores = trainer.evaluate(valid, load_best_model=False, show_progress=False)
    print(json.dumps({"auc": float({key.lower(): value for key, value in scores.items()}["auc"])}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), "--whole" in sys.argv)
