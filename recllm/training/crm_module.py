"""What trainings of CRMs share, whatever they learn from: the optimizer, and clipping by rows."""

from __future__ import annotations

from typing import Any

import lightning

from recllm.config.stages import Stage1Config
from recllm.crm.layers import Model
from recllm.training.optimizer import clip_norm, optimizer


class CrmTraining(lightning.LightningModule):
    """Trains a CRM; the stage says by which loss.

    Args:
        model: what trains.
        config: of stage 1.
        steps: training steps.
        newest_steps: of them so many at the end, over the newest rows alone (`stage1.newest`).
    """

    def __init__(self, model: Model, config: Stage1Config, steps: int, newest_steps: int = 0) -> None:
        """Keeps them."""
        super().__init__()
        self.model = model
        self.config = config
        self.steps = steps
        self.newest_steps = newest_steps

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip dense and row-sparse gradients together; Lightning's own clipping knows only dense ones."""
        if self.config.sparse_tables and gradient_clip_val:
            clip_norm(self.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and linear decay."""
        newest_lr = self.config.newest.lr
        return optimizer(self, self.config.fit, self.steps, self.newest_steps, newest_lr)
