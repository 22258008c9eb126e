"""How far sound and picture of one clip lie apart, and how sure that is: for filtering data."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

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


@SYNC_ESTIMATORS.register("syncnet")
class SyncNetOffset:
    """Lips against speech by SyncNet's published weights, for crops of one face; in steps of 40 ms, up to 600 ms.

    Chung and Zisserman, Out of time (ACCV-W 2016); see ``ovi.metrics.syncnet.lip_sync``. Its confidence is a distance
    of embeddings (LSE-C): the stage ``sync`` needs a ``min_confidence`` in that unit, and should reject the unsure.
    The network stays on the CPU.

    Args:
        path: the file ``syncnet_v2.model``, or its folder; no other file is taken.
        faces_fill_frame: must be true: clips are crops of one face, as its tracker makes them.

    Raises:
        OviError: when the weights are missing or other ones, or clips are not said to be faces.
    """

    def __init__(self, *, path: str | None = None, faces_fill_frame: bool = False) -> None:
        from ovi.metrics.syncnet import lip_sync

        self.path, self.faces_fill_frame = path, faces_fill_frame
        self.network = lip_sync.LipSyncError(
            lip_sync.FPS, lip_sync.SAMPLE_RATE, path=path, faces_fill_frame=faces_fill_frame
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Its knobs alone: another process reads the weights itself."""
        return partial(type(self), path=self.path, faces_fill_frame=self.faces_fill_frame), ()

    def __call__(self, frames: np.ndarray, waveform: np.ndarray, fps: float, sample_rate: int) -> tuple[float, float]:
        """(offset in ms, positive when the sound is late; confidence), or (NaN, 0) for a silent or too short clip."""
        from ovi.metrics.frame_rate import frames_at
        from ovi.metrics.sound import is_silent, resampled
        from ovi.metrics.syncnet.lip_sync import FPS, SAMPLE_RATE, lip_sync

        if is_silent(waveform):
            return math.nan, 0.0
        pictures, sound = frames_at(frames, fps, FPS), resampled(waveform, sample_rate, SAMPLE_RATE)
        embedded = self.network.embeddings(pictures, sound)
        if embedded is None:
            return math.nan, 0.0
        found = lip_sync(*embedded)
        return found.shift_frames * 1000 / FPS, found.confidence
