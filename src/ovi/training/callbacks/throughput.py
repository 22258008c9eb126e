"""How fast training goes."""

from __future__ import annotations

import time
from typing import Any

import lightning as L

from ovi.data.batch import LatentBatch


class Throughput(L.Callback):
    """Logs samples and tokens per second, and the shares of time spent waiting for data and in validation.

    Validation counts from the start of training, with whatever it generates and measures (``train/validation_share``).

    Args:
        every_n_steps: steps averaged into one figure.
    """

    def __init__(self, *, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._began = self._validation_began = time.perf_counter()
        self._validated = 0.0
        self._reset()

    def _reset(self) -> None:
        self._started = time.perf_counter()
        self._ended: float | None = None
        self._waited, self._samples, self._values, self._steps = 0.0, 0, 0, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The sanity check lies before this.
        self._began, self._validated = time.perf_counter(), 0.0
        self._reset()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_began = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = time.perf_counter()
        self._validated += now - self._validation_began
        if trainer.is_global_zero and not trainer.sanity_checking:
            # Not by the module: Lightning takes no figures at this point, and the last round would never be told.
            share = {"train/validation_share": self._validated / (now - self._began)}
            for logger in trainer.loggers:
                logger.log_metrics(share, step=trainer.global_step)
        self._reset()  # validation is no part of training's speed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._ended is not None:
            self._waited += time.perf_counter() - self._ended

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: LatentBatch, batch_idx: int
    ) -> None:
        self._steps += 1
        self._samples += len(batch) * trainer.world_size
        self._values += (batch.video[:, 0].numel() + batch.audio[..., 0].numel()) * trainer.world_size
        self._ended = now = time.perf_counter()
        if self._steps < self.every_n_steps:
            return
        elapsed = now - self._started
        values = {
            "train/samples_per_s": self._samples / elapsed,
            "train/latent_positions_per_s": self._values / elapsed,
            "train/data_wait_share": self._waited / elapsed,
        }
        pl_module.log_dict(values, rank_zero_only=True)
        self._reset()
        self._ended = now
