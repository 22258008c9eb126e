"""Clips of one length out of files or shots of any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

from ovi.data.media import MediaError, probe
from ovi.data.sources import ClipFormat
from ovi.data.stages.base import STAGES, Candidate, RejectedSink, Stage
from ovi.errors import OviError

_EPS_S = 1e-4
"""Times of shots are sums of rounded timestamps; a clip that ends this far beyond one still fits."""

Remainder = Literal["drop", "overlap"]


@STAGES.register("windows")
class Windows(Stage):
    """Cuts spans into clips of a fixed length and rate; what cannot hold one is rejected.

    The clip is read by time, not by counting frames, so any source rate comes out at the clip's without drift.
    Figures: ``span_s``, the length of what the clip was cut from.

    Args:
        form: length, size and rates of a clip.
        stride_s: from one clip's start to the next, in seconds; None lays them end to end.
        remainder: what becomes of the rest behind the last clip that fits: ``drop`` leaves it, ``overlap`` cuts one
            more clip that ends where the span ends.
        max_clips: the most clips of one span, from its start; None takes all that fit.
        variable_frame_rate: ``reject`` or ``resample`` by the file's time stamps, when the clip is read.
    """

    name = "windows"

    def __init__(
        self,
        form: ClipFormat,
        *,
        stride_s: float | None = None,
        remainder: Remainder = "drop",
        max_clips: int | None = None,
        variable_frame_rate: str = "reject",
    ) -> None:
        if stride_s is not None and not stride_s > 0:
            raise OviError(f"windows.stride_s must be positive, got {stride_s!r}")
        if remainder not in ("drop", "overlap"):
            raise OviError(f"windows.remainder must be 'drop' or 'overlap', got {remainder!r}")
        if max_clips is not None and max_clips < 1:
            raise OviError(f"windows.max_clips must be at least 1, got {max_clips}")
        self.form, self.stride_s, self.remainder, self.max_clips = form, stride_s, remainder, max_clips
        self.variable_frame_rate = variable_frame_rate

    def __call__(self, candidates: Iterable[Candidate], rejected: RejectedSink) -> Iterator[Candidate]:
        for candidate in candidates:
            try:
                span_s = candidate.duration_s
                if span_s is None:
                    span_s = probe(candidate.path).duration_s - candidate.start_s
            except (MediaError, OSError) as error:
                rejected(self.unreadable(candidate, error))
                continue
            candidate = candidate.with_figures({"span_s": span_s})
            starts = self.starts_s(span_s)
            if not starts:
                message = (
                    f"{candidate.path}: {span_s:.3f} s from {candidate.start_s:.3f} s on hold no clip of "
                    f"{self.form.duration_s:.3f} s; lower num_frames"
                )
                rejected(self.reject(candidate, "too_short", message, "span_s", self.form.duration_s))
            for number, start_s in enumerate(starts):
                yield replace(
                    candidate,
                    key=f"{candidate.key}-{number:04d}",
                    start_s=candidate.start_s + start_s,
                    duration_s=self.form.duration_s,
                    form=self.form,
                    variable_frame_rate=self.variable_frame_rate,
                )

    def starts_s(self, span_s: float) -> list[float]:
        """Where clips of a span begin, in seconds after its start."""
        clip_s = self.form.duration_s
        room_s = span_s - clip_s + _EPS_S
        if room_s < 0:
            return []
        stride_s = clip_s if self.stride_s is None else self.stride_s
        count = 1 + int(room_s / stride_s)
        starts = [number * stride_s for number in range(count)]
        rest_s = room_s - _EPS_S - starts[-1]
        if self.remainder == "overlap" and rest_s > 1 / self.form.fps:
            starts.append(span_s - clip_s)
        return starts[: self.max_clips]
