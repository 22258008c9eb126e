"""CLAP's audio embeddings as features for distances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ovi.metrics.clap import hub, laion  # noqa: F401  (they register themselves)
from ovi.metrics.clap.backend import CLAP_BACKENDS, SAMPLE_RATE, ClapBackend
from ovi.metrics.features.base import AUDIO_FEATURES, AudioExtractor, build_features


@AUDIO_FEATURES.register("clap")
class ClapFeatures(AudioExtractor):
    """CLAP's embedding of ten seconds of sound, one row a clip.

    Args:
        backend: name in the registry ``clap_backend``, or ``{"name": ..., knob: value, ...}``.
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, *, backend: str | Mapping[str, Any] = "laion_clap") -> None:
        super().__init__()
        self.backend: ClapBackend = build_features(CLAP_BACKENDS, backend)
        self.name = f"clap_{self.backend.name}"
        self.digest, self.feature_dim = self.backend.digest, self.backend.embed_dim
        self.freeze()

    def forward(self, waveform: Tensor) -> Tensor:
        """[1, D] of length 1, of a waveform [N] at 48 kHz."""
        return self.backend.embed_audio(waveform)[None]
