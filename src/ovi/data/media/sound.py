"""Sound of a clip: decoded samples placed by their timestamps, mixed to mono, at the rate asked for."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np

from ovi.data.media.clip import MediaError
from ovi.data.media.span import Span, ends_early

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame


_GAP_S = 0.015
"""Packets that are later than this, or than most of their own length, are behind a gap: some were lost."""
_AVERAGED, _AGREEING = 32, 8
"""Packets whose timestamps are averaged to tell drift from jitter, and those of them that then say where to go on."""


class Sound:
    """Places decoded sound by its timestamps and resamples the clip's span of it."""

    def __init__(self, stream: Any, span: Span, begin_s: float) -> None:
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
        self.off = deque[int](maxlen=_AVERAGED)
        self.began: int | None = None
        self.heard = False

    @property
    def complete(self) -> bool:
        """Whether the clip's span and the resampler's context are there."""
        return self.next is not None and self.next - self.first >= len(self.buffer)

    @property
    def began_late(self) -> bool:
        """Whether the first sound that decoded lies behind the clip's start."""
        return self.began is not None and self.began > self.first + self.margin + 1

    def add(self, frame: AudioFrame) -> None:
        """Take the next decoded samples.

        Raises:
            MediaError: ``unreadable``, where the rate changes.
        """
        if frame.sample_rate != self.rate:
            raise MediaError("unreadable", f"the sound's rate changes from {self.rate} to {frame.sample_rate} Hz")
        samples = _mono(frame)
        at = self.next
        if frame.pts is not None and frame.time_base is not None:
            at = self._placed(round(frame.pts * frame.time_base * self.rate), len(samples), float(frame.time_base))
        if at is None:
            at = self.first + self.margin
        self.began = at if self.began is None else self.began
        begin = at - self.first
        low, high = max(0, begin), min(len(self.buffer), begin + len(samples))
        if low < high:
            self.buffer[low:high] = samples[low - begin : high - begin]
            self.heard = self.heard or (high > self.margin and low < self.margin + self.needed)
        self.next = at + len(samples)

    def _placed(self, stamped: int, length: int, tick_s: float) -> int:
        """Where samples go that a timestamp puts at ``stamped``.

        Rounded or jittering timestamps must not tear continuous sound apart: it goes on until they are off by more
        than a packet may lack, or, on average over some, by more than their own tick.
        """
        if self.next is None:
            return stamped
        self.off.append(stamped - self.next)
        slack = max(2.0 * tick_s, 0.002) * self.rate
        if abs(self.off[-1]) > max(slack, min(_GAP_S * self.rate, 0.75 * length)):
            at = stamped
        elif abs(sum(self.off)) > slack * _AVERAGED:  # those that are not there yet count as right
            at = self.next + int(np.median(list(self.off)[-_AGREEING:]))
        else:
            return self.next
        self.off.clear()
        return at

    def finish(self, path: str | Path, promised_s: float, start_s: float) -> np.ndarray:
        """The clip's waveform, float32 [N] in -1..1, when the file has no more.

        Args:
            path: for messages.
            promised_s: end of the streams by the header, in seconds after the first picture.
            start_s: of the clip, likewise.

        Raises:
            MediaError: ``truncated``, ``too_short`` or ``no_audio``.
        """
        needs_s = start_s + self.span.duration_s
        end = (self.next - self.first if self.next is not None else 0) - self.margin
        if end < self.needed - self.rate / self.span.fps - 1:
            raise ends_early(path, "the sound", max(0.0, start_s + end / self.rate), needs_s, promised_s, start_s)
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
