"""Mel-frequency cepstra as SyncNet was trained on them: those of python_speech_features 0.6 at its defaults."""

from __future__ import annotations

import numpy as np
from scipy.fft import dct

SAMPLE_RATE = 16000
_WINDOW, _HOP, _N_FFT = 400, 160, 512
_FILTERS, _KEPT, _LIFTER = 26, 13, 22
_PREEMPHASIS = 0.97


def cepstra(waveform: np.ndarray) -> np.ndarray:
    """Cepstra every 10 ms of windows of 25 ms; the first is the log energy of its window.

    No window function; triangles between whole bins of the transform; the last window is filled up with zeros.

    Args:
        waveform: [N] at 16 kHz, -1..1: taken as 16-bit integers, since the log energy depends on the scale.

    Returns:
        float64 [windows, 13].
    """
    wave = np.round(np.clip(np.asarray(waveform, np.float64), -1.0, 1.0) * 32767.0)
    wave = np.concatenate([wave[:1], wave[1:] - _PREEMPHASIS * wave[:-1]])
    count = 1 + max(0, -(-(len(wave) - _WINDOW) // _HOP))
    wave = np.pad(wave, (0, max(0, (count - 1) * _HOP + _WINDOW - len(wave))))
    pieces = np.lib.stride_tricks.sliding_window_view(wave, _WINDOW)[::_HOP][:count]
    power = np.abs(np.fft.rfft(pieces, _N_FFT)) ** 2 / _N_FFT
    least = np.finfo(float).eps
    bands, energy = power @ _filters().T, power.sum(1)
    kept = dct(np.log(np.where(bands == 0, least, bands)), norm="ortho")[:, :_KEPT]
    kept *= 1.0 + _LIFTER / 2.0 * np.sin(np.pi * np.arange(_KEPT) / _LIFTER)
    kept[:, 0] = np.log(np.where(energy == 0, least, energy))
    return kept


def _filters() -> np.ndarray:
    """[filters, bins]."""
    mels = np.linspace(0.0, 2595.0 * np.log10(1.0 + SAMPLE_RATE / 2 / 700.0), _FILTERS + 2)
    edges = np.floor((_N_FFT + 1) * 700.0 * (10.0 ** (mels / 2595.0) - 1.0) / SAMPLE_RATE)
    bins = np.arange(_N_FFT // 2 + 1)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    with np.errstate(divide="ignore", invalid="ignore"):  # narrow filters may have an empty side
        rise, fall = (bins - low) / (middle - low), (high - bins) / (high - middle)
    return np.where((bins >= low) & (bins < middle), rise, np.where((bins >= middle) & (bins < high), fall, 0.0))
