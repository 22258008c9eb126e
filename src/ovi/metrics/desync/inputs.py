"""What Synchformer reads, as av-benchmark prepares it: segments of pictures, and their spectrograms."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ovi.metrics.frame_rate import frames_at
from ovi.metrics.sound import resampled

FPS = 25.0
SAMPLE_RATE = 16000
SEGMENT_FRAMES, FRAME_STEP = 16, 8
SEGMENT_SAMPLES, SAMPLE_STEP = 10240, 5120
_N_FFT, _WINDOW, _HOP = 1024, 400, 160
_MEAN, _STD = -4.2677393, 4.5689974
"""Of AudioSet's log mel spectrograms, as AST was trained with."""


def num_segments(num_frames: int, num_samples: int) -> int:
    """Segments of 0.64 s, every 0.32 s, that so many frames at 25 fps and samples at 16 kHz hold."""
    return max(
        0,
        min(
            (num_frames - SEGMENT_FRAMES) // FRAME_STEP + 1,
            (num_samples - SEGMENT_SAMPLES) // SAMPLE_STEP + 1,
        ),
    )


def prepared(
    frames: np.ndarray, waveform: np.ndarray, *, fps: float, sample_rate: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """(frames at 25 fps, waveform at 16 kHz, segments of both)."""
    pictures, sound = frames_at(frames, fps, FPS), resampled(waveform, sample_rate, SAMPLE_RATE)
    return pictures, sound, num_segments(len(pictures), len(sound))


def picture_segments(frames: np.ndarray, numbers: range, side: int = 224) -> Tensor:
    """Pictures in -1..1, the shorter side resized to ``side`` and the middle cut out.

    Args:
        frames: uint8 [T, H, W, 3] at 25 fps.
        numbers: of the segments.
        side: in pixels.

    Returns:
        [segments, 16, 3, side, side].
    """
    begin = numbers.start * FRAME_STEP
    cut = frames[begin : (numbers.stop - 1) * FRAME_STEP + SEGMENT_FRAMES]
    high, wide = cut.shape[1:3]
    short = min(high, wide)
    size = (side * high // short, side * wide // short)
    top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
    pictures = torch.empty(len(cut), 3, side, side)
    for n, frame in enumerate(cut):  # one at a time: a full-size clip in floats would not fit
        picture = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
        if (high, wide) != size:
            picture = F.interpolate(picture, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        pictures[n] = picture[0, :, top : top + side, left : left + side]
    pictures = pictures / 127.5 - 1.0
    return torch.stack([pictures[n * FRAME_STEP : n * FRAME_STEP + SEGMENT_FRAMES] for n in range(len(numbers))])


def sound_segments(waveform: np.ndarray, numbers: range, *, bands: int = 128, mel_frames: int = 66) -> Tensor:
    """Log mel spectrograms, normalised.

    Power of windows of 25 ms (periodic Hann) in transforms of 1024, centred every 10 ms with reflection at the ends of
    the segment; triangles in Hz, edges even in HTK's mel from 0 Hz to half the rate. One frame of zeros follows the 65
    a segment has, as in the published code.

    Args:
        waveform: [N] at 16 kHz.
        numbers: of the segments.
        bands, mel_frames: size of each.

    Returns:
        [segments, bands, mel_frames].
    """
    pieces = torch.stack(
        [
            torch.from_numpy(np.ascontiguousarray(waveform[n * SAMPLE_STEP : n * SAMPLE_STEP + SEGMENT_SAMPLES]))
            for n in numbers
        ]
    ).float()
    window = torch.hann_window(_WINDOW)
    spectrum = torch.stft(pieces, _N_FFT, _HOP, _WINDOW, window, center=True, pad_mode="reflect", return_complex=True)
    power = spectrum.abs().square()  # [segments, bins, frames]
    loud = (_mel_filters(bands).T @ power + 1e-6).log()[..., :mel_frames]
    return (F.pad(loud, (0, mel_frames - loud.shape[-1])) - _MEAN) / (2.0 * _STD)


def _mel_filters(bands: int) -> Tensor:
    """[bins, bands], height 1."""
    top = 2595.0 * np.log10(1.0 + SAMPLE_RATE / 2 / 700.0)
    edges = 700.0 * (10.0 ** (np.linspace(0.0, top, bands + 2) / 2595.0) - 1.0)
    hz = np.linspace(0.0, SAMPLE_RATE / 2, _N_FFT // 2 + 1)[:, None]
    rise = (hz - edges[:-2]) / np.diff(edges)[:-1]
    fall = (edges[2:] - hz) / np.diff(edges)[1:]
    return torch.from_numpy(np.maximum(0.0, np.minimum(rise, fall))).float()
