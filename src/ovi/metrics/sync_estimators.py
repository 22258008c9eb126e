"""How far sound and picture of one clip lie apart, and how sure that is: for filtering data."""

from __future__ import annotations

import numpy as np

from ovi.metrics.av_offset import av_offset
from ovi.registry import Registry

SYNC_ESTIMATORS = Registry(
    "sync_estimator", group="sync_estimator", doc="offset of sound against picture of one clip, for filtering data"
)


@SYNC_ESTIMATORS.register("xcorr")
class CrossCorrelation:
    """Changes of motion against rises of the sound, without weights; sure of few clips (see ``av_offset``).

    Args:
        max_lag_s: lags up to this are tried, in seconds.
    """

    def __init__(self, *, max_lag_s: float = 1.0) -> None:
        self.max_lag_s = max_lag_s

    def __call__(self, frames: np.ndarray, waveform: np.ndarray, fps: float, sample_rate: int) -> tuple[float, float]:
        """(offset in ms, positive when the sound is late, or NaN; confidence)."""
        found = av_offset(frames, waveform, fps=fps, sample_rate=sample_rate, max_lag_s=self.max_lag_s)
        return found.offset_ms, found.confidence
