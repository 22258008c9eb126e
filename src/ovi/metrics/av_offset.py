"""Audio-visual offset without weights: correlate changes of motion in the picture with rises in the sound.

Not SyncNet and not Synchformer, and never to be reported as either: events of any kind must be seen and heard (an
impact, a clap), and where they are not, the confidence says so. Picture side: magnitude of the change of the mean
optical flow vector from frame to frame, which peaks where something turns and stays low while it falls or drifts.
Sound side: rises of the log spectrum, averaged over frequency. The offset is the lag of the best correlation, each lag
scored against the whole of both curves: over the overlap alone, one chance pair at a large lag beats four true ones.

On bouncing balls of 2 s, shifted by up to 400 ms, the clips of confidence 0.2 and more are three in four from 16 fps
on, nearly all of them within 40 ms (median error 2 to 6 ms), and half at 8 fps, nine in ten within 40 ms. What a clip
this short cannot tell apart, such as two lags of an even rhythm, comes with low confidence.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter1d, map_coordinates, uniform_filter
from torch import Tensor

from ovi.errors import OviError
from ovi.metrics.clip_metric import ClipMetric

RATE_HZ = 200.0
"""Rate at which both curves are compared."""
_WINDOW_S = 0.016
_SMOOTH_S = 0.025
_PEAK_S = 0.15
_ITERATIONS = 3
_COARSEST = 16
_LARGEST = 64
"""Pictures are averaged down to about this many pixels on the shorter side."""


@dataclass(frozen=True)
class Offset:
    """Offset of one clip.

    Attributes:
        offset_ms: positive when the sound is late; NaN when picture or sound has no events.
        confidence: best correlation minus the best one more than 150 ms away from it, 0..2; 0 beside a NaN.
    """

    offset_ms: float
    confidence: float


def av_offset(
    frames: np.ndarray, waveform: np.ndarray, *, fps: float, sample_rate: int, max_lag_s: float = 1.0
) -> Offset:
    """Lag between what moves and what sounds.

    Args:
        frames: uint8 [T, H, W, 3]; frame n is the instant (n + 0.5) / fps.
        waveform: [N], mono; sample n is the instant n / sample_rate.
        fps: frames per second.
        sample_rate: in Hz.
        max_lag_s: lags up to this are tried, but never beyond half the clip.

    Raises:
        OviError: for arrays of another shape, or fewer than 4 frames.
    """
    frames, wave = np.asarray(frames), np.asarray(waveform, np.float64)
    if frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) < 4:
        raise OviError(f"frames must be [T, H, W, 3] with T of 4 or more, got {list(frames.shape)}")
    if wave.ndim != 1:
        raise OviError(f"waveform must be [N], got {list(wave.shape)}")
    size = int(min(len(frames) / fps, len(wave) / sample_rate) * RATE_HZ)
    grid_s = np.arange(size) / RATE_HZ
    seen_s, seen = motion_changes(frames, fps)
    heard_s, heard = sound_rises(wave, sample_rate)
    picture = _smooth(np.interp(grid_s, seen_s, seen, left=0.0, right=0.0))
    sound = _smooth(np.interp(grid_s, heard_s, heard, left=0.0, right=0.0))
    return _best_lag(picture, sound, round(min(max_lag_s, size / RATE_HZ / 2) * RATE_HZ))


def motion_changes(frames: np.ndarray, fps: float) -> tuple[np.ndarray, np.ndarray]:
    """(times in s, magnitude of the change of the mean flow vector [T - 2] in picture heights per frame).

    The change at frame n is flow n to n+1 minus flow n-1 to n, symmetric about (n + 0.5) / fps: no bias. The median
    change is taken off first, since steady acceleration (a fall) is no event.
    """
    grey = _grey(frames)
    flow = np.stack([_mean_flow(a, b) for a, b in itertools.pairwise(grey)])
    change = np.diff(flow, axis=0)
    change = np.linalg.norm(change - np.median(change, axis=0), axis=1) / grey.shape[1]
    return (np.arange(1, len(frames) - 1) + 0.5) / fps, change


def sound_rises(waveform: np.ndarray, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """(times in s, mean over frequency of the rises of log(1 + 100 |STFT|)).

    A window sees an attack before its centre gets there, so rises come early by half a window or so. How much exactly
    is measured once a rate on a click at a known time, and taken off the times.
    """
    times_s, rises = _rises(waveform, sample_rate)
    return times_s - _bias_s(sample_rate), rises


class AVOffset(ClipMetric):
    """Mean |offset| over the clips with events, and the share of clips that have them.

    ``compute`` gives ``av_offset_xcorr_ms`` (NaN when no clip passes), ``av_offset_xcorr_coverage`` (clips of at least
    ``threshold`` confidence, of all) and ``av_offset_xcorr_n`` (all clips).

    Args:
        fps: frames per second of the clips.
        sample_rate: of their sound, in Hz.
        threshold: confidence from which an offset counts.
        max_lag_s: as for ``av_offset``.
    """

    SUMS = ("total_ms", "covered")
    total_ms: Tensor
    covered: Tensor

    def __init__(
        self, *, fps: float, sample_rate: int, threshold: float = 0.2, max_lag_s: float = 1.0, **metric_knobs: Any
    ) -> None:
        super().__init__(fps=fps, sample_rate=sample_rate, **metric_knobs)
        self.threshold, self.max_lag_s = threshold, max_lag_s

    def add_clip(self, frames: np.ndarray, waveform: np.ndarray) -> None:
        """Measure one clip."""
        found = av_offset(frames, waveform, fps=self.fps, sample_rate=self.sample_rate, max_lag_s=self.max_lag_s)
        if found.confidence >= self.threshold:
            self.covered += 1
            self.total_ms += abs(found.offset_ms)

    def compute(self) -> dict[str, Tensor]:
        """The figures as scalars."""
        return {
            "av_offset_xcorr_ms": self.total_ms / self.covered,
            "av_offset_xcorr_coverage": self.covered / self.clips,
            "av_offset_xcorr_n": self.clips,
        }


# --- picture ---------------------------------------------------------------------------------------------------------


def _grey(frames: np.ndarray) -> np.ndarray:
    """[T, h, w] in 0..1, averaged over whole blocks of pixels down to about 64."""
    block = max(1, min(frames.shape[1:3]) // _LARGEST)
    high, wide = frames.shape[1] // block, frames.shape[2] // block
    grey = np.empty((len(frames), high, wide), np.float32)
    for n, frame in enumerate(frames):  # one at a time: a full-size clip in floats would not fit
        cut = frame[: high * block, : wide * block].astype(np.float32).mean(-1) / 255.0
        grey[n] = cut.reshape(high, block, wide, block).mean((1, 3))
    return grey


def _mean_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Mean displacement (rows, columns) from one picture to the next in pixels, by Lucas and Kanade, coarse to fine.

    Weighted by gradient energy times change: still ground and flat areas, whose flow means nothing, count for nothing.
    """
    pyramid = [(first, second)]
    while min(pyramid[-1][0].shape) >= _COARSEST:
        pyramid.append((_half(pyramid[-1][0]), _half(pyramid[-1][1])))
    flow = np.zeros((2, *pyramid[-1][0].shape), np.float32)
    for level, (a, b) in enumerate(reversed(pyramid)):
        if level:
            flow = 2.0 * np.stack([_double(f, a.shape) for f in flow])
        rows, columns = np.mgrid[: a.shape[0], : a.shape[1]].astype(np.float32)
        gy, gx = np.gradient(a)
        yy, xx, xy = (uniform_filter(p, 9, mode="nearest") for p in (gy * gy, gx * gx, gy * gx))
        damping = 1e-4 + 0.02 * (yy + xx)
        det = (yy + damping) * (xx + damping) - xy * xy
        for _ in range(_ITERATIONS):
            warped = map_coordinates(b, [rows + flow[0], columns + flow[1]], order=1, mode="nearest")
            change = warped - a
            ty, tx = (uniform_filter(p, 9, mode="nearest") for p in (gy * change, gx * change))
            step = np.stack([-((xx + damping) * ty - xy * tx) / det, -((yy + damping) * tx - xy * ty) / det])
            flow = flow + np.clip(step, -2.0, 2.0)
    weight = (gy * gy + gx * gx) * np.abs(b - a)
    total = float(weight.sum())
    return (flow * weight).sum((1, 2)) / total if total > 1e-9 else np.zeros(2, np.float32)


