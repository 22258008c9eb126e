"""How far impacts in the picture and onsets in the sound lie apart, for clips of one bouncing object.

The object is what differs from the background of its row. Its height is a chain of free-fall arcs of one gravity,
joined where downward speed turns upward at once; the chain that fits best is found by dynamic programming, and an
impact is where two neighbouring arcs cross, well below a frame's length. Onsets are sudden rises of the sound's level.

Frame n is taken as the instant (n + 0.5) / fps, sample n as n / sample_rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import maximum_filter1d, uniform_filter
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ovi.errors import OviError
from ovi.metrics.averaged import averaged
from ovi.metrics.clip_metric import METRICS, ClipMetric, MeasuredClip

_LEAST_GAP_S = 0.2
"""Two impacts of one object, or two onsets, are never closer than this."""
_FLOOR_SHARE = 0.35
"""Impacts lie in this lowest share of the range of heights."""
_LARGEST = 128
"""Pictures of more than twice this on the shorter side are averaged down to about this: the object is followed to a
fraction of a pixel, and a large clip in floats would take gigabytes."""


@dataclass(frozen=True)
class ImpactOffset:
    """Offsets of one clip.

    Attributes:
        mean_abs_ms: mean |onset - impact| over matched pairs, in ms; NaN when there is none.
        signed_ms: mean of onset - impact; positive when the sound is late.
        num_matched: pairs.
        num_impacts: found in the picture.
        num_onsets: found in the sound.
    """

    mean_abs_ms: float
    signed_ms: float
    num_matched: int
    num_impacts: int
    num_onsets: int


def impact_offset(frames: np.ndarray, waveform: np.ndarray, *, fps: float, sample_rate: int) -> ImpactOffset:
    """Match picture impacts and sound onsets one to one, with the least total distance.

    Args:
        frames: uint8 [T, H, W, 3].
        waveform: [N], mono.
        fps: frames per second.
        sample_rate: in Hz.

    Raises:
        OviError: for arrays of another shape.
    """
    impacts, onsets = video_impacts(frames, fps), audio_onsets(waveform, sample_rate)
    if not len(impacts) or not len(onsets):
        return ImpactOffset(math.nan, math.nan, 0, len(impacts), len(onsets))
    late_s = onsets[None, :] - impacts[:, None]
    rows, columns = linear_sum_assignment(np.abs(late_s))
    late_ms = 1000.0 * late_s[rows, columns]
    return ImpactOffset(float(np.abs(late_ms).mean()), float(late_ms.mean()), len(rows), len(impacts), len(onsets))


def video_impacts(frames: np.ndarray, fps: float) -> np.ndarray:
    """Times in seconds at which the moving object hits the floor, ascending.

    Args:
        frames: uint8 [T, H, W, 3] of one moving object before a background that is alike along each row.
        fps: frames per second.

    Returns:
        float64 [K]; empty where nothing moves, or nothing bounces.

    Raises:
        OviError: for arrays of another shape.
    """
    times_s, heights, weights = track(frames, fps)
    if len(times_s) < 5 or np.ptp(heights) < 0.06:
        return np.zeros(0)
    return _cusps(times_s, heights, weights, 1.0 / fps, _block(frames) / frames.shape[1])


def track(frames: np.ndarray, fps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the moving object is: (times in seconds, heights of its centre in picture heights, confidence 0..1).

    Frames in which it cannot be seen are left out.

    Raises:
        OviError: for frames that are not [T, H, W, 3].
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise OviError(f"frames must be [T, H, W, 3], got {list(frames.shape)}")
    nothing, block, full_height = np.zeros(0), _block(frames), frames.shape[1]
    # A box of three pixels takes the noise of single pixels away, and moves no centre.
    pictures = uniform_filter(averaged(frames, block), size=(1, 3, 3, 1))
    share = _foreground(pictures)
    mass = share.sum((1, 2))
    if not mass.any():
        return nothing, nothing, nothing
    usual = float(np.median(mass[mass > 0]))
    seen = mass > 0.25 * usual
    rows = np.arange(pictures.shape[1]) + 0.5
    columns = np.arange(pictures.shape[2]) + 0.5
    share, mass = share[seen], mass[seen]
    y = (share.sum(2) @ rows) / mass
    x = (share.sum(1) @ columns) / mass
    # Once more, only near the object: a speck elsewhere would draw the centre towards it.
    reach = 1.5 * math.sqrt(usual / math.pi) + 2.0
    for _ in range(2):
        near = np.hypot(rows[None, :, None] - y[:, None, None], columns[None, None, :] - x[:, None, None]) < reach
        local = share * near
        local_mass = np.maximum(local.sum((1, 2)), 1e-6)
        y = (local.sum(2) @ rows) / local_mass
        x = (local.sum(1) @ columns) / local_mass
    times_s = (np.flatnonzero(seen) + 0.5) / fps
    return times_s, 1.0 - y * block / full_height, np.clip(local_mass / usual, 0.0, 1.0)


def audio_onsets(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """Times in seconds at which the sound's level rises suddenly, ascending.

    Args:
        waveform: [N], mono, any scale.
        sample_rate: in Hz.

    Returns:
        float64 [K]; empty for silence and for sound without attacks.

    Raises:
        OviError: for a waveform that is not [N].
    """
    wave = np.asarray(waveform, np.float64)
    if wave.ndim != 1:
        raise OviError(f"waveform must be [N], got {list(wave.shape)}")
    hop = max(1, round(0.001 * sample_rate))
    before, after = 20, 10  # ms compared on either side of an instant
    size = len(wave) // hop
    if size < 4 * before or not np.abs(wave).max() > 1e-4:
        return np.zeros(0)
    wave = wave - wave.mean()
    energy = np.square(wave[: size * hop]).reshape(size, hop).mean(1)
    total = np.concatenate([[0.0], np.cumsum(energy)])
    at = np.arange(size)
    past = (total[at] - total[np.maximum(at - before, 0)]) / np.maximum(np.minimum(at, before), 1)
    future = (total[np.minimum(at + after, size)] - total[at]) / np.maximum(np.minimum(size - at, after), 1)
    # Below 30 dB under the loudest 10 ms, rises are of the background.
    floor = 1e-3 * future.max()
    rise_db = 10.0 * np.log10((future + floor) / (past + floor))
    rise_db[:2] = 0.0
    gap = round(1000 * _LEAST_GAP_S)
    peaks = np.flatnonzero((rise_db > 6.0) & (rise_db >= maximum_filter1d(rise_db, gap, mode="constant")))
    peaks = peaks[np.diff(peaks, prepend=-gap) > 1]
    return np.array([_attack(wave, int(p) * hop, sample_rate) for p in peaks])


def _attack(wave: np.ndarray, near: int, sample_rate: int) -> float:
    """When the sound first passes a fifth of its coming peak, in seconds: the rise's beginning, to a ms or two."""
    ms = sample_rate / 1000.0
    begin, end = max(0, near - round(15 * ms)), min(len(wave), near + round(20 * ms))
    level = np.abs(wave[begin:end])
    before = np.abs(wave[max(0, begin - round(10 * ms)) : begin + 1]).max()
    peak = level.max()
    passed = np.flatnonzero(level >= max(0.2 * peak, min(1.5 * before, 0.6 * peak)))
    return (begin + int(passed[0])) / sample_rate


