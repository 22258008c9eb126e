"""Media files in and out: pictures and sound of one span of time, sample-accurate, through PyAV.

Time is the file's presentation time, counted from the first picture: edit lists, codec priming and streams that start
at different times are honoured, because everything is placed by timestamp and nothing by counting. Frame n of a clip
lasts from n/fps to (n+1)/fps and shows what the source shows at the middle of that span, so there is no drift between
rates, and a source at the clip's own rate is taken frame for frame.
"""

from __future__ import annotations

import contextlib
import math
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from ovi.errors import OviError

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.container import InputContainer
    from av.video.frame import VideoFrame

VariableFrameRate = Literal["reject", "resample"]
WithoutSound = Literal["reject", "silence"]

_AAC_RATES = (7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
_SEEK_FROM_S = 1.0
"""Earlier starts are reached by decoding on: cheaper than a seek, and exact in every container."""
_PREROLL_S = 0.25
"""Sound decoded ahead of a clip: transform codecs need one or two packets before their output is right."""
_SMALL_PIXELS = 640 * 384
"""Pictures up to this size decode faster without starting threads."""


class MediaError(OviError):
    """A media file that cannot give the clip asked for.

    Args:
        reason: short code to count by: ``unreadable``, ``no_video``, ``no_audio``, ``truncated``, ``damaged``,
            ``too_short``, ``variable_frame_rate``, ``late_picture``.
        message: what came, what was expected and which knob to turn.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)  # both in args: the error crosses process borders by pickle
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class MediaInfo:
    """What a file's header says; a stream that is missing has zeros.

    Attributes:
        width, height: of the decoded pictures in pixels, before rotation.
        fps: average picture rate, frames per second.
        num_frames: as counted by the container, else duration times rate.
        duration_s: of the picture, else of the sound, in seconds.
        sample_rate: of the sound, in Hz.
        audio_channels: of the sound.
        has_video, has_audio: whether there is such a stream (a cover picture is no video).
        video_codec, audio_codec: names of the codecs, empty without a stream.
    """

    width: int
    height: int
    fps: float
    num_frames: int
    duration_s: float
    sample_rate: int
    audio_channels: int
    has_video: bool
    has_audio: bool
    video_codec: str
    audio_codec: str
    audio_duration_s: float = 0.0


@dataclass(frozen=True)
class Crop:
    """A rectangle of a file's pictures, in pixels of the upright picture.

    Attributes:
        top, left: rows and columns cut off above and to the left.
        height, width: of what is left.
    """

    top: int
    left: int
    height: int
    width: int


@dataclass
class Clip:
    """Pictures and the sound that goes with them.

    Attributes:
        frames: uint8 [T, H, W, 3], RGB; frame n lasts from n/fps to (n+1)/fps. [T, 0, 0, 3] for sound alone.
        waveform: float32 [N], mono, in -1..1; sample n is at n/sample_rate. No samples for pictures alone.
        fps: frames per second.
        sample_rate: samples per second, in Hz.
    """

    frames: np.ndarray
    waveform: np.ndarray
    fps: float
    sample_rate: int

    @property
    def duration_s(self) -> float:
        """Length of the picture in seconds."""
        return len(self.frames) / self.fps


def probe(path: str | Path) -> MediaInfo:
    """Read a file's header, decoding nothing.

    The time stamps of all its packets are read where the header gives no length, as in what was written live.

    Raises:
        MediaError: ``unreadable``.
    """
    with _open(path) as container:
        video, audio = _video_stream(container), _audio_stream(container)
        durations = [float(s.duration * s.time_base) for s in (video, audio) if s is not None and s.duration]
        if not durations and container.duration:
            durations = [container.duration / av.time_base]
        main = video if video is not None else audio
        if not durations and main is not None:
            durations = [_stamped_s(container, main)]
        duration_s = durations[0] if durations else 0.0
        fps = float(video.average_rate or video.guessed_rate or 0) if video is not None else 0.0
        return MediaInfo(
            width=video.width if video is not None else 0,
            height=video.height if video is not None else 0,
            fps=fps,
            num_frames=(video.frames or round(duration_s * fps)) if video is not None else 0,
            duration_s=duration_s,
            sample_rate=audio.rate or 0 if audio is not None else 0,
            audio_channels=audio.channels if audio is not None else 0,
            has_video=video is not None,
            has_audio=audio is not None,
            video_codec=video.codec_context.name if video is not None else "",
            audio_codec=audio.codec_context.name if audio is not None else "",
            audio_duration_s=float(audio.duration * audio.time_base) if audio is not None and audio.duration else 0.0,
        )


def _stamped_s(container: InputContainer, stream: Any) -> float:
    """Length of a stream in seconds by its packets' time stamps, nothing decoded; 0 for one without."""
    begin: float | None = None
    stamps: list[float] = []
    lasts = 0.0
    # What is cut off ends where its last whole packet ends.
    with contextlib.suppress(av.FFmpegError, OSError):
        for packet in container.demux(stream):
            if packet.pts is None:
                continue
            at = float(packet.pts * packet.time_base)
            begin = at if begin is None else min(begin, at)
            stamps = sorted([*stamps, at])[-2:]
            if at == stamps[-1]:
                lasts = float((packet.duration or 0) * packet.time_base)
    if begin is None:
        return 0.0
    return stamps[-1] - begin + (lasts or (stamps[-1] - stamps[0]))


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
    span = _Span(fps, num_frames, height, width, sample_rate, variable_frame_rate, without_sound, crop)
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
    span = _Span(fps, num_frames, height, width, sample_rate, variable_frame_rate)
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


def write_clip(path: str | Path, clip: Clip, *, crf: float = 12.0, preset: str = "medium") -> None:
    """Write a clip as H.264 (yuv420p, a key frame every second) and AAC, complete or not at all.

    Args:
        path: ends in .mp4, .mov or .mkv.
        clip: pictures of even height and width; its fps is written as an exact fraction.
        crf: H.264 quality, 0 (lossless but for the colour format) to 51; the default is hard to tell from the source.
        preset: x264's trade of speed for size.

    Raises:
        OviError: for pictures, sound or rates that the codecs cannot take.
        OSError: when writing fails; no partial file is left then.
    """
    path = Path(path)
    frames, waveform = _checked(path, clip)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        _encode(temporary, frames, waveform, clip, crf, preset)
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    except av.FFmpegError as error:
        raise OSError(error.errno, f"writing {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Span:
    """What every clip read in one call has in common."""

    fps: float
    num_frames: int
    height: int
    width: int
    sample_rate: int
    variable_frame_rate: VariableFrameRate
    without_sound: WithoutSound = "reject"
    crop: Crop | None = None

    def __post_init__(self) -> None:
        may_be_absent = {"height": not self.width, "width": not self.height, "sample_rate": self.height > 0}
        for name in ("fps", "num_frames", "height", "width", "sample_rate"):
            value = getattr(self, name)
            if not value > 0 and not (value == 0 and may_be_absent.get(name, False)):
                raise OviError(f"{name} must be positive, got {value!r}")
        if self.without_sound not in ("reject", "silence"):
            raise OviError(f"without_sound is 'reject' or 'silence', got {self.without_sound!r}")
        if self.variable_frame_rate not in ("reject", "resample"):
            raise OviError(f"variable_frame_rate is 'reject' or 'resample', got {self.variable_frame_rate!r}")

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.fps

    @property
    def num_samples(self) -> int:
        return round(self.num_frames * self.sample_rate / self.fps)


def _open(path: str | Path) -> InputContainer:
    try:
        return av.open(str(path), mode="r", metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError("unreadable", f"{path}: cannot be opened as a media file ({error})") from error


def _video_stream(container: InputContainer) -> Any:
    cover = av.stream.Disposition.attached_pic
    return next((s for s in container.streams.video if not s.disposition & cover and s.codec_context), None)


def _audio_stream(container: InputContainer) -> Any:
    return next((s for s in container.streams.audio if s.codec_context and s.rate), None)


def _read(path: str | Path, span: _Span, start_s: float) -> Clip:
    if start_s < 0:
        raise OviError(f"{path}: start_s must not be negative, got {start_s!r}")
    if start_s >= _SEEK_FROM_S:
        try:
            with _open(path) as container:
                return _decode(path, container, span, start_s, seek=True)
        except MediaError as error:
            # Some containers (MPEG-TS) seek to packets behind the clip's start, or to pictures without their key frame.
            if error.reason not in ("late_picture", "truncated", "no_audio"):
                raise
    with _open(path) as container:
        return _decode(path, container, span, start_s, seek=False)


def _decode(path: str | Path, container: InputContainer, span: _Span, start_s: float, *, seek: bool) -> Clip:
    video = _video_stream(container) if span.height else None
    audio = _audio_stream(container) if span.sample_rate else None
    both = span.height and span.sample_rate
    if video is None and span.height:
        needs = ", and a clip needs both picture and sound" if both else ""
        raise MediaError("no_video", f"{path}: has no video stream{needs}")
    if audio is None and span.sample_rate and span.without_sound == "reject":
        needs = ", and a clip needs both picture and sound" if both else ""
        raise MediaError("no_audio", f"{path}: has no audio stream{needs}")
    if video is not None:
        video.codec_context.thread_type = "AUTO"
        if video.width * video.height <= _SMALL_PIXELS:
            video.codec_context.thread_count = 1
    if audio is not None:
        audio.codec_context.thread_count = 1

    # Time counts from the first picture; where there is none, from the first sound.
    first = video if video is not None else audio
    origin_s = float((first.start_time or 0) * first.time_base) if first is not None else 0.0
    begin_s = origin_s + start_s
    if seek:
        # A container that cannot seek is decoded from its start.
        with contextlib.suppress(av.FFmpegError):
            container.seek(int((begin_s - _PREROLL_S) * av.time_base), backward=True)
    pictures = None if video is None else _Pictures(path, video, span, begin_s)
    sound = None if audio is None else _Sound(audio, span, begin_s)
    try:
        for packet in container.demux(*(stream for stream in (video, audio) if stream is not None)):
            track: Any = pictures if video is not None and packet.stream.index == video.index else sound
            if not track.complete:
                for frame in packet.decode():
                    track.add(frame)
            if (pictures is None or pictures.complete) and (sound is None or sound.complete):
                break
    except (av.FFmpegError, OSError) as error:
        raise MediaError("truncated", f"{path}: decoding stopped before the clip's end ({error})") from error
    if seek and video is None and sound is not None and sound.began_late:
        # Read again from the file's start: what was sought past would become silence.
        raise MediaError("truncated", f"{path}: the place at {start_s:.3f} s cannot be sought")
    promised_s = _promised_end_s(container, video, audio) - origin_s
    no_frames = np.empty((span.num_frames, 0, 0, 3), np.uint8)
    frames = no_frames if pictures is None else pictures.finish(promised_s, start_s)
    silence = np.zeros(span.num_samples, np.float32)
    waveform = silence if sound is None else sound.finish(path, promised_s, start_s)
    return Clip(frames, waveform, span.fps, span.sample_rate)


def _promised_end_s(container: InputContainer, video: Any, audio: Any) -> float:
    """Presentation time up to which the header says both streams last; 0 when it says nothing."""
    streams = [s for s in (video, audio) if s is not None and s.duration]
    ends = [float((s.duration + (s.start_time or 0)) * s.time_base) for s in streams]
    if not ends and container.duration:
        ends = [((container.start_time or 0) + container.duration) / av.time_base]
    return min(ends, default=0.0)


def _short(path: str | Path, what: str, has_s: float, needs_s: float, promised_s: float, start_s: float) -> MediaError:
    """The error for a stream that ends early: its header tells a damaged file from a short one."""
    if promised_s >= needs_s:
        return MediaError(
            "truncated",
            f"{path}: {what} ends {has_s:.3f} s in, though the header promises {promised_s:.3f} s; "
            "the file is cut off or damaged",
        )
    return MediaError(
        "too_short",
        f"{path}: {what} ends {has_s:.3f} s in, but the clip lasts from {start_s:.3f} to {needs_s:.3f} s; "
        "lower num_frames or start_s",
    )


class _Pictures:
    """Takes decoded frames in order and keeps those that show at the centres of the clip's frames."""

    def __init__(self, path: str | Path, stream: Any, span: _Span, begin_s: float) -> None:
        self.path, self.stream, self.span, self.begin_s = path, stream, span, begin_s
        self.frames = np.empty((span.num_frames, span.height, span.width, 3), np.uint8)
        self.taken = 0
        self.times_s: list[float] = []
        self.showing: VideoFrame | None = None
        self.last_duration_s = 0.0
        self.resize = _Resize(span.height, span.width, stream.sample_aspect_ratio, span.crop)

    @property
    def complete(self) -> bool:
        return self.taken == self.span.num_frames

    def add(self, frame: VideoFrame) -> None:
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
        needs_s = start_s + self.span.duration_s
        if self.showing is None:
            raise _short(self.path, "the picture", 0.0, needs_s, promised_s, start_s)
        if not self.complete:
            steps = np.diff(self.times_s)
            rate = self.stream.average_rate
            lasts_s = self.last_duration_s or (
                float(np.median(steps)) if len(steps) else float(1 / rate) if rate else 0
            )
            end_s = self.times_s[-1] + lasts_s
            self._take_until(end_s + 1 / self.span.fps)
            if not self.complete:
                raise _short(self.path, "the picture", end_s - self.begin_s + start_s, needs_s, promised_s, start_s)
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


class _Resize:
    """Scales to cover height x width with the aspect kept, turns upright, and cuts about the centre."""

    def __init__(self, height: int, width: int, pixel_aspect: Fraction | None, crop: Crop | None = None) -> None:
        self.height, self.width, self.crop = height, width, crop
        self.pixel_aspect = float(pixel_aspect) if pixel_aspect else 1.0
        self.reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        turns = round(frame.rotation / 90) % 4  # anticlockwise, as numpy turns
        pixel_aspect = self.pixel_aspect
        # Untagged pictures follow the custom of players: BT.709 from 720 lines on, BT.601 below.
        untagged = frame.colorspace not in (1, 4, 5, 6, 7, 9)
        space = (Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601) if untagged else None
        if self.crop is not None:
            frame, space = self._cut(frame, turns, space), None
            turns, pixel_aspect = 0, 1.0 / pixel_aspect if turns % 2 else pixel_aspect
        height, width = (self.width, self.height) if turns % 2 else (self.height, self.width)
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
        return np.rot90(rgb[top : top + height, left : left + width], turns)

    def _cut(self, frame: VideoFrame, turns: int, space: Colorspace | None) -> VideoFrame:
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
        cut = np.rot90(rgb, turns)[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        if cut.shape[:2] != (crop.height, crop.width) or not cut.size:
            raise MediaError(
                "damaged", f"crop {crop} reaches beyond the upright picture of {frame.height} x {frame.width} pixels"
            )
        return av.VideoFrame.from_ndarray(np.ascontiguousarray(cut, np.uint8), format="rgb24")


class _Sound:
    """Places decoded sound by its timestamps and resamples the clip's span of it."""

    def __init__(self, stream: Any, span: _Span, begin_s: float) -> None:
        self.stream, self.span = stream, span
        self.rate = int(stream.rate)
        common = math.gcd(self.rate, span.sample_rate)
        # Context for the resampler's filter on both sides, a whole number of samples at either rate.
        unit = self.rate // common
        self.margin = unit * math.ceil(64 * max(1.0, self.rate / span.sample_rate) / unit)
        self.first = round(begin_s * self.rate) - self.margin
        self.needed = math.ceil(span.num_samples * self.rate / span.sample_rate)
        self.buffer = np.zeros(self.needed + 2 * self.margin, np.float32)
        self.next: int | None = None
        self.began: int | None = None
        self.heard = False

    @property
    def complete(self) -> bool:
        return self.next is not None and self.next - self.first >= len(self.buffer)

    @property
    def began_late(self) -> bool:
        """Whether the first sound that decoded lies behind the clip's start."""
        return self.began is not None and self.began > self.first + self.margin + 1

    def add(self, frame: AudioFrame) -> None:
        if frame.sample_rate != self.rate:
            raise MediaError("unreadable", f"the sound's rate changes from {self.rate} to {frame.sample_rate} Hz")
        samples = _mono(frame)
        at = self.next
        if frame.pts is not None and frame.time_base is not None:
            stamped = round(frame.pts * frame.time_base * self.rate)
            # Rounded timestamps must not tear continuous sound apart: trust them only beyond their own tick.
            slack = max(2.0 * float(frame.time_base), 0.002) * self.rate
            if at is None or abs(stamped - at) > slack:
                at = stamped
        if at is None:
            at = self.first + self.margin
        self.began = at if self.began is None else self.began
        begin = at - self.first
        low, high = max(0, begin), min(len(self.buffer), begin + len(samples))
        if low < high:
            self.buffer[low:high] = samples[low - begin : high - begin]
            self.heard = self.heard or (high > self.margin and low < self.margin + self.needed)
        self.next = at + len(samples)

    def finish(self, path: str | Path, promised_s: float, start_s: float) -> np.ndarray:
        needs_s = start_s + self.span.duration_s
        end = (self.next - self.first if self.next is not None else 0) - self.margin
        if end < self.needed - self.rate / self.span.fps - 1:
            raise _short(path, "the sound", max(0.0, start_s + end / self.rate), needs_s, promised_s, start_s)
        if not self.heard:
            raise MediaError("no_audio", f"{path}: no sound between {start_s:.3f} and {needs_s:.3f} s; change start_s")
        if self.rate == self.span.sample_rate:
            skip, wave = self.margin, self.buffer
        else:
            skip = self.margin * self.span.sample_rate // self.rate
            wave = _resampled(self.buffer, self.rate, self.span.sample_rate)
        out = wave[skip : skip + self.span.num_samples]
        return np.clip(out, -1.0, 1.0).astype(np.float32)


def _mono(frame: AudioFrame) -> np.ndarray:
    """Samples [N] of a decoded frame, channels mixed as ITU-R BS.775 folds to stereo, scaled so that none can clip."""
    samples = frame.to_ndarray()
    channels = frame.layout.nb_channels
    if not frame.format.is_planar:
        samples = samples.reshape(-1, channels).T
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128.0) / 128.0
    elif samples.dtype.kind == "i":
        samples = samples.astype(np.float32) / 2.0 ** (8 * samples.dtype.itemsize - 1)
    if channels == 1:
        return samples[0].astype(np.float32)
    shares = {"FL": 1.0, "FR": 1.0, "FC": math.sqrt(2.0), "LFE": 0.0, "LFE2": 0.0}
    weights = np.array([shares.get(c.name, math.sqrt(0.5)) for c in frame.layout.channels], np.float32)
    if len(weights) != channels or weights.sum() == 0:
        weights = np.ones(channels, np.float32)
    return (weights / weights.sum()) @ samples.astype(np.float32)


def _resampled(wave: np.ndarray, source_rate: int, sample_rate: int) -> np.ndarray:
    """Mono samples at another rate; sample 0 stays sample 0 (swresample's filter is centred)."""
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[None]), format="fltp", layout="mono")
    frame.sample_rate, frame.pts = source_rate, 0
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=sample_rate)
    parts = [part.to_ndarray()[0] for part in (*resampler.resample(frame), *resampler.resample(None))]
    return np.concatenate(parts)


