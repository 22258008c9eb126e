"""CLAP score: how well a sound fits its prompt, and how near it comes to the real sound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovi.errors import OviError
from ovi.metrics.clap import hub, laion  # noqa: F401  (they register themselves)
from ovi.metrics.clap.backend import CLAP_BACKENDS, SAMPLE_RATE, ClapBackend
from ovi.metrics.clip_metric import METRICS, ClipMetric, MeasuredClip
from ovi.metrics.features.base import build_features
from ovi.metrics.prompts import audio_caption
from ovi.metrics.sound import is_silent, resampled


def clap_score(text_embeddings: np.ndarray | Tensor, audio_embeddings: np.ndarray | Tensor) -> Tensor:
    """Mean cosine of paired embeddings, in float64.

    Args:
        text_embeddings: [B, D], of any length but 0.
        audio_embeddings: [B, D]; row n belongs to row n.

    Returns:
        A scalar in -1..1.

    Raises:
        OviError: for other shapes, or embeddings of length 0 or not finite.
    """
    texts, sounds = (torch.as_tensor(given).to(torch.float64) for given in (text_embeddings, audio_embeddings))
    if texts.ndim != 2 or texts.shape != sounds.shape or not texts.numel():
        raise OviError(f"embeddings must be two of the same [B, D], got {list(texts.shape)} and {list(sounds.shape)}")
    lengths = texts.norm(dim=1) * sounds.norm(dim=1)
    if not (torch.isfinite(lengths) & (lengths > 0)).all():
        raise OviError("embeddings must be finite and longer than 0")
    return ((texts * sounds.to(texts.device)).sum(1) / lengths).mean()


@METRICS.register("clap")
class CLAPScore(ClipMetric):
    """Mean cosine of CLAP embeddings of the sound and its prompt, and of the sound and the real one.

    With C the backend's checkpoint, ``compute`` gives ``clap_C`` over the clips with a prompt and a sound that is not
    silent (NaN without any), ``clap_C_n`` (how many), ``clap_C_coverage`` (of all clips), ``clap_C_cut_prompt`` (of
    those, how many prompts had more than the 77 tokens CLAP reads: Ovi's describe the sound last, so its part is lost
    unless ``audio_only_caption``), ``clap_C_whole_prompt`` (of those, how many had no description of the sound where
    one was asked for), and ``clap_audio_C``, ``..._n``, ``..._coverage`` against ``real_waveform`` where any came. With
    ``audio_only_caption`` the first tags are ``clap_C_audio_caption``: captions are no longer the raw ones. Sound is
    resampled to 48 kHz; which ten seconds are heard says ``ovi.metrics.clap.backend.heard``.

    Protocol of av-benchmark (github.com/hkchengrex/av-benchmark): backend laion_clap with its standard checkpoint, raw
    captions. Of CLAP: Wu et al., arXiv 2211.06687.

    Args:
        fps: frames per second of the clips.
        sample_rate: of their sound, in Hz.
        backend: name in the registry ``clap_backend``, or ``{"name": ..., knob: value, ...}``.
        audio_only_caption: reduce prompts to their description of the sound; one without it is taken whole, and
            counted.
    """

    HIGHER = ("clap_*",)
    NEITHER = (*ClipMetric.NEITHER, "*_cut_prompt", "*_whole_prompt")
    USES_COUNTERPART = True
    SUMS = ("total", "covered", "whole", "cut", "audio_total", "audio_covered")
    total: Tensor
    covered: Tensor
    whole: Tensor
    cut: Tensor
    audio_total: Tensor
    audio_covered: Tensor

    def __init__(
        self,
        fps: float,
        sample_rate: int,
        *,
        backend: str | Mapping[str, Any] = "laion_clap",
        audio_only_caption: bool = False,
        **metric_knobs: Any,
    ) -> None:
        super().__init__(fps, sample_rate, **metric_knobs)
        self.audio_only_caption = audio_only_caption
        self.backend: ClapBackend = build_features(CLAP_BACKENDS, backend)

    def add_clip(self, clip: MeasuredClip) -> None:
        """Measure one clip."""
        caption = clip.caption.strip()
        real = clip.real_waveform
        if not (caption or real is not None) or _silent(clip.waveform):
            return
        sound = self._embedding(clip.waveform)
        if caption:
            description = audio_caption(caption) if self.audio_only_caption else None
            self.whole += int(self.audio_only_caption and description is None)
            text = description or caption
            self.cut += int(self.backend.cuts(text))
            self.total += clap_score(self.backend.embed_texts([text]), sound)
            self.covered += 1
        if real is not None and not _silent(real):
            self.audio_total += clap_score(self._embedding(real), sound)
            self.audio_covered += 1

    def compute(self) -> dict[str, Tensor]:
        """The figures as scalars."""
        tag, audio = f"clap_{self.backend.name}", f"clap_audio_{self.backend.name}"
        if self.audio_only_caption:
            tag += "_audio_caption"
        figures = {
            tag: self.total / self.covered,
            f"{tag}_n": self.covered,
            f"{tag}_coverage": self.covered / self.clips,
            f"{tag}_cut_prompt": self.cut,
        }
        if self.audio_covered:
            figures |= {
                audio: self.audio_total / self.audio_covered,
                f"{audio}_n": self.audio_covered,
                f"{audio}_coverage": self.audio_covered / self.clips,
            }
        if self.audio_only_caption:
            figures[f"{tag}_whole_prompt"] = self.whole
        return figures

    def identity(self) -> dict[str, Any]:
        """With the backend's name and checksum, and how prompts are read."""
        return {
            **super().identity(),
            "backend": self.backend.name,
            "digest": self.backend.digest,
            "audio_only_caption": self.audio_only_caption,
        }

    def _embedding(self, waveform: np.ndarray) -> Tensor:
        """[1, D]."""
        return self.backend.embed_audio(resampled(waveform, self.sample_rate, SAMPLE_RATE))[None]


def _silent(waveform: np.ndarray) -> bool:
    """As CLAP hears it, without its mean; what is not finite is not silent, and refused where it is heard."""
    return bool(np.isfinite(waveform).all()) and is_silent(waveform - np.mean(waveform, dtype=np.float64))
