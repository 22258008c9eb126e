"""Waveforms at the rate a network wants, and whether there is anything to hear in them."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from ovi.errors import OviError

SILENT_PEAK = 1e-4
"""Sounds that stay below this (-80 dB of full scale) count as silent."""

_CROSSINGS = 32
_HALFWAY = 0.94
"""Where the filter is half way down, as a share of half the lower rate: tones up to 0.86 of it pass as they are."""
_KAISER_BETA = 9.0


def resampled(waveform: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """The same sound at another rate, not shifted in time: a windowed-sinc polyphase filter, 90 dB down where it folds.

    Args:
        waveform: [N], mono.
        from_hz: its rate.
        to_hz: the rate wanted.

    Returns:
        float32 [ceil(N * to_hz / from_hz)]; the waveform itself when the rates are the same.

    Raises:
        OviError: for another shape, an empty waveform, or rates that are not whole numbers above 0.
    """
    wave = np.asarray(waveform)
    if wave.ndim != 1 or not len(wave):
        raise OviError(f"waveform must be [N], mono and not empty, got {list(wave.shape)}")
    if any(int(rate) != rate or rate <= 0 for rate in (from_hz, to_hz)):
        raise OviError(f"sample rates must be whole numbers above 0, in Hz, got {from_hz} and {to_hz}")
    common = math.gcd(int(from_hz), int(to_hz))
    up, down = int(to_hz) // common, int(from_hz) // common
    if up == down:
        return wave.astype(np.float32, copy=False)
    from scipy.signal import resample_poly  # a second to import, for whoever measures sound

    return resample_poly(wave.astype(np.float64), up, down, window=_low_pass(max(up, down))).astype(np.float32)


def is_silent(waveform: np.ndarray) -> bool:
    """Whether nothing in it reaches ``SILENT_PEAK``."""
    return not np.any(np.abs(waveform) >= SILENT_PEAK)


@lru_cache(maxsize=8)
def _low_pass(factor: int) -> np.ndarray:
    from scipy.signal import firwin

    return firwin(2 * _CROSSINGS * factor + 1, _HALFWAY / factor, window=("kaiser", _KAISER_BETA))
