"""Checkpoints of a run: every so many steps, and when it ends."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoints(ModelCheckpoint):
    """Lightning's, which by itself leaves out the steps after the last whole interval.

    The last is saved before weight averaging puts the averaged weights in the place of those that training goes on
    with; arguments are Lightning's.
    """

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        # Not ``fit_loop.done``, which counts the epoch as completed before it is.
        ends = (
            trainer.should_stop
            or 0 < trainer.max_steps <= trainer.global_step
            or 0 < (trainer.max_epochs or -1) <= trainer.current_epoch + 1
        )
        if (
            ends
            and self._last_global_step_saved != trainer.global_step
            and not self._should_skip_saving_checkpoint(trainer)
        ):
            monitored = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, monitored)
            self._save_last_checkpoint(trainer, monitored)
