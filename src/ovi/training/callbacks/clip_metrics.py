"""Measures generated clips with any metric that looks at frames and sound."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
from torchmetrics import Metric

from ovi.training.callbacks.generation import ValidationClip


class ClipMetrics:
    """Consumer that logs metrics of generated clips, and once the same of the real ones under ``val_real/``.

    Args:
        metrics: by tag; each is updated with (frames [T, H, W, 3], waveform [N], fps=, sample_rate=) and computes a
            dictionary of figures, logged as ``val/<tag>_<figure>``.
    """

    def __init__(self, *, metrics: Mapping[str, Metric]) -> None:
        self.generated = dict(metrics)
        self.real = {tag: metric.clone() for tag, metric in metrics.items()}

    def consume(self, clip: ValidationClip, trainer: L.Trainer) -> None:
        for metric in (self.real if clip.real else self.generated).values():
            metric.update(clip.clip.frames, clip.clip.waveform, fps=clip.clip.fps, sample_rate=clip.clip.sample_rate)

    def report(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for stage, metrics in (("val", self.generated), ("val_real", self.real)):
            for tag, metric in metrics.items():
                if not metric.update_called:
                    continue
                for figure, value in metric.compute().items():
                    # torchmetrics has reduced over ranks already.
                    module.log(f"{stage}/{tag}_{figure}", value.float(), rank_zero_only=True)
                metric.reset()
