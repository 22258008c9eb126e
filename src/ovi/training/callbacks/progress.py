"""The progress bar of a run counted in steps."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


class StepProgress(RichProgressBar):
    """Lightning's rich bar, told that training is counted in steps: epochs have no end here.

    Args:
        refresh_rate: batches between two updates.
    """

    def __init__(self, *, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=False)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The metrics beside the bar, without the logger's version."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch}, step {self.trainer.global_step} of {self.trainer.max_steps}"
