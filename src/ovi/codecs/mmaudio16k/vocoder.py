"""The library's vocoder as MMAudio's 16 kHz model has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def vocoder16k(**config: Any) -> Any:
    """Mel spectra [B, mel, frames] to waveforms [B, 1, frames * 256]: BigVGAN with another last layer.

    Against the 44.1 kHz one that the library knows, the last convolution has a bias and ends in a hyperbolic tangent.

    Args:
        config: every argument of ``diffusers.MMAudioVocoder``, whose defaults are of the 44.1 kHz model.
    """
    from diffusers import MMAudioVocoder

    vocoder: Any = MMAudioVocoder(**config)
    vocoder.conv_post = TanhConv(vocoder.conv_post.in_channels, 1, 7, padding=3)
    return vocoder


class TanhConv(nn.Conv1d):
    """Convolution and tangent in one, so that the clamp that ends the library's network finds nothing left to cut."""

    def forward(self, input: Tensor) -> Tensor:
        """Signals [B, C, T] to [B, 1, T] in -1..1."""
        return torch.tanh(super().forward(input))
