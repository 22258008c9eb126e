"""Motion by blocks: the method of Lucas and Kanade, one displacement a block, coarse to fine."""

from __future__ import annotations

import numpy as np

BLOCK = 8
_SHORTEST = 96
"""Pictures are averaged down to about this many pixels on the shorter side."""
_COARSEST = 3 * BLOCK
_ITERATIONS = 3
_FLAT = 4e-4
"""Mean squared gradient (of a picture in 0..1) along the weaker direction below which a block shows no motion."""


def block_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Displacement of every block from one grey picture to the next.

    Args:
        first, second: float32 [P, H, W] in 0..1: P pairs.

    Returns:
        float32 [P, H // 8, W // 8, 2]: (rows, columns) in pixels; 0 where a block is too flat to tell.
    """
    levels = [(first, second)]
    while min(levels[-1][0].shape[1:]) >= 2 * _COARSEST:
        levels.append((_half(levels[-1][0]), _half(levels[-1][1])))
    flow: np.ndarray | None = None
    for a, b in reversed(levels):
        high, wide = a.shape[1] // BLOCK, a.shape[2] // BLOCK
        if flow is None:
            flow = np.zeros((len(a), high, wide, 2), np.float32)
        else:
            rows = np.minimum(np.arange(high) // 2, flow.shape[1] - 1)
            columns = np.minimum(np.arange(wide) // 2, flow.shape[2] - 1)
            flow = 2.0 * flow[:, rows][:, :, columns]
        flow = _refined(a[:, : high * BLOCK, : wide * BLOCK], b, flow)
    assert flow is not None
    return flow


def speed(frames: np.ndarray, fps: float, *, max_pairs: int = 24) -> np.ndarray:
    """How fast the picture moves, by pairs of consecutive frames.

    Args:
        frames: uint8 [T, H, W, 3].
        fps: frames per second.
        max_pairs: at most this many pairs, spread evenly, are looked at.

    Returns:
        [P]: mean over all blocks of the length of their displacement, in picture heights per second; blocks too flat
        to show motion count as still.
    """
    count = len(frames) - 1
    if count < 1:
        return np.zeros(0)
    chosen = np.unique(np.round(np.linspace(0, count - 1, min(count, max_pairs))).astype(int))
    grey = {n: _grey(frames[n]) for n in sorted({*chosen.tolist(), *(chosen + 1).tolist()})}
    first, second = (np.stack([grey[n] for n in numbers]) for numbers in (chosen, chosen + 1))
    lengths = np.linalg.norm(block_flow(first, second), axis=-1)
    return lengths.mean((1, 2)) * fps / first.shape[1]


def _refined(a: np.ndarray, b: np.ndarray, flow: np.ndarray) -> np.ndarray:
    pairs, height, width = a.shape
    gy, gx = np.gradient(a, axis=(1, 2))
    yy, xx, xy = _sums(gy * gy), _sums(gx * gx), _sums(gy * gx)
    weaker = 0.5 * (yy + xx - np.sqrt((yy - xx) ** 2 + 4 * xy * xy))
    stronger = 0.5 * (yy + xx + np.sqrt((yy - xx) ** 2 + 4 * xy * xy))
    # Edges move only across themselves: damping keeps what they say and invents nothing along them.
    damping = 1e-5 + 0.02 * stronger
    det = (yy + damping) * (xx + damping) - xy * xy
    seen = (stronger > _FLAT)[..., None] & (weaker > -1.0)[..., None]
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    which = np.arange(pairs)[:, None, None]
    for _ in range(_ITERATIONS):
        dense = flow.repeat(BLOCK, 1).repeat(BLOCK, 2)
        change = _sampled(b, which, rows + dense[..., 0], columns + dense[..., 1]) - a
        ty, tx = _sums(gy * change), _sums(gx * change)
        step = np.stack([-((xx + damping) * ty - xy * tx) / det, -((yy + damping) * tx - xy * ty) / det], -1)
        flow = np.where(seen, flow + np.clip(step, -2.0, 2.0), 0.0)
    return flow.astype(np.float32)


def _sums(values: np.ndarray) -> np.ndarray:
    """Means over blocks."""
    pairs, height, width = values.shape
    return values.reshape(pairs, height // BLOCK, BLOCK, width // BLOCK, BLOCK).mean((2, 4))


def _sampled(pictures: np.ndarray, which: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Pictures at fractional places, the edge held beyond it."""
    height, width = pictures.shape[1:]
    rows, columns = np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)
    top, left = np.minimum(rows.astype(int), height - 2), np.minimum(columns.astype(int), width - 2)
    y, x = rows - top, columns - left
    upper = pictures[which, top, left] * (1 - x) + pictures[which, top, left + 1] * x
    lower = pictures[which, top + 1, left] * (1 - x) + pictures[which, top + 1, left + 1] * x
    return upper * (1 - y) + lower * y


def _grey(frame: np.ndarray) -> np.ndarray:
    block = max(1, min(frame.shape[:2]) // _SHORTEST)
    high, wide = frame.shape[0] // block, frame.shape[1] // block
    # Summed in whole numbers, rows first: five times faster than a mean over three axes.
    cut = frame[: high * block, : wide * block]
    grey = cut[..., 0].astype(np.uint32) + cut[..., 1] + cut[..., 2]
    sums = grey.reshape(high, block, wide * block).sum(1).reshape(high, wide, block).sum(2)
    return (sums / (3 * 255.0 * block * block)).astype(np.float32)


def _half(pictures: np.ndarray) -> np.ndarray:
    pairs, height, width = (pictures.shape[0], *(n // 2 for n in pictures.shape[1:]))
    return pictures[:, : 2 * height, : 2 * width].reshape(pairs, height, 2, width, 2).mean((2, 4))
