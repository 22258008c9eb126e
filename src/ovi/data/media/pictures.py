"""Pictures of a clip: which decoded ones show at the centres of its frames, scaled and cut."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from ovi.data.media.clip import Crop, MediaError
from ovi.data.media.span import Span, ends_early
from ovi.data.media.upright import Upright

if TYPE_CHECKING:
    from av.video.frame import VideoFrame


class Pictures:
    """Takes decoded frames in order and keeps those that show at the centres of the clip's frames."""

    def __init__(self, path: str | Path, stream: Any, span: Span, begin_s: float) -> None:
        self.path, self.stream, self.span, self.begin_s = path, stream, span, begin_s
        self.frames = np.empty((span.num_frames, span.height, span.width, 3), np.uint8)
        self.taken = 0
        self.times_s: list[float] = []
        self.showing: VideoFrame | None = None
        self.last_duration_s = 0.0
        self.resize = Resize(span.height, span.width, stream.sample_aspect_ratio, span.crop)

    @property
    def complete(self) -> bool:
        """Whether every frame of the clip has its picture."""
        return self.taken == self.span.num_frames

    def add(self, frame: VideoFrame) -> None:
        """Take the next decoded frame.

        Raises:
            MediaError: ``unreadable``, ``late_picture`` or ``damaged``.
        """
        if frame.pts is None or frame.time_base is None:
            raise MediaError("unreadable", f"{self.path}: a picture has no timestamp; remux the file")
        time_s = float(frame.pts * frame.time_base)
        if self.showing is None:
            self._check_lead(time_s)
        elif time_s <= self.times_s[-1]:
            return  # a second picture for the same instant never shows
        self._take_until(time_s)
        # Only the clip's own pictures and their two neighbours tell whether its rate is constant.
        if self.times_s and time_s <= self.begin_s:
            self.times_s.pop()
        self.times_s.append(time_s)
        self.showing = frame
        self.last_duration_s = float((frame.duration or 0) * frame.time_base)

    def finish(self, promised_s: float, start_s: float) -> np.ndarray:
        """The clip's frames, uint8 [T, H, W, 3], when the file has no more.

        Args:
            promised_s: end of the streams by the header, in seconds after the first picture.
            start_s: of the clip, likewise.

        Raises:
            MediaError: ``truncated``, ``too_short``, ``variable_frame_rate`` or ``damaged``.
        """
        needs_s = start_s + self.span.duration_s
        if self.showing is None:
            raise ends_early(self.path, "the picture", 0.0, needs_s, promised_s, start_s)
        if not self.complete:
            steps = np.diff(self.times_s)
            rate = self.stream.average_rate
            lasts_s = self.last_duration_s or (
                float(np.median(steps)) if len(steps) else float(1 / rate) if rate else 0
            )
            end_s = self.times_s[-1] + lasts_s
            self._take_until(end_s + 1 / self.span.fps)
            if not self.complete:
                raise ends_early(self.path, "the picture", end_s - self.begin_s + start_s, needs_s, promised_s, start_s)
        self._check_rate()
        return self.frames

    def _take_until(self, time_s: float) -> None:
        """The picture showing lasts until ``time_s``: give it to every clip frame whose centre lies before."""
        span, picture = self.span, None
        while not self.complete and self.begin_s + (self.taken + 0.5) / span.fps < time_s - 1e-9:
            if self.showing is None:
                return
            if self.showing.is_corrupt:
                raise MediaError("damaged", f"{self.path}: the picture at {self.times_s[-1]:.3f} s is damaged")
            if picture is None:
                picture = self.resize(self.showing)
            self.frames[self.taken] = picture
            self.taken += 1

    def _check_lead(self, time_s: float) -> None:
        """The first picture decoded must be showing when the clip begins, give or take a frame."""
        late_s = time_s - self.begin_s
        if late_s > 1 / self.span.fps + 1e-3:
            raise MediaError(
                "late_picture",
                f"{self.path}: the first picture that decodes is {late_s:.3f} s after the clip's start; "
                "raise start_s, or re-encode the file so that it begins with a key frame",
            )

    def _check_rate(self) -> None:
        steps = np.diff(self.times_s)
        if self.span.variable_frame_rate == "resample" or len(steps) < 2:
            return
        # Containers round timestamps to their tick (1 ms in Matroska); beyond that and 10 % it is another rate.
        usual = float(np.median(steps))
        worst = float(np.abs(steps - usual).max())
        if worst > max(2.0 * float(self.stream.time_base), 0.1 * usual):
            raise MediaError(
                "variable_frame_rate",
                f"{self.path}: pictures last {steps.min() * 1000:.1f} to {steps.max() * 1000:.1f} ms; expected a "
                "constant frame rate. Set variable_frame_rate=resample to take the file by its timestamps",
            )


class Resize:
    """Scales to cover height x width with the aspect kept, turns upright, and cuts about the centre."""

    def __init__(self, height: int, width: int, pixel_aspect: Fraction | None, crop: Crop | None = None) -> None:
        self.height, self.width, self.crop = height, width, crop
        self.pixel_aspect = float(pixel_aspect) if pixel_aspect else 1.0
        self.reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        upright = Upright.of(frame)
        pixel_aspect = self.pixel_aspect
        # Untagged pictures follow the custom of players: BT.709 from 720 lines on, BT.601 below.
        untagged = frame.colorspace not in (1, 4, 5, 6, 7, 9)
        space = (Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601) if untagged else None
        if self.crop is not None:
            frame, space = self._cut(frame, upright, space), None
            pixel_aspect = 1.0 / pixel_aspect if upright.transposed else pixel_aspect
            upright = Upright(False, False, False)
        height, width = (self.width, self.height) if upright.transposed else (self.height, self.width)
        scale = max(width / (frame.width * pixel_aspect), height / frame.height)
        scaled_w = max(width, round(frame.width * pixel_aspect * scale))
        scaled_h = max(height, round(frame.height * scale))
        shrinks = scaled_h < frame.height or scaled_w < frame.width
        kernel = Interpolation.AREA if shrinks else Interpolation.BICUBIC
        rgb = self.reformatter.reformat(
            frame,
            width=scaled_w,
            height=scaled_h,
            format="rgb24",
            src_colorspace=space,
            dst_colorspace=space,
            interpolation=kernel | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT,
            threads=1,
        ).to_ndarray()
        top, left = (scaled_h - height) // 2, (scaled_w - width) // 2
        return upright(rgb[top : top + height, left : left + width])

    def _cut(self, frame: VideoFrame, upright: Upright, space: Colorspace | None) -> VideoFrame:
        """The crop of a frame, upright, in its own pixels: scaled with the rest, what is cut off would bleed in."""
        assert self.crop is not None
        crop = self.crop
        rgb = self.reformatter.reformat(
            frame,
            format="rgb24",
            src_colorspace=space,
            dst_colorspace=space,
            interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT,
            threads=1,
        ).to_ndarray()
        cut = upright(rgb)[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        if cut.shape[:2] != (crop.height, crop.width) or not cut.size:
            raise MediaError(
                "damaged", f"crop {crop} reaches beyond the upright picture of {frame.height} x {frame.width} pixels"
            )
        return av.VideoFrame.from_ndarray(np.ascontiguousarray(cut, np.uint8), format="rgb24")
