"""Measures generated clips with any metric that looks at frames and sound."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import lightning as L
from torchmetrics import Metric

from ovi.training.callbacks.generation import ValidationClip


class ClipMetrics:
    """Consumer that logs metrics of generated clips, and once the same of the real ones under ``val_real/``.

    Args:
        metrics: by name, builds a metric from (fps=, sample_rate=); it is updated with (frames [T, H, W, 3],
            waveform [N]) and computes figures by tag, logged as ``val/<tag>``. None switches one off.
    """

    def __init__(self, *, metrics: Mapping[str, Callable[..., Metric] | None]) -> None:
        self.factories = [factory for factory in metrics.values() if factory is not None]
        self._metrics: dict[str, list[Metric]] = {}

    def consume(self, clip: ValidationClip, trainer: L.Trainer) -> None:
        stage = "val_real" if clip.real else "val"
        rates = {"fps": clip.clip.fps, "sample_rate": clip.clip.sample_rate}
        if stage not in self._metrics:
            self._metrics[stage] = [factory(**rates) for factory in self.factories]
        for metric in self._metrics[stage]:
            metric.update(clip.clip.frames, clip.clip.waveform)

    def report(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for stage, metrics in self._metrics.items():
            for metric in metrics:
                for tag, value in metric.compute().items():
                    # Reduced over ranks by the metric already.
                    module.log(f"{stage}/{tag}", value.float(), rank_zero_only=True)
        self._metrics = {}
