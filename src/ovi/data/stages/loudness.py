"""Sound that is too quiet, or silent for too long."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ovi.data.media import Clip
from ovi.data.stages.base import STAGES, ClipFilter, Limit
from ovi.errors import OviError

FLOOR_DB = -120.0
"""Digital silence has no level; this is written in its place."""


@STAGES.register("loudness")
class Loudness(ClipFilter):
    """Keeps clips whose mean level is high enough, -60 dB as in the paper.

    The level is that of FFmpeg's ``volumedetect`` (``mean_volume``): the root of the mean square of all samples in
    decibels of full scale, so that a full-scale square wave has 0 dB and a sine -3.01; here of the sound as it is read,
    mono. Figures: ``loudness_db``, and ``peak_db`` of the largest sample.

    Args:
        min_db: lowest mean level, in dB of full scale; None is no limit.
        max_peak_db: highest peak, in dB of full scale, against clipping; None is no limit.
    """

    name = "loudness"
    needs = frozenset({"audio"})

    def __init__(self, *, min_db: float | None = -60.0, max_peak_db: float | None = None) -> None:
        self.limits = (
            Limit("loudness_db", "quiet", "loudness.min_db", low=min_db),
            Limit("peak_db", "clipping", "loudness.max_peak_db", high=max_peak_db),
        )

    def measure(self, clip: Clip) -> Mapping[str, float]:
        wave = np.asarray(clip.waveform, np.float64)
        return {"loudness_db": level_db(wave), "peak_db": _db(float(np.abs(wave).max(initial=0.0)))}


@STAGES.register("silence")
class Silence(ClipFilter):
    """Keeps clips that are silent for no more than a share of their time.

    Figures: ``silent_share``, of windows whose level lies below a threshold, and ``silent_s``, the longest run of them.

    Args:
        max_share: of silent windows, 0..1; None is no limit.
        max_s: longest silence, in seconds; None is no limit.
        below_db: a window is silent below this level, in dB of full scale as of ``loudness``.
        window_s: length of a window, in seconds.
    """

    name = "silence"
    needs = frozenset({"audio"})

    def __init__(
        self,
        *,
        max_share: float | None = 0.9,
        max_s: float | None = None,
        below_db: float = -60.0,
        window_s: float = 0.1,
    ) -> None:
        if not window_s > 0:
            raise OviError(f"silence.window_s must be positive, got {window_s!r}")
        self.below_db, self.window_s = below_db, window_s
        self.limits = (
            Limit("silent_share", "silent", "silence.max_share", high=max_share),
            Limit("silent_s", "silent", "silence.max_s", high=max_s),
        )

    def measure(self, clip: Clip) -> Mapping[str, float]:
        size = max(1, round(self.window_s * clip.sample_rate))
        wave = np.asarray(clip.waveform, np.float64)
        pieces = np.split(wave, range(size, len(wave), size))
        silent = np.array([level_db(piece) < self.below_db for piece in pieces])
        return {"silent_share": float(silent.mean()), "silent_s": longest_run(silent) * size / clip.sample_rate}


def level_db(waveform: np.ndarray) -> float:
    """Root of the mean square in dB of full scale; no less than ``FLOOR_DB``."""
    return _db(math.sqrt(float(np.mean(np.square(waveform))))) if len(waveform) else FLOOR_DB


def longest_run(flags: np.ndarray) -> int:
    """Length of the longest run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(flags, np.int8), [0]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def _db(amplitude: float) -> float:
    return max(FLOOR_DB, 20.0 * math.log10(amplitude)) if amplitude > 0 else FLOOR_DB