@METRICS.register("impacts")
class MeanImpactOffset(ClipMetric):
    """Mean |offset| between picture impacts and sound onsets over clips of one bouncing object.

    ``compute`` gives ``impact_offset_ms`` (NaN when no clip has both), ``impact_offset_coverage``,
    ``impact_offset_match_rate`` and ``impact_offset_n``. Every clip counts once, however many impacts it has. Read the
    match rate (pairs over the larger of impacts and onsets, averaged over all clips) beside the offset: sound that
    clatters without end has an onset near every impact, and a poor match rate.

    Args:
        fps: frames per second of the clips.
        sample_rate: of their sound, in Hz.
    """

    LOWER = ("impact_offset_ms",)
    HIGHER = ("impact_offset_match_rate",)
    SUMS = ("total_ms", "covered", "match_rate")
    total_ms: Tensor
    covered: Tensor
    match_rate: Tensor

    def add_clip(self, clip: MeasuredClip) -> None:
        """Measure one clip."""
        found = impact_offset(clip.frames, clip.waveform, fps=self.fps, sample_rate=self.sample_rate)
        if found.num_matched:
            self.match_rate += found.num_matched / max(found.num_impacts, found.num_onsets)
            self.covered += 1
            self.total_ms += found.mean_abs_ms

    def compute(self) -> dict[str, Tensor]:
        """The figures as scalars."""
        return {
            "impact_offset_ms": self.total_ms / self.covered,
            "impact_offset_coverage": self.covered / self.clips,
            "impact_offset_match_rate": self.match_rate / self.clips,
            "impact_offset_n": self.clips,
        }


