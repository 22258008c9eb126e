"""What a file says of itself, nothing decoded."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av

from ovi.data.media.clip import MediaInfo
from ovi.data.media.container import audio_stream, open_media, video_stream

if TYPE_CHECKING:
    from av.container import InputContainer


def probe(path: str | Path) -> MediaInfo:
    """Read a file's header, decoding nothing.

    The time stamps of all its packets are read where the header gives no length, as in what was written live.

    Raises:
        MediaError: ``unreadable``.
    """
    with open_media(path) as container:
        video, audio = video_stream(container), audio_stream(container)
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