# --- writing ---------------------------------------------------------------------------------------------------------


def _checked(path: Path, clip: Clip) -> tuple[np.ndarray, np.ndarray]:
    frames, waveform = np.asarray(clip.frames), np.asarray(clip.waveform)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise OviError(f"{path}: frames must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise OviError(f"{path}: H.264 needs even height and width, got {frames.shape[1]}x{frames.shape[2]}")
    if waveform.ndim != 1 or not len(waveform) or not np.isfinite(waveform).all():
        raise OviError(f"{path}: waveform must be finite and of shape [N], got {list(waveform.shape)}")
    if clip.sample_rate not in _AAC_RATES:
        raise OviError(f"{path}: AAC has no {clip.sample_rate} Hz; set sample_rate to one of {_AAC_RATES}")
    if path.suffix not in (".mp4", ".mov", ".mkv"):
        raise OviError(f"{path}: clips are written as .mp4, .mov or .mkv, got {path.suffix!r}")
    return frames, np.clip(waveform, -1.0, 1.0).astype(np.float32)


def _encode(path: Path, frames: np.ndarray, waveform: np.ndarray, clip: Clip, crf: float, preset: str) -> None:
    rate = Fraction(clip.fps).limit_denominator(1001)
    options = {"movflags": "+faststart"} if path.suffix != ".mkv" else {}
    with av.open(str(path), "w", options=options) as container:
        # No B-frames: the first picture is then at time 0 for every reader, with no edit list needed.
        settings = {"crf": str(crf), "preset": preset, "bf": "0", "g": str(max(1, round(clip.fps)))}
        video: Any = container.add_stream("libx264", rate=rate, options=settings)
        video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        video.codec_context.time_base = 1 / rate
        video.codec_context.colorspace, video.codec_context.color_range = 6, 1  # BT.601, 16..235
        if frames.shape[1] * frames.shape[2] <= _SMALL_PIXELS:
            video.codec_context.thread_count = 1
        audio: Any = container.add_stream("aac", rate=clip.sample_rate, layout="mono")
        audio.bit_rate = 5 * clip.sample_rate
        reformatter = VideoReformatter()
        packet_samples, fed = 0, 0
        for number, picture in enumerate(frames):
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = reformatter.reformat(
                rgb,
                format="yuv420p",
                dst_colorspace=Colorspace.ITU601,
                interpolation=Interpolation.AREA | Interpolation.ACCURATE_RND,
                threads=1,
            )
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(video.encode(frame))
            # Sound up to this picture's end goes in beside it, so that a reader finds both close together.
            packet_samples = packet_samples or audio.codec_context.frame_size or 1024
            due = len(waveform) if number == len(frames) - 1 else int((number + 1) / clip.fps * clip.sample_rate)
            while fed < len(waveform) and (fed + packet_samples <= due or number == len(frames) - 1):
                piece = waveform[fed : fed + packet_samples]
                part = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece[None]), format="fltp", layout="mono")
                part.sample_rate, part.pts, part.time_base = clip.sample_rate, fed, Fraction(1, clip.sample_rate)
                container.mux(audio.encode(part))
                fed += len(piece)
        container.mux(video.encode(None))
        container.mux(audio.encode(None))


def _flush_to_disk(path: Path) -> None:
    """Bytes must be on the disk before the rename makes them the file."""
    with open(path, "rb") as written:
        os.fsync(written.fileno())
