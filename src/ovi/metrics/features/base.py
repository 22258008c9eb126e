"""Networks that turn clips into features for distances and scores: frozen, of known weights, behind registries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ovi.registry import Registry

VIDEO_FEATURES = Registry(
    "video_features", group="video_features", doc="networks that turn moving pictures into features for distances"
)
AUDIO_FEATURES = Registry(
    "audio_features", group="audio_features", doc="networks that turn sound into features for distances"
)


class Extractor(nn.Module, ABC):
    """A frozen network from clips to features.

    A metric keeps it as a part of itself, so ``metric.to(device)`` moves it. It computes in float32 whatever autocast
    says: low precision shows in distances.

    Attributes:
        name: part of the metric's tag: says network and weights, and that they are random where they are.
        digest: hex checksum of the weights and whatever else of its own decides the features.
        feature_dim: D.
    """

    name: str
    digest: str
    feature_dim: int

    def train(self, mode: bool = True) -> Extractor:
        """Stays in evaluation."""
        return super().train(False)

    def freeze(self) -> None:
        """To be called at the end of ``__init__``."""
        self.requires_grad_(False)
        self.eval()

    def __call__(self, signal: Tensor) -> Tensor:
        """Features without gradients and autocast, on the device of the weights."""
        device = next((p.device for p in self.parameters()), signal.device)
        cudnn = torch.backends.cudnn
        # Convolutions on a GPU round to 10 bits by default.
        exact = cudnn.flags(cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic, False)
        with torch.no_grad(), torch.autocast(device.type, enabled=False), exact:
            return super().__call__(signal.to(device))


class VideoExtractor(Extractor):
    """Moving pictures to features.

    Attributes:
        num_frames: what it was trained on, the default of a protocol; any number where it does not matter.
        resolution: [H, W] to which it resizes on its own, shown with the protocol.
    """

    num_frames: int = 16
    resolution: tuple[int, int]

    @abstractmethod
    def forward(self, frames: Tensor) -> Tensor:
        """Features [B, D] of uint8 frames [B, T, H, W, 3]."""


class AudioExtractor(Extractor):
    """Sound to features.

    Attributes:
        sample_rate: in Hz, at which it must come; metrics resample.
        has_classes: whether ``logits`` is there, for inception score and KL divergence.
    """

    sample_rate: int
    has_classes: bool = False

    @abstractmethod
    def forward(self, waveform: Tensor) -> Tensor:
        """Features [R, D] of one clip's waveform [N] in -1..1: one row a window, or one for the whole."""

    def logits(self, waveform: Tensor) -> Tensor:
        """Class logits [K] of one clip's waveform [N]; only where ``has_classes``."""
        raise NotImplementedError(f"{self.name} has no classes")


def build_features(registry: Registry, given: str | Mapping[str, Any]) -> Any:
    """An extractor by name, or by ``{"name": ..., knob: value, ...}``.

    Raises:
        UnknownNameError: for an unknown name or knob.
        OviError: when its weights cannot be had.
    """
    knobs = {} if isinstance(given, str) else {k: v for k, v in given.items() if k != "name"}
    name = given if isinstance(given, str) else given.get("name", "")
    return registry.build({"name": name, "knobs": knobs})