# --- the object in the picture ---------------------------------------------------------------------------------------


def _block(frames: np.ndarray) -> int:
    """Pixels on the side of the squares that are averaged."""
    return max(1, min(frames.shape[1:3]) // _LARGEST)


def _foreground(pictures: np.ndarray) -> np.ndarray:
    """How much each pixel [T, H, W] belongs to the moving object, 0..1.

    A row of a synthetic scene has one background, wall or floor. So its median over frames *and* columns is that
    background even where the object never leaves its place; a median over time alone would take the object for it.
    """
    background = np.median(pictures, axis=(0, 2))[:, None]
    distance = np.linalg.norm(pictures - background, axis=-1)
    noise = 1.4826 * float(np.median(np.abs(distance - np.median(distance)))) + float(np.median(distance))
    strongest = np.sort(distance.reshape(len(pictures), -1), axis=1)[:, -4:].mean(1)
    contrast = float(np.median(strongest))
    threshold = max(12.0, 3.0 * noise, 0.35 * contrast)
    marked = distance > max(threshold, 0.6 * contrast)
    if not marked.any():
        return np.zeros(distance.shape, np.float32)
    towards = np.median(pictures[marked], axis=0) - background
    length = np.maximum(np.linalg.norm(towards, axis=-1), 1.0)
    # Along the line from background to object colour, so that other changes of colour count for little.
    along = ((pictures - background) * towards).sum(-1) / length
    distance = np.where(length > threshold, np.minimum(along, distance), 0.0)
    return np.clip((distance - threshold) / max(contrast - threshold, 1.0), 0.0, 1.0).astype(np.float32)


# --- the chain of arcs -----------------------------------------------------------------------------------------------


def _cusps(times_s: np.ndarray, heights: np.ndarray, weights: np.ndarray, frame_s: float, pixel: float) -> np.ndarray:
    """Impact times of the best chain of arcs h = a + b t - g t^2 / 2 with one g, in seconds."""
    t = times_s - times_s[0]
    # A missing impact costs whole pixels; tracking errs by a fraction of one. So an arc's price is a pixel or two.
    price = 3.0 * pixel**2
    least = max(2, math.floor(_LEAST_GAP_S / frame_s))
    for _ in range(4):
        gravity, cuts = _best_chain(t, heights, weights, price, least)
        # Where the object wobbles, arcs must not fit the wobble: three numbers each, at ln(T) of its variance.
        noise = _noise(t, heights, weights, cuts, gravity)
        due = 3.0 * math.log(len(t)) * noise
        if due <= price:
            break
        price = 1.5 * due
    gravity, lines = _refit(t, heights, weights, cuts, gravity)
    # All impacts are on one floor; a bend far above the lowest place is a wobble of a generated path.
    highest_impact = heights.min() + _FLOOR_SHARE * (heights.max() - heights.min())
    found: list[tuple[float, float]] = []  # time, change of speed
    for k, cut in enumerate(cuts[1:-1], 1):
        (a0, b0), (a1, b1) = lines[k - 1], lines[k]
        before, after = t[cut - 1], t[cut]
        if abs(b1 - b0) < 1e-6:
            continue
        cross = (a0 - a1) / (b1 - b0)
        falls, rises = b0 - gravity * cross < 0, b1 - gravity * cross > 0
        if b1 <= b0 or not falls or not rises:
            continue  # no bounce: a jump of the tracker, or a bend
        if a0 + b0 * cross - 0.5 * gravity * cross**2 > highest_impact:
            continue
        at = float(np.clip(cross, before - 0.5 * frame_s, after + 0.5 * frame_s)) + times_s[0]
        if found and at - found[-1][0] < _LEAST_GAP_S:
            # One impact seen twice: the sharper turn is it.
            found[-1] = max(found[-1], (at, b1 - b0), key=lambda impact: impact[1])
        else:
            found.append((at, b1 - b0))
    return np.array([at for at, _ in found])


def _best_chain(
    t: np.ndarray, heights: np.ndarray, weights: np.ndarray, price: float, least: int
) -> tuple[float, list[int]]:
    """(gravity, cuts) of the cheapest chain over a range of gravities, in picture heights per second squared."""
    gravities = np.geomspace(0.3, 40.0, 60)
    chains = [_chain(t, heights + 0.5 * g * t * t, weights, price, least) for g in gravities]
    best = min(range(len(chains)), key=lambda k: chains[k][0])
    return float(gravities[best]), chains[best][1]


def _noise(t: np.ndarray, heights: np.ndarray, weights: np.ndarray, cuts: list[int], gravity: float) -> float:
    """Variance of the heights about the chain."""
    gravity, lines = _refit(t, heights, weights, cuts, gravity)
    owner = np.repeat(np.arange(len(lines)), np.diff(cuts))
    a, b = np.array(lines)[owner].T
    residual = heights - (a + b * t - 0.5 * gravity * t * t)
    return float((weights * residual**2).sum() / max(len(t) - 2 * len(lines) - 1, 1))


def _chain(t: np.ndarray, y: np.ndarray, w: np.ndarray, price: float, least: int) -> tuple[float, list[int]]:
    """Cheapest cut of straight pieces through (t, y): (cost, cuts from 0 to len(t))."""
    n = len(t)
    residual = _line_costs(t, y, w)
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    came = np.zeros(n + 1, int)
    for j in range(1, n + 1):
        # Pieces at the clip's ends may be short; those between two impacts last a while.
        shortest = 2 if j == n else least
        i = np.arange(0, j)
        allowed = (j - i >= np.where(i == 0, 2, shortest)) | ((i == 0) & (j == n))
        cost = np.where(allowed, best[:j] + residual[:j, j - 1] + price, np.inf)
        came[j] = int(cost.argmin())
        best[j] = cost[came[j]]
    cuts = [n]
    while cuts[-1] > 0:
        cuts.append(int(came[cuts[-1]]))
    return float(best[n]), cuts[::-1]


def _line_costs(t: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Weighted squared residual of the line through points i..j, for all i <= j, by running sums."""
    sums = [np.concatenate([[0.0], np.cumsum(v)]) for v in (w, w * t, w * t * t, w * y, w * t * y, w * y * y)]
    s, st, stt, sy, sty, syy = (v[None, 1:] - v[:-1, None] for v in sums)
    s = np.maximum(s, 1e-12)
    tt, ty, yy = stt - st * st / s, sty - st * sy / s, syy - sy * sy / s
    return np.maximum(yy - np.where(tt > 1e-12, ty * ty / np.maximum(tt, 1e-12), 0.0), 0.0)


def _refit(
    t: np.ndarray, heights: np.ndarray, weights: np.ndarray, cuts: list[int], gravity: float
) -> tuple[float, list[tuple[float, float]]]:
    """Least squares for one gravity and (a, b) of every arc at once."""
    pieces = len(cuts) - 1
    owner = np.repeat(np.arange(pieces), np.diff(cuts))
    design = np.zeros((len(t), 2 * pieces + 1))
    design[np.arange(len(t)), 2 * owner] = 1.0
    design[np.arange(len(t)), 2 * owner + 1] = t
    design[:, -1] = -0.5 * t * t
    root = np.sqrt(weights)
    if len(t) > 2 * pieces + 1:
        solved = np.linalg.lstsq(design * root[:, None], heights * root, rcond=None)[0]
        if 0.5 * gravity < solved[-1] < 2.0 * gravity:
            gravity = float(solved[-1])
    flat = (heights + 0.5 * gravity * t * t) * root
    solved = np.linalg.lstsq(design[:, :-1] * root[:, None], flat, rcond=None)[0]
    return gravity, [(float(solved[2 * k]), float(solved[2 * k + 1])) for k in range(pieces)]
