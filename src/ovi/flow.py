"""Rectified flow: noise levels, interpolation, and the loss, over any network that is a callable.

Sigma is the noise level in 0..1; ``x = (1 - sigma) * data + sigma * noise`` and the network predicts
``noise - data`` (Liu et al. 2209.03003; Ovi 2510.01284, section 3.3). A *density* says how likely each noise level is,
*timesteps* how the levels of video and audio go together and which losses count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ovi.errors import OviError
from ovi.registry import Registry

DENSITIES = Registry("density", group="flow/density", doc="how likely each noise level is in training")
TIMESTEPS = Registry("timesteps", group="flow/timesteps", doc="how noise levels of video and audio go together")

Density = Callable[[int, torch.Generator | None, int], Tensor]
"""(batch size, generator, number of tokens) -> sigma [B] on the generator's device, float32."""

Sigma = Tensor | tuple[Tensor, Tensor]
"""Noise levels [B] of both modalities, or of (video, audio)."""

Network = Callable[[Tensor, Tensor, Sigma], tuple[Tensor, Tensor]]
"""(video, audio, sigma) -> velocities of both; conditions are bound already."""


@dataclass(frozen=True)
class NoiseLevels:
    """What a batch is trained at.

    Args:
        video: sigma of the video, [B] in 0..1.
        audio: sigma of the audio, [B].
        video_weight: of each sample's video loss, [B]; 0 where the video is given clean.
        audio_weight: of each sample's audio loss, [B].
    """

    video: Tensor
    audio: Tensor
    video_weight: Tensor
    audio_weight: Tensor


Timesteps = Callable[[int, torch.Generator | None, Density, tuple[int, int]], NoiseLevels]
"""(batch size, generator, density, numbers of video and audio tokens) -> noise levels, on the generator's device."""


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """``s * sigma / (1 + (s - 1) * sigma)``: s > 1 spends more on high noise (SD3, 2403.03206, section 5.3.2).

    Raises:
        OviError: when the shift is not positive.
    """
    if shift <= 0:
        raise OviError(f"a timestep shift must be positive, got {shift}; 1 is none")
    return shift * sigma / (1 + (shift - 1) * sigma)


@DENSITIES.register("uniform")
def uniform(batch_size: int, generator: torch.Generator | None, num_tokens: int = 0, *, shift: float = 1.0) -> Tensor:
    """Sigma uniform in 0..1, as Ovi was trained.

    Args:
        batch_size: B.
        generator: source of the draws.
        num_tokens: makes no difference here.
        shift: towards high noise when above 1.
    """
    return shift_sigma(torch.rand(batch_size, generator=generator, device=_device(generator)), shift)


@DENSITIES.register("logit_normal")
def logit_normal(
    batch_size: int,
    generator: torch.Generator | None,
    num_tokens: int = 0,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
) -> Tensor:
    """Sigma whose logit is normal: most training at middle noise (2403.03206, section 3.1; MMAudio).

    Args:
        batch_size: B.
        generator: source of the draws.
        num_tokens: makes no difference here.
        mean: of the logit; positive leans towards noise.
        std: of the logit.
        shift: towards high noise when above 1.
    """
    logit = torch.randn(batch_size, generator=generator, device=_device(generator)) * std + mean
    return shift_sigma(logit.sigmoid(), shift)


@DENSITIES.register("token_shifted")
def token_shifted(
    batch_size: int,
    generator: torch.Generator | None,
    num_tokens: int,
    *,
    mean: float = 0.95,
    mean_long: float = 2.05,
    num_tokens_short: int = 1024,
    num_tokens_long: int = 4096,
    std: float = 1.0,
    uniform_share: float = 0.1,
    shift: float = 1.0,
) -> Tensor:
    """Logit-normal that leans the more towards noise the more tokens there are, partly uniform (LTX-2, 2601.03233).

    The logit's mean is linear in the number of tokens between the two lengths and constant beyond them.

    Args:
        batch_size: B.
        generator: source of the draws.
        num_tokens: of one sample of the modality that the levels are for.
        mean: of the logit at ``num_tokens_short``.
        mean_long: of the logit at ``num_tokens_long``.
        num_tokens_short: tokens up to which the mean is ``mean``.
        num_tokens_long: tokens from which on it is ``mean_long``.
        std: of the logit.
        uniform_share: share of samples drawn uniformly instead, so that no noise level is left out.
        shift: towards high noise when above 1.

    Raises:
        OviError: when the lengths are not in order, or the share is none.
    """
    if num_tokens_long <= num_tokens_short:
        raise OviError(
            f"flow.density.num_tokens_long must exceed num_tokens_short, got {num_tokens_long} and {num_tokens_short}"
        )
    if not 0 <= uniform_share <= 1:
        raise OviError(f"flow.density.uniform_share must be in 0 to 1, got {uniform_share}")
    position = (num_tokens - num_tokens_short) / (num_tokens_long - num_tokens_short)
    centre = mean + min(1.0, max(0.0, position)) * (mean_long - mean)
    normal = logit_normal(batch_size, generator, mean=centre, std=std)
    flat, chance = (torch.rand(batch_size, generator=generator, device=normal.device) for _ in range(2))
    return shift_sigma(torch.where(chance < uniform_share, flat, normal), shift)


