"""Speech whose lips do not move with it."""

from __future__ import annotations

from ovi.data.stages.base import STAGES
from ovi.data.stages.sync import OffsetEstimator, Sync


@STAGES.register("lip_sync")
class LipSync(Sync):
    """Keeps clips of speech whose lips move with it, by SyncNet; clips without speech in their caption pass it by.

    The paper's filter of speech: within three frames of 25 per second, at a confidence above 1.5. The other clips are
    for the stage ``sync``, which leaves speech to this one with ``speech=pass``. Figures as there.

    Args:
        lip_estimator: finds offset and confidence of a clip, by lips; ``sync_estimator@lip_estimator=syncnet`` of
            ``ovi encode``.
        max_offset_ms: largest offset either way.
        min_confidence: LSE-C, from which the offset counts; clips below it are rejected unless ``unsure=keep``.
        unsure: what becomes of those: ``reject`` or ``keep``.
    """

    name = "lip_sync"

    def __init__(
        self,
        lip_estimator: OffsetEstimator,
        *,
        max_offset_ms: float = 120.0,
        min_confidence: float = 1.5,
        unsure: str = "reject",
    ) -> None:
        super().__init__(
            lip_estimator,
            max_offset_ms=max_offset_ms,
            min_confidence=min_confidence,
            unsure=unsure,
            speech="only",
        )
