"""Opening a media file and finding its streams."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import av

from ovi.data.media.clip import MediaError

if TYPE_CHECKING:
    from av.container import InputContainer

SMALL_PIXELS = 640 * 384
"""Pictures up to this size decode faster without starting threads."""


def open_media(path: str | Path) -> InputContainer:
    """Open a file to read.

    Raises:
        MediaError: ``unreadable``.
    """
    try:
        return av.open(str(path), mode="r", metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError("unreadable", f"{path}: cannot be opened as a media file ({error})") from error


def video_stream(container: InputContainer) -> Any:
    """The first stream of pictures that can be decoded; a cover picture is none. None where there is none."""
    cover = av.stream.Disposition.attached_pic
    return next((s for s in container.streams.video if not s.disposition & cover and s.codec_context), None)


def audio_stream(container: InputContainer) -> Any:
    """The first stream of sound that can be decoded; None where there is none."""
    return next((s for s in container.streams.audio if s.codec_context and s.rate), None)