@TIMESTEPS.register("shared")
def shared(
    batch_size: int, generator: torch.Generator | None, density: Density, num_tokens: tuple[int, int]
) -> NoiseLevels:
    """One noise level for both modalities (Ovi), as in sampling; drawn for the video's number of tokens.

    Args:
        batch_size: B.
        generator: source of the draws.
        density: of the levels.
        num_tokens: of one sample's video and audio.
    """
    sigma = density(batch_size, generator, num_tokens[0])
    return NoiseLevels(sigma, sigma, torch.ones_like(sigma), torch.ones_like(sigma))


@TIMESTEPS.register("independent")
def independent(
    batch_size: int, generator: torch.Generator | None, density: Density, num_tokens: tuple[int, int]
) -> NoiseLevels:
    """A noise level for each modality, each drawn for its own number of tokens (UniDiffuser, 2303.06555).

    Args:
        batch_size: B.
        generator: source of the draws.
        density: of the levels.
        num_tokens: of one sample's video and audio.
    """
    video, audio = (density(batch_size, generator, n) for n in num_tokens)
    return NoiseLevels(video, audio, torch.ones_like(video), torch.ones_like(audio))


@TIMESTEPS.register("tasks")
def tasks(
    batch_size: int,
    generator: torch.Generator | None,
    density: Density,
    num_tokens: tuple[int, int],
    *,
    a2v: float = 0.25,
    v2a: float = 0.25,
    joint: str = "shared",
) -> NoiseLevels:
    """A mixture of joint generation, audio to video and video to audio (Harmony, 2511.21579).

    In the last two one modality is given clean, at sigma 0, and only the other's loss counts. What is left of the two
    shares is trained jointly.

    Args:
        batch_size: B.
        generator: source of the draws.
        density: of the levels.
        num_tokens: of one sample's video and audio.
        a2v: share of samples whose audio is given.
        v2a: share of samples whose video is given.
        joint: how the two noise levels go together elsewhere, ``shared`` or ``independent``.

    Raises:
        OviError: when the shares are none, or joint is neither.
    """
    if min(a2v, v2a) < 0 or a2v + v2a > 1 + 1e-6:
        raise OviError(f"flow.timesteps.a2v and v2a are shares whose sum is at most 1, got {a2v} and {v2a}")
    if joint not in ("shared", "independent"):
        raise OviError(f"flow.timesteps.joint is shared or independent, got {joint!r}")
    levels = TIMESTEPS[joint](batch_size, generator, density, num_tokens)
    task = torch.rand(batch_size, generator=generator, device=_device(generator))
    audio_given = task < a2v
    video_given = (task >= a2v) & (task < a2v + v2a)
    return NoiseLevels(
        levels.video.masked_fill(video_given, 0),
        levels.audio.masked_fill(audio_given, 0),
        levels.video_weight.masked_fill(video_given, 0),
        levels.audio_weight.masked_fill(audio_given, 0),
    )


def noised(data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Data [B, ...] at noise level sigma [B]."""
    return data + per_sample(sigma, data) * (noise - data)


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
    sigma: Sigma,
    *,
    generator: torch.Generator | None = None,
    audio_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Velocity errors of video and audio per sample, [B] each, at independent noises.

    Args:
        network: the velocity field with its conditions bound.
        video: clean latents [B, C, F, H, W].
        audio: clean latents [B, L, C].
        sigma: [B], of both or of each; handed to the network as it comes.
        generator: source of the noise.
        audio_mask: real audio tokens [B, L]; the others are no part of the error.
    """
    sigma_video, sigma_audio = of_each(sigma)
    noise_video = torch.randn(video.shape, generator=generator, device=video.device, dtype=video.dtype)
    noise_audio = torch.randn(audio.shape, generator=generator, device=audio.device, dtype=audio.dtype)
    v, a = network(noised(video, noise_video, sigma_video), noised(audio, noise_audio, sigma_audio), sigma)
    mask = None if audio_mask is None else audio_mask[..., None]
    return velocity_error(v, video, noise_video), velocity_error(a, audio, noise_audio, mask)


def weighted_mean(errors: Tensor, weights: Tensor) -> Tensor:
    """Mean of errors [B] by their weights [B]: over the samples that count, and 0 when none does."""
    return (errors * weights).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


def of_each(sigma: Sigma) -> tuple[Tensor, Tensor]:
    """Noise levels of video and of audio, [B] each."""
    return sigma if isinstance(sigma, tuple) else (sigma, sigma)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Values [B] shaped to multiply a tensor [B, ...], in its dtype."""
    return values.view(-1, *[1] * (like.dim() - 1)).to(like.dtype)


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
