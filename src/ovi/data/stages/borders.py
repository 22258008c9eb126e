"""Black bars and other constant borders, cut off or rejected."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ovi.data.media import Crop, probe
from ovi.data.stages.base import STAGES, Candidate, Filter, Limit, Rejected
from ovi.data.stages.pictures import pictures_at
from ovi.errors import OviError


@STAGES.register("borders")
class Borders(Filter):
    """Finds borders that stay black, or of one colour, over the whole span and has them cut off when the clip is read.

    A row or column belongs to a border when, in every picture looked at, all of its pixels have the border's colour:
    black, or that of the outermost line. Figures: ``border_share``, the share of the picture's area that they take, and
    ``border_top``, ``border_bottom``, ``border_left``, ``border_right`` in pixels.

    Args:
        action: ``crop`` cuts borders off, ``reject`` leaves out clips that have them.
        max_share: most of the picture that borders may take, 0..1: above it a clip is rejected, cropped or not. With
            ``reject`` None is none at all; with ``crop`` it is no limit but a picture of border alone.
        any_colour: whether borders may have any one colour; drawn pictures with a flat background are cut into then.
        num_pictures: how many, spread over the span, are looked at.
        tolerance: how far a border's pixels may lie from its colour, in levels of 0..255: room for compression.
        margin: pixels cut off further in on every side that has a border; encoders smear its edge.
    """

    name = "borders"
    needs = frozenset({"video"})

    def __init__(
        self,
        *,
        action: str = "crop",
        max_share: float | None = None,
        any_colour: bool = False,
        num_pictures: int = 8,
        tolerance: float = 12.0,
        margin: int = 0,
    ) -> None:
        if action not in ("crop", "reject"):
            raise OviError(f"borders.action must be 'crop' or 'reject', got {action!r}")
        if num_pictures < 1 or margin < 0:
            raise OviError(
                f"borders needs num_pictures of at least 1 and margin of at least 0, got {num_pictures}, {margin}"
            )
        self.any_colour = any_colour
        self.action, self.num_pictures, self.tolerance, self.margin = action, num_pictures, tolerance, margin
        most = max_share if max_share is not None else 0.0 if action == "reject" else None
        self.limits = (Limit("border_share", "borders", "borders.max_share", high=most),)

    def judge(self, candidate: Candidate) -> Candidate | Rejected:
        span_s = candidate.duration_s
        if span_s is None:
            span_s = probe(candidate.path).duration_s - candidate.start_s
        times_s = candidate.start_s + (np.arange(self.num_pictures) + 0.5) / self.num_pictures * max(span_s, 0.0)
        pictures = [p.rgb for p in pictures_at(candidate.path, times_s.tolist())]
        pictures = pictures or [p.rgb for p in pictures_at(candidate.path, [candidate.start_s])]
        if not pictures:
            return self.reject(candidate, "unreadable", f"{candidate.path}: no picture of it decodes")
        height, width = pictures[0].shape[:2]
        top, bottom, left, right = find_borders(pictures, self.tolerance, any_colour=self.any_colour)
        inner = max(0, height - top - bottom) * max(0, width - left - right)
        share = 1.0 - inner / (height * width)
        sides = {"border_top": top, "border_bottom": bottom, "border_left": left, "border_right": right}
        candidate = candidate.with_figures({"border_share": share, **sides})
        if not inner:
            return self.reject(
                candidate, "blank", f"{candidate.path}: the picture is of one colour", "border_share", 1.0
            )
        verdict = self.within_limits(candidate)
        if isinstance(verdict, Rejected) or self.action == "reject" or not share:
            return verdict
        top, bottom, left, right = (n + self.margin if n else 0 for n in (top, bottom, left, right))
        if height - top - bottom < 1 or width - left - right < 1:
            message = f"{candidate.path}: borders and margin leave nothing; lower borders.margin"
            return self.reject(candidate, "borders", message, "border_share", 1.0)
        return replace(candidate, crop=Crop(top, left, height - top - bottom, width - left - right), clip=None)


def find_borders(
    pictures: list[np.ndarray], tolerance: float, *, any_colour: bool = False
) -> tuple[int, int, int, int]:
    """Rows and columns (top, bottom, left, right) of a border in every picture; all of them for a blank one.

    Args:
        pictures: uint8 [H, W, 3], of one size.
        tolerance: largest distance from the border's colour, in levels of 0..255.
        any_colour: that of the outermost line instead of black.
    """
    height, width = pictures[0].shape[:2]
    top = bottom = height
    left = right = width
    for picture in pictures:
        # Bars above and below first: with them off, those to the sides are even over what is left of their height.
        top = min(top, _even_lines(picture, tolerance, any_colour))
        bottom = min(bottom, _even_lines(picture[::-1], tolerance, any_colour))
    if top + bottom >= height:
        top, bottom = height, 0
        return top, bottom, left, 0
    for picture in pictures:
        inner = picture[top : height - bottom].transpose(1, 0, 2)
        left = min(left, _even_lines(inner, tolerance, any_colour))
        right = min(right, _even_lines(inner[::-1], tolerance, any_colour))
    if left + right >= width:
        left, right = width, 0
    return top, bottom, left, right


def _even_lines(picture: np.ndarray, tolerance: float, any_colour: bool) -> int:
    """How many lines from the first on are all of the border's colour."""
    colour = np.median(picture[0].reshape(-1, 3), axis=0) if any_colour else np.zeros(3)
    for number, line in enumerate(picture):
        if np.abs(line - colour).max() > tolerance:
            return number
    return len(picture)
