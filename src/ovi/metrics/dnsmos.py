"""DNSMOS: how good speech sounds, by networks trained on listeners' ratings, without a reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ovi.errors import OviError
from ovi.metrics.clip_metric import METRICS, ClipMetric, MeasuredClip
from ovi.metrics.features.weights import WeightsFile
from ovi.metrics.sound import is_silent, resampled

SAMPLE_RATE = 16000
SCALES = {"ovrl": "ovrl_mos", "sig": "sig_mos", "bak": "bak_mos", "p808": "p808_mos"}
"""Our tags and the library's names: overall, the speech itself, its background (P.835); overall by P.808."""
SHORTEST_S = 0.5
"""A shorter sound would be nothing but its own repetitions: the networks look at 9.01 s."""

_ORIGIN = "the package speechmos 0.0.1.1"
_RATINGS = WeightsFile(
    "sig_bak_ovr.onnx", _ORIGIN, "269fbebdb513aa23cddfbb593542ecc540284a91849ac50516870e1ac78f6edd", 1157965
)
_P808 = WeightsFile(
    "model_v8.onnx", _ORIGIN, "9246480c58567bc6affd4200938e77eef49468c8bc7ed3776d109c07456f6e91", 224860
)


def dnsmos(waveform: np.ndarray, sample_rate: int) -> dict[str, float] | None:
    """Ratings of a clip's sound on a scale of about 1 to 5, higher is better (Reddy et al. 2110.01763, 2010.15258).

    At 16 kHz, held to -1..1 as a player would. The networks see windows of 9.01 s, one a second, and the ratings are
    means over them. A shorter sound is put after itself until it fills a window, as published, seams and all; one of
    5.04 s then counts its first 4 s twice. So compare clips of one length only.

    Args:
        waveform: float [N].
        sample_rate: in Hz.

    Returns:
        ``ovrl``, ``sig``, ``bak`` and ``p808``; None for silence and for less than 0.5 s, which cannot be rated.

    Raises:
        OviError: without the package speechmos, for values that are not finite, or another shape.
    """
    wave = np.asarray(waveform, np.float32)
    if wave.ndim != 1:
        raise OviError(f"the waveform must be [N], mono, got {list(wave.shape)}")
    if not np.isfinite(wave).all():
        raise OviError("the waveform holds NaN or infinite values: what generated it has failed")
    if len(wave) < SHORTEST_S * sample_rate or is_silent(wave):
        return None
    rate = _network()
    found = rate(np.clip(resampled(wave, sample_rate, SAMPLE_RATE), -1.0, 1.0), SAMPLE_RATE, False)
    return {scale: float(found[name]) for scale, name in SCALES.items()}


@METRICS.register("dnsmos")
class DNSMOS(ClipMetric):
    """DNSMOS, the rated quality of speech without a reference, 1 to 5: overall, speech, background, and P.808.

    Made for speech: of music and effects it says little. ``compute`` gives the means ``dnsmos_ovrl``, ``dnsmos_sig``,
    ``dnsmos_bak``, ``dnsmos_p808``; ``dnsmos_n`` (clips rated) and ``dnsmos_coverage`` (of all; silent ones are not).

    Args:
        fps: frames per second of the clips.
        sample_rate: of their sound, in Hz.

    Raises:
        OviError: without the package speechmos, or with one of other networks.
    """

    HIGHER = ("dnsmos_*",)
    SUMS = (*SCALES, "rated")
    ovrl: Tensor
    sig: Tensor
    bak: Tensor
    p808: Tensor
    rated: Tensor

    def __init__(self, fps: float, sample_rate: int) -> None:
        super().__init__(fps, sample_rate)
        _network()  # absent: said now, not in the first validation

    def add_clip(self, clip: MeasuredClip) -> None:
        """Rate one clip."""
        found = dnsmos(clip.waveform, self.sample_rate)
        if found is None:
            return
        self.rated += 1
        for scale, value in found.items():
            getattr(self, scale).add_(value)

    def compute(self) -> dict[str, Tensor]:
        """The figures as scalars; NaN when no clip could be rated."""
        means = {f"dnsmos_{scale}": getattr(self, scale) / self.rated for scale in SCALES}
        return {**means, "dnsmos_n": self.rated, "dnsmos_coverage": self.rated / self.clips}

    def identity(self) -> dict[str, Any]:
        """With the checksums of both networks."""
        return {**super().identity(), "networks": [_RATINGS.digest, _P808.digest]}


@functools.cache
def _network() -> Callable[[np.ndarray, int, bool], dict[str, Any]]:
    """The library's scorer over its own files; one for all metrics, as it has no state."""
    try:
        from speechmos import dnsmos as library
    except ImportError as error:
        raise OviError(
            f"metric dnsmos needs the package speechmos and what it uses ({error}): "
            "pip install speechmos librosa onnxruntime requests; or leave the metric out"
        ) from error
    folder = Path(library.__file__).parent / "dnsmos_models"
    files = [str(weights.find(folder, "speechmos/dnsmos_models")) for weights in (_RATINGS, _P808)]
    scorer: Callable[[np.ndarray, int, bool], dict[str, Any]] = library.DNSMOS(*files)
    return scorer
