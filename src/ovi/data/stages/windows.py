"""Clips of one length out of files or shots of any."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
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
    """Cuts spans into clips of a fixed length, or of several, and rate; what cannot hold one is rejected.

    The clip is read by time, not by counting frames, so any source rate comes out at the clip's without drift. Of
    several lengths the longest that fits is cut off, end to end, until not even the shortest fits the rest.
    Figures: ``span_s``, the length of what the clip was cut from.

    Args:
        form: length, size and rates of a clip.
        lengths: frames of a clip; None is that of ``form`` alone.
        stride_s: from one clip's start to the next, in seconds; None lays them end to end, as several lengths always
            are.
        remainder: what becomes of the rest behind the last clip that fits: ``drop`` leaves it, ``overlap`` cuts one
            more clip, of the shortest length, that ends where the span ends.
        max_clips: the most clips of one span, from its start; None takes all that fit.
        variable_frame_rate: ``reject`` or ``resample`` by the file's time stamps, when the clip is read.
    """

    name = "windows"
    needs = frozenset()

    def __init__(
        self,
        form: ClipFormat,
        *,
        lengths: Sequence[int] | None = None,
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
        self.lengths = sorted(set(lengths)) if lengths is not None else [form.num_frames]
        if not self.lengths or self.lengths[0] < 1:
            raise OviError(f"windows.lengths must be frames of a clip, each at least 1, got {lengths!r}")
        if stride_s is not None and len(self.lengths) > 1:
            raise OviError(
                f"windows.stride_s={stride_s:g} with clips of {len(self.lengths)} lengths: they are laid end to end; "
                f"take stride_s away, or give one length"
            )
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
            clips = self.clips(span_s)
            if not clips:
                clip_s = self.lengths[0] / self.form.fps
                knob = "num_frames" if len(self.lengths) == 1 else "the shortest of lengths"
                message = (
                    f"{candidate.path}: {span_s:.3f} s from {candidate.start_s:.3f} s on hold no clip of "
                    f"{clip_s:.3f} s; lower {knob}"
                )
                rejected(self.reject(candidate, "too_short", message, "span_s", clip_s))
            for number, (start_s, num_frames) in enumerate(clips):
                form = replace(self.form, num_frames=num_frames).without(candidate.missing)
                yield replace(
                    candidate,
                    key=f"{candidate.key}-{number:04d}",
                    start_s=candidate.start_s + start_s,
                    duration_s=form.duration_s,
                    form=form,
                    variable_frame_rate=self.variable_frame_rate,
                )

    def clips(self, span_s: float) -> list[tuple[float, int]]:
        """Where clips of a span begin, in seconds after its start, and their frames."""
        if len(self.lengths) == 1:
            return [(start_s, self.lengths[0]) for start_s in self._starts_s(span_s)]
        fps, used, found = self.form.fps, 0, list[tuple[float, int]]()
        while fitting := bisect_right(self.lengths, int((span_s + _EPS_S) * fps) - used):
            found.append((used / fps, self.lengths[fitting - 1]))
            used += self.lengths[fitting - 1]
        if self.remainder == "overlap" and found and span_s - used / fps > 1 / fps:
            found.append((span_s - self.lengths[0] / fps, self.lengths[0]))
        return found[: self.max_clips]

    def starts_s(self, span_s: float) -> list[float]:
        """Where clips of a span begin, in seconds after its start."""
        return [start_s for start_s, _ in self.clips(span_s)]

    def _starts_s(self, span_s: float) -> list[float]:
        """Where clips of the only length begin."""
        clip_s = self.lengths[0] / self.form.fps
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
