"""Pictures of a clip: its frames over its sound, on one axis of time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ovi.data.media import Clip

_WINDOW_S, _STEPS, _FLOOR_DB = 0.032, 8, 60.0


def picture(clip: Clip, *, marks_s: Sequence[float] = (), num_frames: int = 12, max_hz: float | None = None) -> Figure:
    """Some frames of a clip over the spectrogram of its sound, both by the same seconds.

    Args:
        clip: what is shown.
        marks_s: instants marked by a line, such as impacts, in seconds.
        num_frames: frames shown, spread over the clip.
        max_hz: the highest frequency shown; None shows all.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), dpi=100, layout="constrained")
    frames, sound = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.5])
    count = min(num_frames, len(clip.frames))
    edges = np.linspace(0, clip.duration_s, count + 1)
    for left, right in pairwise(edges):
        number = min(int((left + right) / 2 * clip.fps), len(clip.frames) - 1)
        frames.imshow(clip.frames[number], extent=(left, right, 0, 1), aspect="auto", interpolation="nearest")
    frames.set_yticks([])
    times_s, hz, level = spectrogram_db(clip)
    sound.pcolormesh(times_s, hz, level, cmap="magma", vmin=level.max() - _FLOOR_DB, vmax=level.max(), rasterized=True)
    sound.set_ylim(0, max_hz or hz[-1])
    sound.set_ylabel("Hz")
    sound.set_xlabel("seconds")
    for axis in (frames, sound):
        axis.set_xlim(0, clip.duration_s)
        for mark in marks_s:
            axis.axvline(mark, color="cyan", linewidth=1, linestyle="--")
    return figure


def spectrogram_db(clip: Clip) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spectrogram of a clip's sound.

    Returns:
        (times [n] in seconds, frequencies [m] in Hz, level [m, n] in dB); full-scale sines lie at about 0 dB.
    """
    from scipy.signal import ShortTimeFFT

    size = max(32, round(_WINDOW_S * clip.sample_rate))
    wave = np.pad(clip.waveform.astype(np.float64), (0, max(0, size - len(clip.waveform))))
    window = np.hanning(size)
    transform = ShortTimeFFT(window * 2 / window.sum(), max(1, size // _STEPS), clip.sample_rate)
    level = 20 * np.log10(np.abs(transform.stft(wave)) + 1e-6)
    return transform.t(len(wave)), transform.f, level
