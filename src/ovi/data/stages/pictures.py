"""Pictures of a file as it has them, one after the other: for stages that look at whole files or at their edges."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from ovi.data.media import MediaError
from ovi.data.media.upright import Upright

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

_SEEK_FROM_S = 1.0
_SEEK_AHEAD_S = 4.0
"""Wanted pictures further apart than this are sought, closer ones decoded up to."""


@dataclass(frozen=True)
class Picture:
    """One picture of a file.

    Attributes:
        time_s: when it begins to show, in seconds after the file's first picture.
        duration_s: how long it shows, as the file says; 0 when it does not.
        rgb: uint8 [H, W, 3], upright.
    """

    time_s: float
    duration_s: float
    rgb: np.ndarray


def iter_pictures(
    path: str | Path,
    *,
    start_s: float = 0.0,
    duration_s: float | None = None,
    size: tuple[int, int] | None = None,
) -> Iterator[Picture]:
    """Every picture that begins within a span.

    Args:
        path: any file FFmpeg reads.
        start_s, duration_s: the span; None lasts to the file's end.
        size: (height, width) in pixels to stretch to, whatever the aspect; None leaves them as they are.

    Raises:
        MediaError: ``unreadable``, ``no_video``, or ``truncated`` when decoding stops.
    """
    end_s = None if duration_s is None else start_s + duration_s
    convert = _Convert(size)
    for time_s, frame in _frames(path, start_s):
        if end_s is not None and time_s >= end_s - 1e-4:
            return
        yield Picture(time_s, _lasts_s(frame), convert(frame))


def pictures_at(path: str | Path, times_s: Sequence[float]) -> list[Picture]:
    """The pictures that begin to show at or next after some times, at their own size; fewer where the file ends.

    Args:
        path: any file FFmpeg reads.
        times_s: rising, in seconds after the file's first picture.

    Raises:
        MediaError: as ``iter_pictures``.
    """
    found: list[Picture] = []
    convert = _Convert(None)
    wanted = list(times_s)
    while wanted:
        start_s, last_s = wanted[0], None
        for time_s, frame in _frames(path, start_s):
            found.append(Picture(time_s, _lasts_s(frame), convert(frame)))
            last_s = time_s
            break
        if last_s is None:
            return found
        wanted = [at for at in wanted[1:] if at > last_s + 1e-4]
        near = [at for at in wanted if at - last_s < _SEEK_AHEAD_S]
        if near:
            more, ended = _following(path, last_s, near, convert)
            found += more
            if ended:
                return found
            wanted = [at for at in wanted[len(near) :] if not more or at > more[-1].time_s + 1e-4]
    return found


def upright_size(path: str | Path) -> tuple[int, int, float]:
    """(height, width, aspect) of the first picture as it is shown: in pixels, and width over height seen.

    Raises:
        MediaError: as ``iter_pictures``.
    """
    for _, frame in _frames(path, 0.0):
        turned = Upright.of(frame).transposed
        height, width = (frame.width, frame.height) if turned else (frame.height, frame.width)
        with _opened(path) as (_, stream):
            pixel = float(stream.sample_aspect_ratio or 1.0)
        pixel = 1.0 / pixel if turned else pixel
        return height, width, pixel * width / height
    raise MediaError("unreadable", f"{path}: no picture of it decodes")


class _Convert:
    """Frames as RGB arrays, turned as they are shown."""

    def __init__(self, size: tuple[int, int] | None) -> None:
        self.size = size
        self.reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        upright = Upright.of(frame)
        height, width = self.size or (frame.height, frame.width)
        if upright.transposed and self.size:
            height, width = width, height
        kernel = Interpolation.AREA if height < frame.height or width < frame.width else Interpolation.BICUBIC
        rgb = self.reformatter.reformat(
            frame, width=width, height=height, format="rgb24", interpolation=kernel, threads=1
        ).to_ndarray()
        return np.ascontiguousarray(upright(rgb))


def _lasts_s(frame: VideoFrame) -> float:
    return float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, Any]]:
    try:
        container = av.open(str(path), mode="r", metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError("unreadable", f"{path}: cannot be opened as a media file ({error})") from error
    with container:
        cover = av.stream.Disposition.attached_pic
        stream = next((s for s in container.streams.video if not s.disposition & cover and s.codec_context), None)
        if stream is None:
            raise MediaError("no_video", f"{path}: has no video stream")
        yield container, stream


def _frames(path: str | Path, start_s: float) -> Iterator[tuple[float, VideoFrame]]:
    """(time, frame) from the first that begins at ``start_s`` or later."""
    first = True
    for time_s, frame in _decoded(path, start_s if start_s >= _SEEK_FROM_S else None):
        if first and start_s >= _SEEK_FROM_S and time_s > start_s + 1e-4:
            # Some containers seek to behind the place asked for: then all is decoded from the start.
            yield from ((t, f) for t, f in _decoded(path, None) if t >= start_s - 1e-4)
            return
        first = False
        if time_s >= start_s - 1e-4:
            yield time_s, frame


def _decoded(path: str | Path, seek_s: float | None) -> Iterator[tuple[float, VideoFrame]]:
    with _opened(path) as (container, stream):
        stream.codec_context.thread_type = "AUTO"
        origin_s = float((stream.start_time or 0) * stream.time_base)
        if seek_s is not None:
            # A container that cannot seek is decoded from its start.
            with contextlib.suppress(av.FFmpegError):
                container.seek(int((origin_s + seek_s) * av.time_base), backward=True)
        try:
            for frame in container.decode(stream):
                if frame.pts is not None and frame.time_base is not None:
                    yield float(frame.pts * frame.time_base) - origin_s, frame
        except (av.FFmpegError, OSError) as error:
            raise MediaError("truncated", f"{path}: decoding stopped before the file's end ({error})") from error


def _following(path: str | Path, after_s: float, times_s: list[float], convert: _Convert) -> tuple[list[Picture], bool]:
    """Pictures at times close by, in one go, and whether the file ended before the last of them."""
    found: list[Picture] = []
    waiting = list(times_s)
    for time_s, frame in _frames(path, after_s):
        if waiting and time_s >= waiting[0] - 1e-4:
            found.append(Picture(time_s, _lasts_s(frame), convert(frame)))
            waiting = [at for at in waiting if at > time_s + 1e-4]
        if not waiting:
            return found, False
    return found, True
