"""Clips of several sizes in one set: each by the shape of its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ovi.data.stages.base import STAGES, Candidate, Filter, Rejected
from ovi.data.stages.pictures import upright_size
from ovi.errors import OviError

_SAME = 1e-9
"""Aspect ratios, as logarithms, that differ by less are equally near."""


@STAGES.register("nearest_size")
class NearestSize(Filter):
    """Gives each clip the size whose aspect ratio is nearest to that of its picture as it is shown, after any crop.

    Nearest by the logarithm, so that twice as wide is as far as twice as tall; of equally near ones the first is taken.
    It must come behind the stages ``windows`` and ``borders``; ``ovi encode`` puts it there where it is given several
    ``sizes``.

    Args:
        sizes: (height, width) each, in pixels.
    """

    name = "nearest_size"
    needs = frozenset({"video"})

    def __init__(self, *, sizes: Sequence[Sequence[int]]) -> None:
        self.sizes = [(int(height), int(width)) for height, width in sizes]
        if not self.sizes or min(min(size) for size in self.sizes) < 1:
            raise OviError(f"nearest_size.sizes must be pairs of a height and a width, got {sizes!r}")
        self._seen: tuple[Path, tuple[int, int, float]] | None = None

    def judge(self, candidate: Candidate) -> Candidate | Rejected:
        if candidate.form is None:
            raise OviError(f"{candidate.path}: is a whole file: put the stage windows before nearest_size")
        # One file's clips come one after another.
        if self._seen is None or self._seen[0] != candidate.path:
            self._seen = candidate.path, upright_size(candidate.path)
        height, width, aspect = self._seen[1]
        if candidate.crop is not None:
            aspect *= (candidate.crop.width / candidate.crop.height) / (width / height)
        height, width = self.nearest(aspect)
        return replace(candidate, form=replace(candidate.form, height=height, width=width), clip=None)

    def nearest(self, aspect: float) -> tuple[int, int]:
        """The size nearest to an aspect ratio, width over height."""
        off = [abs(math.log(aspect * height / width)) for height, width in self.sizes]
        return next(size for size, far in zip(self.sizes, off) if far <= min(off) + _SAME)
