"""Intervals of means, for the few values that seeds give and the many that clips do.

Which method where was decided by simulation (``tests/test_runs_coverage.py``): below about thirty values a bootstrap's
95 % interval holds the true mean far less often than 95 times in 100 (three values: about 75 times), and one that
draws seeds and then clips anew no more often; Student's t holds it as often as it says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ovi.errors import OviError

FEWEST_FOR_BOOTSTRAP = 30
METHODS = AUTO, T, BOOTSTRAP = ("auto", "t", "bootstrap")
"""How the interval of a mean is found: by what the number of values allows, or always in one way."""
RESAMPLES = 9999


@dataclass(frozen=True)
class Interval:
    """Where the true mean lies.

    Attributes:
        low, high: ends; NaN where nothing can be said.
        p: chance of a mean at least this far from 0, were the true one 0; NaN likewise.
        method: how it was found: ``t``, ``bootstrap``, or ``none``.
    """

    low: float
    high: float
    p: float
    method: str


NOTHING = Interval(math.nan, math.nan, math.nan, "none")


def interval_of_mean(values: Sequence[float] | np.ndarray, *, level: float = 0.95, method: str = AUTO) -> Interval:
    """The interval of the mean of independent values, NaN left out.

    From 30 values on the bias-corrected bootstrap (BCa, scipy) with p by flipping signs at random; below that Student's
    t. Values that are all the same say nothing of their spread: no interval.

    Args:
        values: [n].
        level: of confidence, 0..1.
        method: of ``METHODS``; ``bootstrap`` takes it of any number from two on, with what the head of this file says.

    Raises:
        OviError: for another method.
    """
    if method not in METHODS:
        raise OviError(f"intervals must be {', '.join(METHODS[:-1])} or {METHODS[-1]}, got {method!r}")
    from scipy import stats

    x = np.asarray(values, np.float64)
    x = x[np.isfinite(x)]
    if len(x) < 2 or np.ptp(x) <= 1e-12 * np.abs(x).max():
        return NOTHING
    if method == T or (method == AUTO and len(x) < FEWEST_FOR_BOOTSTRAP):
        found = stats.ttest_1samp(x, 0.0)
        low, high = found.confidence_interval(level)
        return Interval(float(low), float(high), float(found.pvalue), "t")
    # Drawn by a generator of its own: the same values give the same interval.
    low, high = stats.bootstrap(
        (x,), np.mean, confidence_level=level, n_resamples=RESAMPLES, batch=500, rng=np.random.default_rng(0)
    ).confidence_interval
    return Interval(float(low), float(high), sign_flip_p(x), "bootstrap")


def crossed_interval(differences: np.ndarray, *, level: float = 0.95) -> Interval:
    """The interval of a mean over trainings and clips, for other trainings and other clips than these.

    Every clip is made by every training, so a value is the sum of what its training, its clip and chance add. The
    variance of the mean is estimated from these three parts (two-way analysis of variance, both random, Satterthwaite's
    degrees of freedom), and is never taken smaller than the one over trainings, or over clips, alone.

    Args:
        differences: [trainings, clips], NaN where undefined; at least 2 trainings.
        level: of confidence, 0..1.
    """
    from scipy import stats

    d = np.asarray(differences, np.float64)
    d = d[np.isfinite(d).any(1)]
    d = d[:, np.isfinite(d).any(0)]
    trainings, clips = d.shape
    if trainings < 2 or not d.size:
        return NOTHING
    of_trainings, of_clips = np.nanmean(d, 1), np.nanmean(d, 0)
    mean = float(of_trainings.mean())
    candidates = [(float(of_trainings.var(ddof=1)) / trainings, trainings - 1.0)]
    if clips > 1:
        across = float(of_clips.var(ddof=1)) / clips
        rest = d - of_trainings[:, None] - of_clips + mean
        freedom = max(1, int(np.isfinite(d).sum()) - trainings - clips + 1)
        chance = float(np.nansum(rest**2)) / freedom / np.isfinite(d).sum()
        (along, _) = candidates[0]
        variance = max(along + across - chance, along, across)
        if variance > 0:
            least = 1.0 if trainings == 2 else min(trainings, clips) - 1.0
            found = variance**2 / (along**2 / (trainings - 1) + across**2 / (clips - 1))
            candidates.append((variance, max(least, found)))
    scale = 1e-12 * float(np.nanmax(np.abs(d)))
    candidates = [(variance, freedom) for variance, freedom in candidates if math.sqrt(variance) > scale]
    if not candidates:
        return NOTHING
    half = max(stats.t.ppf(0.5 + level / 2, freedom) * math.sqrt(variance) for variance, freedom in candidates)
    p = max(2 * stats.t.sf(abs(mean) / math.sqrt(variance), freedom) for variance, freedom in candidates)
    return Interval(mean - float(half), mean + float(half), float(p), "t")


def sign_flip_p(values: Sequence[float] | np.ndarray) -> float:
    """The chance of a mean at least this far from 0 when each value might as well have had the other sign.

    Exact for few values, where it cannot fall below 2 / 2^n; by random flips for many. NaN without any values.

    Args:
        values: [n] differences, independent of each other; NaN left out.
    """
    from scipy import stats

    x = np.asarray(values, np.float64)
    x = x[np.isfinite(x)]
    if not len(x):
        return math.nan
    if len(x) == 1:
        return 1.0

    def mean(x: Any, y: Any, axis: int) -> Any:
        return np.mean(x - y, axis=axis)

    # Exchanging a pair (x, 0) flips the sign of its difference.
    found = stats.permutation_test(
        (x, np.zeros_like(x)),
        mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=500,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm, 1979), in the order given; NaN stays and is not counted."""
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    out, so_far = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        so_far = max(so_far, min(1.0, p * (len(order) - rank)))
        out[i] = so_far
    return out
