"""Processes of a stage: where several machines meet, and who is asked to begin."""

import pytest
import torch
from lightning import fabric

from recllm.config.trainer import TrainerConfig
from recllm.errors import ConfigError, StageError
from recllm.training.launch import start_processes


def test_machines_that_do_not_know_where_they_meet_are_refused(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(StageError, match=r"^trainer\.num_nodes=2 without MASTER_ADDR and MASTER_PORT[^\n]*$"):
        start_processes(TrainerConfig(accelerator="cpu", num_nodes=2))


@pytest.mark.parametrize(
    "config", [TrainerConfig(accelerator="cpu"), TrainerConfig(devices=2, strategy="ddp_spawn")]
)
def test_one_process_and_those_started_otherwise_are_left_alone(monkeypatch, config):
    monkeypatch.setattr(fabric, "Fabric", lambda **_: pytest.fail("started"))
    start_processes(config)
    assert not torch.distributed.is_initialized()


def test_machines_are_counted_with_their_devices():
    assert TrainerConfig(devices=4, num_nodes=2).processes == 8
    with pytest.raises(ConfigError, match=r"trainer\.num_nodes=0 is not usable; wanted at least 1 machine"):
        TrainerConfig(num_nodes=0)
