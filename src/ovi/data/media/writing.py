"""Clips into files, complete or not at all."""

from __future__ import annotations

import os
import uuid
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from ovi.data.media.clip import Clip
from ovi.data.media.container import SMALL_PIXELS
from ovi.errors import OviError

_AAC_RATES = (7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)


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
        if frames.shape[1] * frames.shape[2] <= SMALL_PIXELS:
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
