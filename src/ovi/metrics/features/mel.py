"""Mel spectrograms as the networks that read them were trained on: each to its own convention."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def magnitudes(waveform: Tensor, *, n_fft: int, window: int, hop: int, padding: str | None) -> Tensor:
    """Magnitude of the short-time Fourier transform with a periodic Hann window.

    Args:
        waveform: [N].
        n_fft: length of the transform; a shorter window is zero-padded at its end.
        window: samples of a window.
        hop: samples from window to window.
        padding: how the sound goes on beyond its ends, so that window n is centred at sample n * hop: ``constant``
            (zeros) or ``reflect``; None begins the first window at sample 0 and drops what fills none.

    Returns:
        [windows, n_fft // 2 + 1].
    """
    if padding is not None:
        waveform = F.pad(waveform[None, None], (n_fft // 2, n_fft // 2), mode=padding)[0, 0]
    pieces = waveform.unfold(0, window, hop) * torch.hann_window(window, device=waveform.device)
    return torch.fft.rfft(pieces, n_fft).abs()


def slaney_mel(num_bands: int, *, n_fft: int, sample_rate: int, low_hz: float, high_hz: float) -> Tensor:
    """Filters [n_fft // 2 + 1, bands] of unit area, triangles in Hz between edges that are even in Slaney's mel.

    M. Slaney, Auditory Toolbox, 1998: linear up to 1 kHz at 200/3 Hz a mel, then 27 mels to a factor of 6.4.
    """
    step = np.log(6.4) / 27.0

    def mel(hz: float) -> float:
        return hz / (200.0 / 3.0) if hz < 1000.0 else 15.0 + np.log(hz / 1000.0) / step

    mels = np.linspace(mel(low_hz), mel(high_hz), num_bands + 2)
    edges = np.where(mels < 15.0, mels * (200.0 / 3.0), 1000.0 * np.exp((mels - 15.0) * step))
    filters = _triangles(np.linspace(0.0, sample_rate / 2, n_fft // 2 + 1), edges)
    return torch.from_numpy(filters * (2.0 / (edges[2:] - edges[:-2]))).float()


def htk_mel(num_bands: int, *, n_fft: int, sample_rate: int, low_hz: float, high_hz: float) -> Tensor:
    """Filters [n_fft // 2 + 1, bands] of unit height, triangles in HTK's mel, 1127 ln(1 + Hz / 700), none at 0 Hz."""

    def mel(hz: np.ndarray) -> np.ndarray:
        return 1127.0 * np.log1p(hz / 700.0)

    low, high = mel(np.array([low_hz, high_hz]))
    filters = _triangles(mel(np.linspace(0.0, sample_rate / 2, n_fft // 2 + 1)), np.linspace(low, high, num_bands + 2))
    filters[0] = 0.0
    return torch.from_numpy(filters).float()


def _triangles(places: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """[places, edges - 2]: each rises from one edge to the next and falls to the one after."""
    rise = (places[:, None] - edges[:-2]) / np.diff(edges)[:-1]
    fall = (edges[2:] - places[:, None]) / np.diff(edges)[1:]
    return np.maximum(0.0, np.minimum(rise, fall))
