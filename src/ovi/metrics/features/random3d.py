"""Random 3-D convolutions: features of no meaning, for tests of what is built on features."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovi.metrics.features.base import VIDEO_FEATURES, VideoExtractor
from ovi.metrics.features.inputs import check_frames
from ovi.metrics.features.weights import combined_digest

_WIDTHS = (3, 16, 32)


@VIDEO_FEATURES.register("random3d")
class Random3D(VideoExtractor):
    """A small 3-D convolutional network of seeded random weights: for tests only, as its tag says.

    Args:
        seed: draws the weights; the global generators are left alone.
        feature_dim: D.
    """

    name = "random3d_testonly"
    resolution = (32, 32)

    def __init__(self, *, seed: int = 0, feature_dim: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        widths = [*_WIDTHS, feature_dim]
        self.weights = nn.ParameterList(
            torch.randn(wide, deep, 3, 3, 3, generator=generator) * (2.0 / (27 * deep)) ** 0.5
            for deep, wide in itertools.pairwise(widths)
        )
        self.feature_dim = feature_dim
        self.digest = combined_digest("random3d 1", seed, feature_dim)
        self.freeze()

    def forward(self, frames: Tensor) -> Tensor:
        """Features [B, D] of uint8 frames [B, T, H, W, 3]."""
        x = check_frames(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
        x = F.adaptive_avg_pool3d(x, (x.shape[2], *self.resolution))
        for weight in self.weights:
            x = F.relu(F.conv3d(x, weight, stride=(1, 2, 2), padding=1))
        return x.mean((2, 3, 4))
