"""Clips out of files, sample-accurate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np

from ovi.data.media.clip import Clip, Crop, MediaError
from ovi.data.media.container import SMALL_PIXELS, audio_stream, open_media, video_stream
from ovi.data.media.pictures import Pictures
from ovi.data.media.sound import Sound
from ovi.data.media.span import Span, VariableFrameRate, WithoutSound
from ovi.errors import OviError

if TYPE_CHECKING:
    from av.container import InputContainer

_SEEK_FROM_S = 1.0
"""Earlier starts are reached by decoding on: cheaper than a seek, and exact in every container."""
_PREROLL_S = (0.25, 10.0)
"""Seconds ahead of a clip that are sought, the second where sound lies farther ahead of its pictures in the file than
the first. Transform codecs need one or two packets before their output is right."""


def read_clip(
    path: str | Path,
    *,
    fps: float,
    num_frames: int,
    height: int,
    width: int,
    sample_rate: int,
    start_s: float = 0.0,
    variable_frame_rate: VariableFrameRate = "reject",
    without_sound: WithoutSound = "reject",
    crop: Crop | None = None,
) -> Clip:
    """Read exactly ``num_frames`` pictures and the ``round(num_frames * sample_rate / fps)`` samples that go with them.

    Pictures keep their aspect: scaled to cover ``height`` x ``width``, then cut about the centre. Sound is mixed to
    mono. Sound that begins after the picture, and gaps in it, are silence.

    Args:
        path: any file FFmpeg reads.
        fps: frames per second of the clip, whatever the file's.
        num_frames: T.
        height, width: in pixels; both 0 for sound alone, as long as T frames, frames [T, 0, 0, 3].
        sample_rate: of the clip's sound, in Hz; 0 for pictures alone, a waveform of no samples.
        start_s: where the clip begins, in seconds after the file's first picture.
        variable_frame_rate: ``reject`` raises for a source whose frames last unequally long within the clip;
            ``resample`` takes it by its timestamps.
        without_sound: ``reject`` raises for a file without a sound track; ``silence`` takes it as silent.
        crop: rectangle taken for the whole picture; None takes all of it.

    Returns:
        The clip. At its end at most one frame may be held, and one frame's time of sound be silence.

    Raises:
        MediaError: with the reason in ``.reason``.
    """
    span = Span(fps, num_frames, height, width, sample_rate, variable_frame_rate, without_sound, crop)
    return _read(path, span, start_s)


def iter_clips(
    path: str | Path,
    *,
    fps: float,
    num_frames: int,
    height: int,
    width: int,
    sample_rate: int,
    stride_s: float | None = None,
    start_s: float = 0.0,
    variable_frame_rate: VariableFrameRate = "reject",
) -> Iterator[tuple[float, Clip]]:
    """Windows of a long file as (start in seconds, clip), until the file ends.

    Args:
        stride_s: from one window's start to the next; None lays them end to end. The others are ``read_clip``'s.

    Raises:
        MediaError: as ``read_clip``, but a last window that is too short just ends the iteration.
    """
    span = Span(fps, num_frames, height, width, sample_rate, variable_frame_rate)
    stride_s = num_frames / fps if stride_s is None else stride_s
    if not stride_s > 0:
        raise OviError(f"stride_s must be positive, got {stride_s!r}")
    window = 0
    while True:
        at_s = start_s + window * stride_s
        # A fresh container for each window: no decoder state survives a window cut short, and opening takes 1 ms.
        try:
            clip = _read(path, span, at_s)
        except MediaError as error:
            if window and error.reason == "too_short":
                return
            raise
        yield at_s, clip
        window += 1


def _read(path: str | Path, span: Span, start_s: float) -> Clip:
    if start_s < 0:
        raise OviError(f"{path}: start_s must not be negative, got {start_s!r}")
    for preroll_s in _PREROLL_S if start_s >= _SEEK_FROM_S else ():
        try:
            with open_media(path) as container:
                return _decode(path, container, span, start_s, preroll_s)
        except MediaError as error:
            # Some containers (MPEG-TS) seek to packets behind the clip's start, or to pictures without their key frame.
            if error.reason not in ("late_picture", "truncated", "no_audio"):
                raise
    with open_media(path) as container:
        return _decode(path, container, span, start_s, None)


def _decode(path: str | Path, container: InputContainer, span: Span, start_s: float, preroll_s: float | None) -> Clip:
    """The clip, decoded from so many seconds ahead of it on, or from the file's start."""
    video = video_stream(container) if span.height else None
    audio = audio_stream(container) if span.sample_rate else None
    both = span.height and span.sample_rate
    if video is None and span.height:
        needs = ", and a clip needs both picture and sound" if both else ""
        raise MediaError("no_video", f"{path}: has no video stream{needs}")
    if audio is None and span.sample_rate and span.without_sound == "reject":
        needs = ", and a clip needs both picture and sound" if both else ""
        raise MediaError("no_audio", f"{path}: has no audio stream{needs}")
    if video is not None:
        video.codec_context.thread_type = "AUTO"
        if video.width * video.height <= SMALL_PIXELS:
            video.codec_context.thread_count = 1
    if audio is not None:
        audio.codec_context.thread_count = 1

    # Time counts from the first picture; where there is none, from the first sound.
    first = video if video is not None else audio
    origin_s = float((first.start_time or 0) * first.time_base) if first is not None else 0.0
    begin_s = origin_s + start_s
    if preroll_s is not None:
        # A container that cannot seek is decoded from its start.
        with contextlib.suppress(av.FFmpegError):
            container.seek(int((begin_s - preroll_s) * av.time_base), backward=True)
    pictures = None if video is None else Pictures(path, video, span, begin_s)
    sound = None if audio is None else Sound(audio, span, begin_s)
    try:
        for packet in container.demux(*(stream for stream in (video, audio) if stream is not None)):
            track: Any = pictures if video is not None and packet.stream.index == video.index else sound
            if not track.complete:
                for frame in packet.decode():
                    track.add(frame)
                late = sound is not None and track is sound and sound.began_late
                if preroll_s is not None and late and _should_sound(audio, begin_s):
                    # To be read again from farther ahead: what was sought past would become silence.
                    raise MediaError("truncated", f"{path}: the place at {start_s:.3f} s cannot be sought")
            if (pictures is None or pictures.complete) and (sound is None or sound.complete):
                break
    except (av.FFmpegError, OSError) as error:
        raise MediaError("truncated", f"{path}: decoding stopped before the clip's end ({error})") from error
    promised_s = _promised_end_s(container, video, audio) - origin_s
    no_frames = np.empty((span.num_frames, 0, 0, 3), np.uint8)
    frames = no_frames if pictures is None else pictures.finish(promised_s, start_s)
    silence = np.zeros(span.num_samples, np.float32)
    waveform = silence if sound is None else sound.finish(path, promised_s, start_s)
    return Clip(frames, waveform, span.fps, span.sample_rate)


def _should_sound(audio: Any, begin_s: float) -> bool:
    """Whether a stream of sound begins before that time, for all that its header says."""
    return audio.start_time is None or float(audio.start_time * audio.time_base) < begin_s


def _promised_end_s(container: InputContainer, video: Any, audio: Any) -> float:
    """Presentation time up to which the header says both streams last; 0 when it says nothing."""
    streams = [s for s in (video, audio) if s is not None and s.duration]
    ends = [float((s.duration + (s.start_time or 0)) * s.time_base) for s in streams]
    if not ends and container.duration:
        ends = [((container.start_time or 0) + container.duration) / av.time_base]
    return min(ends, default=0.0)
