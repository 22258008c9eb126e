"""A clip in memory, what a file's header says of it, and the error of one that cannot be had."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ovi.errors import OviError


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
