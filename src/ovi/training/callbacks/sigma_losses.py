"""Logs the validation loss of each modality by noise level."""

from __future__ import annotations

from typing import Any

import lightning as L

from ovi.errors import OviError
from ovi.metrics.sigma_loss import SigmaLoss

MODALITIES = ("video", "audio")


class SigmaLosses(L.Callback):
    """Splits the validation losses by noise level, in every round.

    Logs ``val_sigma/video_0.2-0.4`` and ``val_sigma/audio_0.2-0.4``, means over the samples of all processes, and how
    many those are as ``val_sigma_n/0.2-0.4``. Noise levels are those that validation draws, the same in every round of
    a run; a range that none falls in is not logged. With few validation samples that may be the outer ones.

    Args:
        num_buckets: ranges of sigma.

    Raises:
        OviError: for less than one.
    """

    def __init__(self, *, num_buckets: int = 5) -> None:
        if num_buckets < 1:
            raise OviError(f"callbacks.sigma_losses.num_buckets must be at least 1, got {num_buckets}")
        # Here and not in the module: no part of its state, its checkpoints or its averaged copy.
        self.losses = {name: SigmaLoss(num_buckets) for name in MODALITIES}

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for metric in self.losses.values():
            metric.to(pl_module.device)
            metric.reset()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        levels = outputs["levels"]
        weights = levels.video_weight, levels.audio_weight
        for name, sigma, weight, errors in zip(MODALITIES, (levels.video, levels.audio), weights, outputs["errors"]):
            counts = weight > 0  # a modality that the batch does not have says nothing
            self.losses[name].update(sigma[counts], errors[counts.to(errors.device)])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        figures: dict[str, float] = {}
        for name, metric in self.losses.items():
            means, counts = (values.reshape(-1).tolist() for values in metric.compute())  # over all processes
            for (low, high), mean, count in zip(metric.edges, means, counts):
                if count:
                    figures[f"val_sigma/{name}_{low:.2g}-{high:.2g}"] = mean
                    figures[f"val_sigma_n/{name}_{low:.2g}-{high:.2g}"] = count
        pl_module.log_dict(figures)
