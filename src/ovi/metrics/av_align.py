"""AV-Align: how many peaks of motion and of sound coincide (Yariv et al., arXiv 2309.16429, section 4.1).

After the published measure, with two parts of our own, so that figures are not to be mixed with those of its authors:
motion is Lucas and Kanade's flow on pictures averaged down to 64 pixels, where theirs is Farneback's, and a peak counts
in one hit only, where theirs counts every onset near one peak of motion and can exceed 1.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from scipy.ndimage import maximum_filter1d, uniform_filter1d
from torch import Tensor

from ovi.errors import OviError
from ovi.metrics.av_offset import RATE_HZ, sound_rises
from ovi.metrics.clip_metric import METRICS, ClipMetric, MeasuredClip
from ovi.metrics.optical_flow import dense_flow, grey

_BEFORE_S, _AROUND_S, _WAIT_S, _ABOVE_MEAN = 0.03, 0.1, 0.03, 0.07
"""An onset is the highest of this time before it, this far (of the highest of all) above the mean around it, and this
long after the one before: librosa's defaults, after Boeck et al., DAFx 2012."""
_LEAST_RISE = 0.05
"""Mean rise of log(1 + 100 |STFT|) from which on a sound has onsets at all: a hiss at -80 dB stays below it."""


def av_align(
    frames: np.ndarray, waveform: np.ndarray, *, fps: float, sample_rate: int, least_motion: float = 4e-4
) -> float:
    """Intersection over union of the peaks of motion and the onsets of the sound.

    Args:
        frames: uint8 [T, H, W, 3]; frame n is the instant (n + 0.5) / fps.
        waveform: [N], mono; sample n is the instant n / sample_rate.
        fps: frames per second.
        sample_rate: in Hz.
        least_motion: as for ``motion_peaks``.

    Returns:
        0..1; NaN where the picture has no peak or the sound no onset.

    Raises:
        OviError: for arrays of another shape.
    """
    seen = motion_peaks(frames, fps, least_motion=least_motion)
    return peak_overlap(seen, sound_onsets(waveform, sample_rate), 1.0 / fps)


def peak_overlap(seen_s: np.ndarray, heard_s: np.ndarray, within_s: float) -> float:
    """Hits over all peaks, each hit a pair of peaks that counts once: H / (V + A - H).

    Args:
        seen_s: [V], times of peaks of motion, ascending.
        heard_s: [A], times of onsets, ascending.
        within_s: peaks no further apart than this hit.

    Returns:
        0..1; NaN where either has none.
    """
    if not len(seen_s) or not len(heard_s):
        return math.nan
    hits, v, a = 0, 0, 0
    while v < len(seen_s) and a < len(heard_s):  # with one tolerance for all, the earliest pair is always a best one
        apart = heard_s[a] - seen_s[v]
        if abs(apart) <= within_s + 1e-9:
            hits, v, a = hits + 1, v + 1, a + 1
        elif apart > 0:
            v += 1
        else:
            a += 1
    return hits / (len(seen_s) + len(heard_s) - hits)


def motion_peaks(frames: np.ndarray, fps: float, *, least_motion: float = 4e-4) -> np.ndarray:
    """Times in seconds of the local maxima of the mean magnitude of optical flow, ascending.

    Args:
        frames: uint8 [T, H, W, 3].
        fps: frames per second.
        least_motion: mean flow below this is none, in picture heights a frame: a tenth of a pixel at 240 lines.

    Raises:
        OviError: for another shape.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise OviError(f"frames must be [T, H, W, 3], got {list(frames.shape)}")
    pictures = grey(frames)
    motion = [float(np.hypot(*dense_flow(a, b)).mean()) / len(a) for a, b in itertools.pairwise(pictures)]
    # Motion from frame n to the next is the instant between them.
    return np.array(
        [
            (n + 1) / fps
            for n in range(1, len(motion) - 1)
            if motion[n - 1] < motion[n] > motion[n + 1] and motion[n] >= least_motion
        ]
    )


def sound_onsets(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """Times in seconds at which something begins to sound, ascending: peaks of the mean rise of the log spectrum.

    Args:
        waveform: [N], mono, full scale 1.
        sample_rate: in Hz.

    Returns:
        float64 [A]; empty for silence.

    Raises:
        OviError: for another shape.
    """
    wave = np.asarray(waveform, np.float64)
    if wave.ndim != 1:
        raise OviError(f"waveform must be [N], got {list(wave.shape)}")
    times_s, rises = sound_rises(wave, sample_rate)
    # One attack spreads over the windows that overlap it.
    rises = uniform_filter1d(rises, 3, mode="nearest") if len(rises) else rises
    if not len(rises) or rises.max() < _LEAST_RISE:
        return np.zeros(0)
    strength = rises / rises.max()
    before, around = round(_BEFORE_S * RATE_HZ), round(_AROUND_S * RATE_HZ)
    highest = maximum_filter1d(strength, before + 1, origin=before // 2, mode="nearest")
    mean = uniform_filter1d(strength, 2 * around + 1, mode="nearest")
    found: list[float] = []
    for n in np.flatnonzero((strength >= highest) & (strength >= mean + _ABOVE_MEAN)):
        rising = n + 1 < len(strength) and strength[n + 1] > strength[n]
        if not rising and (not found or times_s[n] - found[-1] > _WAIT_S):
            found.append(float(times_s[n]))
    return np.array(found)


@METRICS.register("av_align")
class AVAlign(ClipMetric):
    """Share of peaks of motion and onsets of sound that coincide within a frame (AV-Align), without a network.

    ``compute`` gives ``av_align_iou`` (mean over the clips that have both; NaN without any), ``av_align_iou_n`` (how
    many those are) and ``av_align_iou_coverage`` (of all clips). Clips without a peak or without an onset are left
    out: read the coverage beside it. Arbitrary sound hits by chance, the more the busier it is: compare with the real
    clips' figure, not with 1.

    Args:
        fps: frames per second of the clips.
        sample_rate: of their sound, in Hz.
        least_motion: mean flow from which a peak counts, in picture heights a frame.
    """

    HIGHER = ("av_align_iou",)
    SUMS = ("total", "covered")
    total: Tensor
    covered: Tensor

    def __init__(self, fps: float, sample_rate: int, *, least_motion: float = 4e-4, **metric_knobs: Any) -> None:
        super().__init__(fps, sample_rate, **metric_knobs)
        if not least_motion >= 0:
            raise OviError(f"least_motion must not be below 0, got {least_motion}")
        self.least_motion = float(least_motion)

    def identity(self) -> dict[str, Any]:
        """What decides the figures."""
        return {**super().identity(), "least_motion": self.least_motion}

    def add_clip(self, clip: MeasuredClip) -> None:
        """Measure one clip."""
        overlap = av_align(
            clip.frames, clip.waveform, fps=self.fps, sample_rate=self.sample_rate, least_motion=self.least_motion
        )
        if not math.isnan(overlap):
            self.total += overlap
            self.covered += 1

    def compute(self) -> dict[str, Tensor]:
        """The figures as scalars."""
        return {
            "av_align_iou": self.total / self.covered,
            "av_align_iou_n": self.covered,
            "av_align_iou_coverage": self.covered / self.clips,
        }
