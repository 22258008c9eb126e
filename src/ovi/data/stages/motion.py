"""Too little or too much motion."""

from __future__ import annotations

from collections.abc import Mapping

from ovi.data.media import Clip
from ovi.data.stages.base import STAGES, ClipFilter, Limit
from ovi.data.stages.optical_flow import speed
from ovi.errors import OviError


@STAGES.register("motion")
class Motion(ClipFilter):
    """Keeps clips whose mean optical flow lies in a range.

    Figures: ``motion``, the mean length of the flow over the picture and over time, in picture heights per second, so
    that it depends on neither size nor rate; and ``motion_peak``, that of the fastest pair of frames. Flow is by blocks
    of 8 pixels on pictures of about 96, after Lucas and Kanade; flat blocks count as still.

    Args:
        low: least motion, in picture heights per second; None is no limit.
        high: most motion; None is no limit.
        max_pairs: at most this many pairs of consecutive frames, spread evenly, are looked at.
    """

    name = "motion"
    needs = frozenset({"video"})

    def __init__(self, *, low: float | None = 0.002, high: float | None = None, max_pairs: int = 24) -> None:
        if max_pairs < 1:
            raise OviError(f"motion.max_pairs must be at least 1, got {max_pairs}")
        self.max_pairs = max_pairs
        self.limits = (
            Limit("motion", "little_motion", "motion.low", low=low),
            Limit("motion", "much_motion", "motion.high", high=high),
        )

    def measure(self, clip: Clip) -> Mapping[str, float]:
        if min(clip.frames.shape[1:3]) < 8:
            raise OviError(f"motion needs pictures of at least 8 x 8 pixels, got {clip.frames.shape[1:3]}")
        speeds = speed(clip.frames, clip.fps, max_pairs=self.max_pairs)
        return {"motion": float(speeds.mean()) if len(speeds) else 0.0, "motion_peak": float(speeds.max(initial=0.0))}
