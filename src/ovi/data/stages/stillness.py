"""Pictures that do not change."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from ovi.data.media import Clip
from ovi.data.stages.base import STAGES, ClipFilter, Limit
from ovi.data.stages.loudness import longest_run


@STAGES.register("stillness")
class Stillness(ClipFilter):
    """Keeps clips whose frames mostly differ from the one before.

    A clip read at twice its source's rate holds every frame twice: half of its pairs are the same for that reason.
    Figures: ``still_share`` of consecutive pairs that are the same, and ``frozen_s``, how long one picture stays.

    Args:
        max_share: of pairs that are the same, 0..1; None is no limit.
        max_frozen_s: the longest that one picture may stay, in seconds; None is no limit.
        same_below: mean absolute difference below which two frames count as the same, in levels of 0..255; a still
            picture re-encoded stays below the default, unless the encoder was starved.
    """

    name = "stillness"
    needs = frozenset({"video"})

    def __init__(
        self, *, max_share: float | None = 0.8, max_frozen_s: float | None = 1.0, same_below: float = 0.1
    ) -> None:
        self.same_below = same_below
        self.limits = (
            Limit("still_share", "still", "stillness.max_share", high=max_share),
            Limit("frozen_s", "frozen", "stillness.max_frozen_s", high=max_frozen_s),
        )

    def measure(self, clip: Clip) -> Mapping[str, float]:
        frames = clip.frames
        changes = np.array([_mean_change(a, b) for a, b in pairwise(frames)])
        same = changes < self.same_below
        if not len(same):
            return {"still_share": 1.0, "frozen_s": 1 / clip.fps}
        return {"still_share": float(same.mean()), "frozen_s": (longest_run(same) + 1) / clip.fps}


def _mean_change(first: np.ndarray, second: np.ndarray) -> float:
    # In bytes: larger minus smaller cannot wrap, and is three times faster than going through floats.
    return float((np.maximum(first, second) - np.minimum(first, second)).mean(dtype=np.float64))
