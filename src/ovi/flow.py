"""Rectified flow: noise levels, interpolation, and the loss, over any network that is a callable.

Sigma is the noise level in 0..1; ``x = (1 - sigma) * data + sigma * noise`` and the network predicts
``noise - data`` (Liu et al. 2209.03003; Ovi 2510.01284, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ovi.errors import OviError
from ovi.registry import Registry

TIMESTEPS = Registry("timesteps", group="flow/timesteps", doc="how noise levels are drawn in training")

Timesteps = Callable[[int, torch.Generator | None], Tensor]
"""(batch size, generator) -> sigma [B] on the generator's device, float32."""

Network = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(video, audio, sigma [B]) -> velocities of both; conditions are bound already."""


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """``s * sigma / (1 + (s - 1) * sigma)``: s > 1 spends more on high noise (SD3, 2403.03206, section 5.3.2).

    Raises:
        OviError: when the shift is not positive.
    """
    if shift <= 0:
        raise OviError(f"a timestep shift must be positive, got {shift}; 1 is none")
    return shift * sigma / (1 + (shift - 1) * sigma)


@TIMESTEPS.register("uniform")
def uniform(batch_size: int, generator: torch.Generator | None, *, shift: float = 1.0) -> Tensor:
    """Sigma uniform in 0..1, as Ovi was trained.

    Args:
        shift: towards high noise when above 1.
    """
    return shift_sigma(torch.rand(batch_size, generator=generator, device=_device(generator)), shift)


@TIMESTEPS.register("logit_normal")
def logit_normal(
    batch_size: int, generator: torch.Generator | None, *, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Tensor:
    """Sigma whose logit is normal: most training at middle noise (2403.03206, section 3.1; MMAudio).

    Args:
        mean: of the logit; positive leans towards noise.
        std: of the logit.
        shift: towards high noise when above 1.
    """
    logit = torch.randn(batch_size, generator=generator, device=_device(generator)) * std + mean
    return shift_sigma(logit.sigmoid(), shift)


def noised(data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Data [B, ...] at noise level sigma [B]."""
    s = sigma.view(-1, *[1] * (data.dim() - 1)).to(data.dtype)
    return data + s * (noise - data)


def velocity_error(prediction: Tensor, data: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of the velocity per sample, [B], in float32.

    Args:
        prediction: predicted velocity, of the data's shape.
        data: clean latents.
        noise: the noise they were mixed with.
        mask: what counts, broadcastable to the data; padding is 0.
    """
    error = (prediction.float() - (noise.float() - data.float())).square()
    if mask is None:
        return error.flatten(1).mean(1)
    weight = mask.to(error.dtype).expand_as(error)
    return (error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(1)


def joint_errors(
    network: Network,
    video: Tensor,
    audio: Tensor,
    sigma: Tensor,
    *,
    generator: torch.Generator | None = None,
    audio_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Velocity errors of video and audio per sample, [B] each, at one shared noise level and independent noises.

    Args:
        network: the velocity field with its conditions bound.
        video: clean latents [B, C, F, H, W].
        audio: clean latents [B, L, C].
        sigma: [B].
        generator: source of the noise.
        audio_mask: real audio tokens [B, L].
    """
    noise_video = torch.randn(video.shape, generator=generator, device=video.device, dtype=video.dtype)
    noise_audio = torch.randn(audio.shape, generator=generator, device=audio.device, dtype=audio.dtype)
    v, a = network(noised(video, noise_video, sigma), noised(audio, noise_audio, sigma), sigma)
    mask = None if audio_mask is None else audio_mask[..., None]
    return velocity_error(v, video, noise_video), velocity_error(a, audio, noise_audio, mask)


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
