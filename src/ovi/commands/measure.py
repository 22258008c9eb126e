"""Picture against sound in a folder of mp4 files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovi.data.media import probe, read_clip
from ovi.metrics.av_offset import AVOffset
from ovi.metrics.impacts import MeanImpactOffset


def measure(files: Sequence[Path], *, fps: float, num_frames: int, height: int, width: int) -> dict[str, float]:
    """Figures by tag: mean |offset| of impacts and onsets, and the weight-free estimate, each with its coverage.

    Args:
        files: mp4s.
        fps, num_frames, height, width: how they are read.
    """
    metrics: list[Any] | None = None
    for file in files:
        rate = probe(file).sample_rate
        clip = read_clip(file, fps=fps, num_frames=num_frames, height=height, width=width, sample_rate=rate)
        if metrics is None:
            metrics = [kind(fps=fps, sample_rate=rate) for kind in (MeanImpactOffset, AVOffset)]
        for metric in metrics:
            metric.update(clip.frames, clip.waveform)
    return {tag: float(value) for metric in metrics or [] for tag, value in metric.compute().items()}
