"""Pictures at another frame rate, for networks that were trained at one."""

from __future__ import annotations

import numpy as np

from ovi.errors import OviError


def frames_at(frames: np.ndarray, fps: float, to_fps: float) -> np.ndarray:
    """The pictures that are on show at the middle of every frame of another rate; none is blended.

    Frame n lasts from n / fps to (n + 1) / fps, so a picture is shown up to half a frame of either rate early or late,
    and by nothing on average.

    Args:
        frames: [T, ...].
        fps: their rate.
        to_fps: the rate wanted.

    Returns:
        [floor(T * to_fps / fps), ...]: whole frames only, and the very array where the rates are the same.

    Raises:
        OviError: for rates that are not above 0, or no frames.
    """
    if not fps > 0 or not to_fps > 0 or not len(frames):
        raise OviError(f"frame rates must be above 0 and frames there, got {len(frames)} at {fps} for {to_fps}")
    if fps == to_fps:
        return frames
    count = int(len(frames) * to_fps / fps + 1e-6)
    shown = ((np.arange(count) + 0.5) * (fps / to_fps)).astype(int)
    return frames[np.minimum(shown, len(frames) - 1)]
