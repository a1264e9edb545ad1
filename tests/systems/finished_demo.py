"""Finished stages of the demo, a system of every kind among them, made without any training.

Weights are drawn and not learned: who asks the systems learns nothing of films, but everything of the way.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recllm import paths
from recllm.config.request import parse
from recllm.config.schema import Config
from recllm.config.stages import FitConfig
from recllm.crm import build, export
from recllm.crm.inputs import table_sizes
from recllm.eventlog.all_data import write_all_data
from recllm.eventlog.ids import FIRST_ID
from recllm.eventlog.log import EventLog
from recllm.lm.adapters import add_adapter, load_adapter, save_adapter
from recllm.lm.encoder import add_mask_token, build_encoder
from recllm.lm.towers import TwoTowers
from recllm.pipeline.finished import Finished
from recllm.pipeline.graph import Plan
from recllm.pipeline.manifest import Manifest, describe_outputs
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Group, Role, StageFile
from recllm.reclora import AdapterCard
from recllm.retrieval.neighbors import Neighbors

EVERYTHING = (
    "stage3",
    "CRM=din sim",
    "SYSTEM=lora reclora ctr-bert sft-continued s-dpo-k7 s-dpo-pointwise",
)
SWEEP = ("evaluate", "CRM=sim", "SYSTEM=lora reclora", "KEY=stage2.adapter.num_meta", "VALUES=2")
CRMS_ALONE = ("evaluate", "CRM=din sim", "SYSTEM=none")
MEASURED = {
    "ctr_rows": "uniform60",
    "aligned_rows": "uniform40",
    "blend_rows": "uniform50",
    "ranking_rows": 12,
    "generate_rows": 3,
    "bootstrap": 20,
    "batch_size": 32,
}
"""Few rows of everything."""
SELECTED = {"steps": 4, "step": 2.0, "ranking": {"step": 4.0}}
"""What a stage 2 says of its training: Yes was best at half of it, titles at its end."""


class FinishedDemo:
    """Finished stages of a command, and an evaluation of them that may be begun.

    Args:
        root: `artifacts/demo`, which is filled.
        log: the event log.
        config: the demo's configuration.
        lm: `model` and `tokenizer` of the tiny LM.
        words: the command's.
    """

    def __init__(
        self, root: Path, log: EventLog, config: Config, lm: Any, words: Sequence[str] = EVERYTHING
    ) -> None:
        self.root = root
        self.log = log
        self.config = config
        self.lm = lm
        plan = Plan(parse(words))
        make: dict[str, Callable[[StageFile, Path], dict[str, Any]]] = {
            "log": self._log,
            "log-all": self._all_data,
            "lm-prompts": self._lm,
            "neighbors": self._neighbors,
            "stage1": self._crm,
            "stage2": self._tuned,
            "towers": self._towers,
            "stage3": self._aligned,
        }
        for number, node in enumerate(plan.needed()):
            file = self._small(node.file)
            folder = root / node.folder
            folder.mkdir(parents=True, exist_ok=True)
            (folder / paths.CONFIG).write_text(file.text())
            if file.table.goal == "evaluate":
                self.evaluation = folder
                continue
            torch.manual_seed(number)
            metrics = make.get(file.stage, self._nothing)(file, folder)
            self.finish(folder, metrics)

    def finish(self, folder: Path, metrics: dict[str, Any]) -> None:
        """Write the manifest of what lies in a folder."""
        file = StageFile.read(folder)
        outputs = [path for path in folder.iterdir() if path.name not in (paths.CONFIG, paths.MANIFEST)]
        Manifest(
            stage=file.stage,
            dataset="demo",
            choice=file.choice,
            parents={name: Finished.open(self.root / name).identity for name in file.folders()},
            config_sha256=file.sha256,
            outputs=describe_outputs(folder, outputs),
            metrics=metrics,
            seed=0,
            started="2024-01-01T00:00:00+00:00",
            finished="2024-01-01T00:00:01+00:00",
            seconds=1.5,
            commit="abc",
            hardware="",
        ).write(folder)

    def run(self, **measured: Any) -> Run:
        """The evaluation at work, with other values of keys of `evaluate`; it takes no lock."""
        file = StageFile.read(self.evaluation)
        config = {**file.config, "evaluate": {**file.config["evaluate"], **measured}}
        file = dataclasses.replace(file, config=config)
        opened = {name: Finished.open(self.root / name) for name in file.folders()}
        return Run(
            folder=self.evaluation,
            file=file,
            config=file.sections(["trainer.accelerator=cpu"]),
            parents={Role(role): opened[name] for role, name in file.parents.items()},
            systems={
                Group(group): {name: opened[folder] for name, folder in systems.items()}
                for group, systems in file.systems.items()
            },
            raw=None,
        )

    def _small(self, file: StageFile) -> StageFile:
        """The plan's file, where the evaluation measures few rows and a gate is averaged over few."""
        config = dict(file.config)
        if file.stage == "evaluate":
            lists = config["evaluate"]["candidates"]  # of a sweep there are none
            config["evaluate"] = {**config["evaluate"], **MEASURED, "candidates": lists}
        if file.stage == "stage2":
            fit = dataclasses.asdict(FitConfig()) | {"valid_rows": "uniform30"}
            config["stage2"] = {**config["stage2"], "fit": fit}
        return dataclasses.replace(file, config=config)

    def _nothing(self, file: StageFile, folder: Path) -> dict[str, Any]:
        """What no system of an evaluation reads."""
        (folder / "out").write_text(file.folder)
        return {"name": "tiny", "ratings_as_text": 700} if file.stage == "encoder" else {}

    def _log(self, file: StageFile, folder: Path) -> dict[str, Any]:
        shutil.copytree(self.log.folder, folder, dirs_exist_ok=True)
        return {"samples": 4000, "notes": []}

    def _all_data(self, file: StageFile, folder: Path) -> dict[str, Any]:
        return write_all_data(self.log, folder, file.sections().prepare)

    def _lm(self, file: StageFile, folder: Path) -> dict[str, Any]:
        self.lm.model.save_pretrained(folder / paths.EXPORT)
        self.lm.tokenizer.save_pretrained(folder / paths.EXPORT)
        return {"answers_as_text": 500, "ratings_as_text": 600}

    def _neighbors(self, file: StageFile, folder: Path) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        vectors = rng.normal(size=(2, self.log.n_items, 8)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        fold = rng.integers(0, 2, self.log.n_users)
        stored = Neighbors(self.log, vectors, fold).search(np.arange(len(self.log.user)), k=30)
        np.save(folder / paths.VECTORS, vectors)
        np.save(folder / paths.FOLDS, fold)
        np.save(folder / paths.NEIGHBORS, stored.astype(np.int32))
        return {"k": 30}

    def _crm(self, file: StageFile, folder: Path) -> dict[str, Any]:
        config = file.sections().stage1
        model = build(table_sizes(self.log), config.crm)
        if config.crm.text_dim:
            texts = torch.randn(self.log.n_items, config.crm.text_dim)
            texts[:FIRST_ID] = 0.0
            model.set_texts(texts, torch.from_numpy(self.log.item_count > 0))
        export(model, folder / paths.EXPORT, {"inputs": config.inputs})
        return {"valid/auc": 0.5}

    def _tuned(self, file: StageFile, folder: Path) -> dict[str, Any]:
        config = file.sections().stage2.adapter
        crm = StageFile.read(self.root / file.parents[Role.CRM]).sections().stage1.crm
        representation = torch.randn(50, crm.mlp[-1]) if config.representation_kind else None
        for seed, name in enumerate((paths.ADAPTER, paths.RANKING_ADAPTER)):
            model = add_adapter(self.lm.model, config, representation, seed)
            self._save(model, folder / name)
        return {"rows": 300, "trainable": 1000, "tokens": 20_000, **SELECTED}

    def _aligned(self, file: StageFile, folder: Path) -> dict[str, Any]:
        start = self.root / file.parents[Role.START] / paths.RANKING_ADAPTER
        self._save(load_adapter(self.lm.model, start, trainable=True), folder / paths.ADAPTER)
        return {"rows": 200, **SELECTED}

    def _save(self, model: Any, folder: Path) -> None:
        """Move the adapter's weights somewhere, write it, and take it off the LM."""
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value += 0.05 * torch.randn_like(value)
        save_adapter(model, folder, AdapterCard(base="tiny", data="", metrics={}, license="", title=""))
        model.unload().requires_grad_(False)

    def _towers(self, file: StageFile, folder: Path) -> dict[str, Any]:
        config = file.sections()
        tokenizer = add_mask_token(self._tokenizer(), 128)
        sizes = dataclasses.replace(
            self.config.lm.tiny, hidden=16, layers=1, heads=2, intermediate=32, context=128
        )
        TwoTowers(build_encoder(sizes, tokenizer).base_model, config.towers).save(
            folder / paths.EXPORT, tokenizer, 128
        )
        return {"encoder": "tiny", "ratings_as_text": 700, "answers_as_text": 0, "rows": 300}

    def _tokenizer(self) -> Any:
        """The tiny LM's tokenizer, once more: a mask is added to it."""
        from transformers import AutoTokenizer

        lm = next((self.root / "lm").glob("*/prompts"))
        return AutoTokenizer.from_pretrained(lm / paths.EXPORT)
