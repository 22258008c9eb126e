"""Sound that does not come when it is seen."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ovi.data.stages.base import STAGES, Candidate, Filter, Limit, Rejected
from ovi.errors import OviError

OffsetEstimator = Callable[[np.ndarray, np.ndarray, float, int], tuple[float, float]]
"""(frames uint8 [T, H, W, 3], waveform [N], fps, sample rate in Hz) to (offset in ms, positive when the sound is late;
confidence). An offset that is no number says that there is nothing to go by."""


@STAGES.register("sync")
class Sync(Filter):
    """Keeps clips whose sound comes within a time of what is seen, as far as an estimator can tell.

    Figures: ``offset_ms``, ``abs_offset_ms`` where the estimator is confident, and ``sync_confidence``.

    Args:
        estimator: finds offset and confidence of a clip.
        max_offset_ms: largest offset either way; three frames at 24 per second by default.
        min_confidence: of the estimator, in its own unit, from which its offset counts.
        unsure: what becomes of clips below that: ``keep`` or ``reject``. SyncNet on faces should reject; the
            weight-free estimator finds events in few clips, and says nothing about the others.
        speech: whether clips with speech in their caption (``<S>``) are judged: ``judge`` them like all others,
            ``pass`` them by unjudged, or judge them ``only``.
    """

    name = "sync"
    level = "clip"

    def __init__(
        self,
        estimator: OffsetEstimator,
        *,
        max_offset_ms: float = 125.0,
        min_confidence: float = 0.2,
        unsure: str = "keep",
        speech: str = "judge",
    ) -> None:
        if unsure not in ("keep", "reject"):
            raise OviError(f"{self.name}.unsure must be 'keep' or 'reject', got {unsure!r}")
        if speech not in ("judge", "pass", "only"):
            raise OviError(f"{self.name}.speech must be 'judge', 'pass' or 'only', got {speech!r}")
        self.estimator, self.min_confidence, self.unsure, self.speech = estimator, min_confidence, unsure, speech
        self.limits = (Limit("abs_offset_ms", "out_of_sync", f"{self.name}.max_offset_ms", high=max_offset_ms),)
        if unsure == "reject":
            unsure_limit = Limit("sync_confidence", "unsure_sync", f"{self.name}.min_confidence", low=min_confidence)
            self.limits = (unsure_limit, *self.limits)

    def judge(self, candidate: Candidate) -> Candidate | Rejected:
        if self.speech != "judge" and ("<S>" in candidate.caption) != (self.speech == "only"):
            return candidate
        candidate = candidate.decoded()
        clip = candidate.clip
        assert clip is not None
        offset_ms, confidence = self.estimator(clip.frames, clip.waveform, clip.fps, clip.sample_rate)
        # An offset that is no number is as good as no confidence, whatever the estimator says of it.
        confidence = float(confidence) if math.isfinite(offset_ms) and math.isfinite(confidence) else 0.0
        figures = {"offset_ms": float(offset_ms), "sync_confidence": confidence}
        sure = math.isfinite(offset_ms) and confidence >= self.min_confidence
        figures["abs_offset_ms"] = abs(float(offset_ms)) if sure else math.nan
        return self.within_limits(candidate.with_figures(figures))
