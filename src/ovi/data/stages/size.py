"""Pictures too small or of another shape than asked for."""

from __future__ import annotations

from ovi.data.stages.base import STAGES, Candidate, Filter, Limit, Rejected
from ovi.data.stages.pictures import upright_size


@STAGES.register("size")
class Size(Filter):
    """Keeps files whose pictures, as they are shown and after any crop, are large enough and not too wide or tall.

    Figures: ``height``, ``width`` in pixels, ``aspect``.

    Args:
        min_height: in pixels; None is no limit.
        min_width: in pixels; None is no limit.
        min_aspect: width over height as seen; None is no limit.
        max_aspect: width over height as seen; None is no limit.
    """

    name = "size"
    needs = frozenset({"video"})

    def __init__(
        self,
        *,
        min_height: int | None = None,
        min_width: int | None = None,
        min_aspect: float | None = None,
        max_aspect: float | None = None,
    ) -> None:
        self.limits = (
            Limit("height", "small", "size.min_height", low=min_height),
            Limit("width", "small", "size.min_width", low=min_width),
            Limit("aspect", "narrow", "size.min_aspect", low=min_aspect),
            Limit("aspect", "wide", "size.max_aspect", high=max_aspect),
        )

    def judge(self, candidate: Candidate) -> Candidate | Rejected:
        height, width, aspect = upright_size(candidate.path)
        if candidate.crop is not None:
            aspect *= (candidate.crop.width / candidate.crop.height) / (width / height)
            height, width = candidate.crop.height, candidate.crop.width
        return self.within_limits(candidate.with_figures({"height": height, "width": width, "aspect": aspect}))