def _half(picture: np.ndarray) -> np.ndarray:
    high, wide = picture.shape[0] // 2, picture.shape[1] // 2
    return picture[: 2 * high, : 2 * wide].reshape(high, 2, wide, 2).mean((1, 3))


def _double(flow: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    big = flow.repeat(2, 0).repeat(2, 1)
    return np.pad(big, ((0, shape[0] - big.shape[0]), (0, shape[1] - big.shape[1])), mode="edge")


# --- sound -----------------------------------------------------------------------------------------------------------


def _rises(waveform: np.ndarray, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
    width = max(16, round(_WINDOW_S * sample_rate))
    count = math.ceil(len(waveform) / sample_rate * RATE_HZ)
    centres = np.round(np.arange(count) / RATE_HZ * sample_rate).astype(int)
    padded = np.pad(np.asarray(waveform, np.float64), width)
    pieces = padded[centres[:, None] + width - width // 2 + np.arange(width)[None, :]]
    # The window is scaled to a length of 256, so that the log compresses alike at every sample rate.
    spectrum = np.abs(np.fft.rfft(pieces * np.hanning(width), axis=1)) * (256.0 / width)
    rises = np.maximum(np.diff(np.log1p(100.0 * spectrum), axis=0), 0.0).mean(1)
    return (np.arange(1, count) - 0.5) / RATE_HZ, rises


@lru_cache(maxsize=16)
def _bias_s(sample_rate: int) -> float:
    """Peak of the smoothed response to decaying tones that start at known times, minus those times: about -6 ms.

    Averaged over pitches and places of the attack on the grid.
    """
    biases = []
    for step, hz in enumerate(np.geomspace(150.0, 0.2 * sample_rate, 12)):
        at_s = 0.25 + step / 12 / RATE_HZ
        since = np.arange(sample_rate // 2) / sample_rate - at_s
        tone = 0.4 * np.sin(2 * np.pi * hz * since) * np.exp(-since.clip(0) / 0.04) * np.clip(since / 0.001, 0.0, 1.0)
        times_s, rises = _rises(tone, sample_rate)
        response = _smooth(rises)
        peak = int(response.argmax())
        biases.append(float(times_s[peak]) + _vertex(response[peak - 1 : peak + 2]) / RATE_HZ - at_s)
    return float(np.mean(biases))


# --- both ------------------------------------------------------------------------------------------------------------


def _smooth(curve: np.ndarray) -> np.ndarray:
    return gaussian_filter1d(curve, _SMOOTH_S * RATE_HZ, mode="nearest")


def _best_lag(picture: np.ndarray, sound: np.ndarray, most: int) -> Offset:
    """Lag of the highest correlation, refined by a parabola through three points."""
    nothing = Offset(math.nan, 0.0)
    size = len(picture)
    if most < 2 or picture.std() < 1e-9 or sound.std() < 1e-9:
        return nothing
    picture, sound = picture - picture.mean(), sound - sound.mean()
    scale = math.sqrt(float((picture @ picture) * (sound @ sound)))
    lags = np.arange(-most, most + 1)
    values = np.correlate(sound, picture, mode="full")[size - 1 - most : size + most] / scale
    peak = int(values.argmax())
    if values[peak] <= 0:
        return nothing
    away = np.abs(lags - lags[peak]) > _PEAK_S * RATE_HZ
    confidence = float(values[peak] - values[away].max(initial=0.0))
    lag = float(lags[peak])
    if 0 < peak < len(lags) - 1:
        lag += _vertex(values[peak - 1 : peak + 2])
    return Offset(1000.0 * lag / RATE_HZ, max(0.0, confidence))


def _vertex(three: np.ndarray) -> float:
    """Where a parabola through three neighbours peaks, in steps from the middle one."""
    left, top, right = three
    bend = left - 2.0 * top + right
    return float(0.5 * (left - right) / bend) if bend < -1e-12 else 0.0
