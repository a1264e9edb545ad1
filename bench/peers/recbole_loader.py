"""RecBole's loader on the log of `bench/loader.py`: `python -m bench.peers.recbole_loader FOLDER`."""

from __future__ import annotations

import itertools
import json
import logging
import sys
from pathlib import Path

import torch


def main(folder: Path) -> None:
    """Let RecBole build its histories, read them with its loader for DIN, and print the rates as JSON."""
    sys.argv = sys.argv[:1]  # RecBole reads the command line itself
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import init_seed

    from bench.clock import rate
    from bench.peers.recbole_settings import common

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    about = json.loads((folder / "about.json").read_text())
    settings = common(folder, about)
    config = Config(model="DIN", dataset="atomic", config_dict=settings)
    init_seed(0, True)
    loader = data_preparation(config, create_dataset(config))[0]
    batch = next(iter(loader)).interaction
    shapes = {name: list(value.shape) for name, value in batch.items()}
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    print(json.dumps(rate(batches, about["batch_size"]) | {"batch": shapes, "rows": len(loader.dataset)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
