"""Frechet and kernel audio distance, inception score and KL divergence over the features of an audio network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovi.errors import OviError
from ovi.metrics.clip_metric import METRICS, MeasuredClip
from ovi.metrics.feature_distance import FeatureDistance
from ovi.metrics.features.base import AUDIO_FEATURES, AudioExtractor, build_features
from ovi.metrics.inception import class_sums, kl_divergence, score_of_sums
from ovi.metrics.kernel import MAX_SAMPLES, kernel_audio_distance
from ovi.metrics.sound import is_silent, resampled

PREFIX = {"vggish": "fad"}
"""A distance is called FAD where its features are those of the published metric."""


@METRICS.register("fad")
class FrechetAudioDistance(FeatureDistance):
    """Frechet and kernel distance between generated and real sound, over the features of an audio network.

    Tags: ``fad_vggish`` for the network the published metric has, ``fd_<network>`` for others (``_biased`` follows
    where the covariance is), and ``kad_<network>``. Silent sounds are part of both sets; ``fd_<network>_silent`` and
    ``_silent_real`` count them. A network with classes also gives ``is_<network>`` (inception score of the generated
    sounds, over the whole set) and, where clips come with the sound of their real counterpart, ``kl_<network>``
    (KL(real || generated) over the ``kl_<network>_n`` pairs).

    Args:
        fps: frames per second of the clips; unused.
        sample_rate: of their sound, in Hz; resampled to what the network wants.
        features: name of an audio network, or ``{"name": ..., knob: value}``.
        covariance: ``unbiased`` (divided by n - 1, as published audio distances are) or ``biased`` (by n).
        kernel: also give the kernel distance: the better figure for few clips.
        max_samples: features a set that the kernel distance rests on.

    Raises:
        OviError: when the network or its weights cannot be had, or for values outside these.
    """

    LOWER = ("fad_*", "fd_*", "kad_*", "kl_*")
    HIGHER = ("is_*",)
    NEITHER = (*FeatureDistance.NEITHER, "*_silent", "*_silent_real")
    SUMS = (*FeatureDistance.SUMS, "silent", "silent_real", "negative_entropies", "divergences", "pairs")
    extractor: AudioExtractor
    silent: Tensor
    silent_real: Tensor
    negative_entropies: Tensor
    divergences: Tensor
    pairs: Tensor
    probabilities: Tensor

    def __init__(
        self,
        fps: float,
        sample_rate: int,
        *,
        features: str | Mapping[str, Any] = "resemblyzer",
        covariance: str = "unbiased",
        kernel: bool = True,
        max_samples: int = MAX_SAMPLES,
        **metric_knobs: Any,
    ) -> None:
        extractor: AudioExtractor = build_features(AUDIO_FEATURES, features)
        super().__init__(
            fps,
            sample_rate,
            extractor=extractor,
            tag=f"{PREFIX.get(extractor.name, 'fd')}_{extractor.name}{'_biased' if covariance == 'biased' else ''}",
            kernel_tag=f"kad_{extractor.name}",
            covariance=covariance,
            kernel=kernel,
            max_samples=max_samples,
            kernel_figure=kernel_audio_distance,
            **metric_knobs,
        )
        self.USES_COUNTERPART = extractor.has_classes
        if extractor.has_classes:
            # Asked of a second of silence: a process that measures no clip must know how many there are, too.
            self.num_classes = extractor.logits(torch.zeros(extractor.sample_rate)).numel()
            self.add_state("probabilities", torch.zeros(self.num_classes, dtype=torch.float64), dist_reduce_fx="sum")

    def features_of(self, clip: MeasuredClip) -> Tensor:
        """Features [windows, D] of the sound."""
        return self.extractor(self._heard(clip.waveform))

    def add_clip(self, clip: MeasuredClip) -> None:
        """Add the features of one sound, and for a generated one its classes."""
        super().add_clip(clip)
        silent = is_silent(clip.waveform)
        if clip.real:
            self.silent_real += silent
            return
        self.silent += silent
        if not self.extractor.has_classes:
            return
        logits = self._logits(clip.waveform)
        probabilities, negative_entropies = class_sums(logits)
        self.probabilities += probabilities.to(self.probabilities)
        self.negative_entropies += negative_entropies.to(self.negative_entropies)
        if clip.real_waveform is not None:
            self.pairs += 1
            self.divergences += kl_divergence(logits, self._logits(clip.real_waveform)).to(self.divergences)

    def compute(self) -> dict[str, Tensor]:
        """The figures by tag."""
        figures = super().compute()
        figures[f"{self.tag}_silent"], figures[f"{self.tag}_silent_real"] = self.silent, self.silent_real
        if self.extractor.has_classes:
            tag = f"is_{self.extractor.name}"
            figures[tag] = score_of_sums(self.clips, self.probabilities, self.negative_entropies)
            figures[f"{tag}_n"] = self.clips
            if self.pairs:
                tag = f"kl_{self.extractor.name}"
                figures[tag], figures[f"{tag}_n"] = self.divergences / self.pairs, self.pairs
        return figures

    def _real_sums(self) -> tuple[str, ...]:
        return (*super()._real_sums(), "silent_real")

    def _logits(self, waveform: np.ndarray) -> Tensor:
        """[1, K]."""
        logits = self.extractor.logits(self._heard(waveform)).detach()
        if logits.numel() != self.num_classes or not logits.isfinite().all():
            raise OviError(
                f"{self.extractor.name} gave logits {list(logits.shape)} for {self.num_classes} classes, "
                f"{int((~logits.isfinite()).sum())} of them not finite"
            )
        return logits.reshape(1, -1)

    def _heard(self, waveform: np.ndarray) -> Tensor:
        # A copy: what came may be read-only.
        return torch.tensor(resampled(waveform, self.sample_rate, self.extractor.sample_rate))
