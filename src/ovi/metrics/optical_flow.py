"""Motion between neighbouring pictures, without a network."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import map_coordinates, uniform_filter

from ovi.metrics.averaged import averaged

_ITERATIONS = 3
_COARSEST = 16
_LARGEST = 64
"""Pictures are averaged down to about this many pixels on the shorter side."""


def grey(frames: np.ndarray) -> np.ndarray:
    """Brightness [T, h, w] in 0..1 of uint8 frames [T, H, W, 3], averaged over whole blocks down to about 64 pixels."""
    block = max(1, min(frames.shape[1:3]) // _LARGEST)
    return averaged(frames, block).mean(-1) / 255.0


def dense_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Displacement (rows, columns) of every pixel [2, h, w] from one picture to the next, in pixels.

    Lucas and Kanade (1981) in windows of 9 x 9, coarse to fine; near zero where nothing has an edge.

    Args:
        first, second: [h, w], brightness 0..1.
    """
    pyramid = _pyramid(first, second)
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
    return flow


def mean_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Mean displacement [2] (rows, columns) of what changes from one picture to the next, in pixels.

    Weighted by gradient energy times change: still ground and flat areas, whose flow means nothing, count for nothing.

    Args:
        first, second: [h, w], brightness 0..1.
    """
    gy, gx = np.gradient(first)
    weight = (gy * gy + gx * gx) * np.abs(second - first)
    total = float(weight.sum())
    if total <= 1e-9:
        return np.zeros(2, np.float32)
    return (dense_flow(first, second) * weight).sum((1, 2)) / total


def _pyramid(first: np.ndarray, second: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    pyramid = [(first, second)]
    while min(pyramid[-1][0].shape) >= _COARSEST:
        pyramid.append((_half(pyramid[-1][0]), _half(pyramid[-1][1])))
    return pyramid


def _half(picture: np.ndarray) -> np.ndarray:
    high, wide = picture.shape[0] // 2, picture.shape[1] // 2
    return picture[: 2 * high, : 2 * wide].reshape(high, 2, wide, 2).mean((1, 3))


def _double(flow: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    big = flow.repeat(2, 0).repeat(2, 1)
    return np.pad(big, ((0, shape[0] - big.shape[0]), (0, shape[1] - big.shape[1])), mode="edge")
