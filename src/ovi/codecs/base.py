"""What a codec is: pixels, waveforms or strings to latents, and back.

A codec is an ``nn.Module`` without trainable state as far as training is concerned: data preparation and sampling use
it, the network never sees it. Latents leave ``encode`` with zero mean and unit variance per channel, once the codec
has seen data (``fit``) or carries published statistics. ``state`` is what an ``index.json`` stores of it, so that
samples decode with the very codec that encoded the training set.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ovi.errors import OviError
from ovi.registry import Registry

VIDEO_CODECS = Registry("video_codec", group="codec/video", doc="pixels <-> video latents")
AUDIO_CODECS = Registry("audio_codec", group="codec/audio", doc="waveforms <-> audio latents")
TEXT_ENCODERS = Registry("text_encoder", group="codec/text", doc="prompts -> text embeddings")


class Moments:
    """Running mean and standard deviation per channel, summed in float64 so that no clip has to stay in memory."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, values: Tensor) -> None:
        """Take in values [channels, n] of one batch of signals; none of them where one is not finite."""
        values = values.detach().cpu().double()  # in this order: not every accelerator has float64
        if not values.isfinite().all():
            return
        self.count += values.shape[1]
        self.total = self.total + values.sum(1)
        self.squares = self.squares + values.square().sum(1)

    def mean_std(self) -> tuple[Tensor, Tensor]:
        """Both [channels], float64; no deviation is below a thousandth of the largest."""
        mean = self.total / self.count
        std = (self.squares / self.count - mean.square()).clamp_min(0).sqrt()
        # A channel that hardly changes (chroma of a grey set) stays small: rounding and codec noise are not amplified.
        std = std.clamp_min(1e-3 * float(std.max()))
        return mean, torch.where(std < 1e-6, torch.ones_like(std), std)


class LatentCodec(nn.Module, ABC):
    """Statistics shared by video and audio codecs: per-channel mean and standard deviation of raw latents.

    Args:
        latent_channels: channels of the latent.
        channel_axis: which axis of a batched latent holds them (1 for video, -1 for audio).

    Attributes:
        incidental_knobs: those that say where weights lie or what computing costs, not what a latent means: sets of
            latents may differ in them and still be mixed.
    """

    incidental_knobs: ClassVar[frozenset[str]] = frozenset()

    mean: Tensor
    std: Tensor

    def __init__(self, latent_channels: int, channel_axis: int) -> None:
        super().__init__()
        self.latent_channels, self.channel_axis = latent_channels, channel_axis
        self.register_buffer("mean", torch.zeros(latent_channels))
        self.register_buffer("std", torch.ones(latent_channels))
        self.fitted = False

    @abstractmethod
    def encode_raw(self, signal: Tensor) -> Tensor:
        """Signal to latent before normalisation."""

    @abstractmethod
    def decode_raw(self, latent: Tensor) -> Tensor:
        """Latent after denormalisation to signal."""

    def encode(self, signal: Tensor) -> Tensor:
        """Signal to normalised latent."""
        return (self.encode_raw(signal) - self._along(self.mean)) / self._along(self.std)

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised latent to signal."""
        return self.decode_raw(latent * self._along(self.std) + self._along(self.mean))

    @torch.no_grad()
    def gather(self, moments: Moments, signal: Tensor) -> None:
        """Add the raw latents of one batch of signals to ``moments``."""
        moments.add(self.encode_raw(signal).movedim(self.channel_axis, 0).flatten(1))

    def set_statistics(self, moments: Moments) -> None:
        """Normalise with these moments from now on.

        Raises:
            OviError: when they hold no value.
        """
        if not moments.count:
            raise OviError(f"{type(self).__name__}: no signal to take the latents' statistics from")
        mean, std = moments.mean_std()
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.fitted = True

    def fit(self, signals: Iterable[Tensor]) -> None:
        """Set mean and standard deviation per channel from batches of signals.

        Raises:
            OviError: when no signal came.
        """
        moments = Moments()
        for signal in signals:
            self.gather(moments, signal)
        self.set_statistics(moments)

    def state(self) -> dict[str, Any]:
        """JSON-ready statistics, exact to float32."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist(), "fitted": self.fitted}

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of ``state``.

        Raises:
            OviError: when the statistics are of another number of channels.
        """
        if len(state["mean"]) != self.latent_channels:
            raise OviError(
                f"{type(self).__name__} has {self.latent_channels} latent channels, but the stored statistics are of "
                f"{len(state['mean'])}: use the codec knobs that the shards were encoded with"
            )
        self.mean.copy_(torch.tensor(state["mean"]))
        self.std.copy_(torch.tensor(state["std"]))
        self.fitted = bool(state["fitted"])

    def _along(self, statistic: Tensor) -> Tensor:
        return statistic.view(-1, 1, 1, 1) if self.channel_axis == 1 else statistic


class VideoCodec(LatentCodec):
    """Pixels [B, 3, T, H, W] in -1..1 <-> latents [B, C, F, h, w].

    Args:
        latent_channels: C.
        spatial_stride: pixels per latent row and column.
        temporal_stride: pixel frames per latent frame.
        causal_first_frame: whether the first latent frame holds one pixel frame only.
    """

    def __init__(
        self, latent_channels: int, spatial_stride: int, temporal_stride: int, causal_first_frame: bool
    ) -> None:
        super().__init__(latent_channels, channel_axis=1)
        self.spatial_stride, self.temporal_stride = spatial_stride, temporal_stride
        self.causal_first_frame = causal_first_frame


class AudioCodec(LatentCodec):
    """Mono waveforms [B, N] in -1..1 <-> latents [B, L, C], L = N // stride.

    Args:
        latent_channels: C.
        sample_rate: in Hz.
        stride: samples per token.
    """

    def __init__(self, latent_channels: int, sample_rate: int, stride: int) -> None:
        super().__init__(latent_channels, channel_axis=-1)
        self.sample_rate, self.stride = sample_rate, stride


class TextEncoder(nn.Module, ABC):
    """Prompts to sequences of embeddings.

    Args:
        text_dim: width of an embedding.
        text_len: the most tokens a prompt may have; longer ones are cut.

    Attributes:
        incidental_knobs: as a latent codec has them.
    """

    incidental_knobs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, text_dim: int, text_len: int) -> None:
        super().__init__()
        self.text_dim, self.text_len = text_dim, text_len

    @abstractmethod
    def encode(self, prompts: list[str]) -> list[Tensor]:
        """Prompts to embeddings [n_i, text_dim] each, at least one row even for the empty prompt, never padded."""
