"""From noise to latents: the denoising loop over diffusers' flow schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovi.flow import Network, shift_sigma
from ovi.registry import Registry

SAMPLERS = Registry("sampler", group="generation/sampler", doc="the solver that integrates the velocity field")

Sampler = Callable[[int], Any]
"""Number of steps -> a diffusers scheduler, ready to step; one per modality, because schedulers hold state."""


@SAMPLERS.register("euler")
def euler(num_steps: int, *, shift: float = 5.0) -> Any:
    """First-order Euler steps on the shifted linear grid; the network is given the exact noise level.

    Args:
        shift: of the grid towards high noise, 5 for published Ovi.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)
    return scheduler


@SAMPLERS.register("unipc")
def unipc(num_steps: int, *, shift: float = 5.0) -> Any:
    """UniPC, second order, on the grid of published Ovi; the network is given sigma cut to whole thousandths.

    Args:
        shift: of the grid towards high noise, 5 for published Ovi.
    """
    from diffusers import UniPCMultistepScheduler

    scheduler: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    # The reference starts just below pure noise; plain set_timesteps(n) is another grid (spec, 'Sampling').
    scheduler.set_timesteps(sigmas=np.linspace(np.float32(0.999), 0, num_steps + 1)[:-1])
    scheduler.set_begin_index(0)
    return scheduler


@SAMPLERS.register("dpmpp")
def dpmpp(num_steps: int, *, shift: float = 5.0) -> Any:
    """DPM-Solver++, second order, on the grid of published Ovi; the network is given sigma cut to whole thousandths.

    Args:
        shift: of the grid towards high noise, 5 for published Ovi.
    """
    from diffusers import DPMSolverMultistepScheduler

    scheduler: Any = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(num_steps)
    # The reference starts at pure noise, in even steps before the shift; diffusers cannot be told so. With numpy's
    # rounding, which decides what a level is cut to.
    sigmas = shift_sigma(torch.from_numpy(np.linspace(1, 0, num_steps + 1)), shift)
    scheduler.sigmas = sigmas.float()
    scheduler.timesteps = (sigmas[:-1] * scheduler.config.num_train_timesteps).long()
    scheduler.set_begin_index(0)
    return scheduler


@torch.no_grad()
def sample(
    velocity: Network,
    video: Tensor,
    audio: Tensor,
    *,
    sampler: Sampler = unipc,
    num_steps: int = 50,
    first_frame: Tensor | None = None,
    on_step: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Denoise a batch of video and audio latents together.

    Args:
        velocity: the (guided) velocity field, (video, audio, sigma [B]) -> velocities.
        video: noise [B, C, F, H, W].
        audio: noise [B, L, C].
        sampler: builds the scheduler of one modality from the number of steps.
        num_steps: solver steps.
        first_frame: clean latent [B, C, 1, H, W] of a given first frame; written in before every step and at the end.
        on_step: called after every step with its number, from 0.

    Returns:
        Clean latents of both modalities.
    """
    for_video, for_audio = sampler(num_steps), sampler(num_steps)
    for i, timestep in enumerate(for_video.timesteps):
        if first_frame is not None:
            video = torch.cat([first_frame, video[:, :, 1:]], 2)
        sigma = (timestep / for_video.config.num_train_timesteps).to(video.device, torch.float32)
        v, a = velocity(video, audio, sigma.expand(video.shape[0]))
        video = for_video.step(v, timestep, video, return_dict=False)[0]
        audio = for_audio.step(a, timestep, audio, return_dict=False)[0]
        if on_step is not None:
            on_step(i)
    if first_frame is not None:
        video = torch.cat([first_frame, video[:, :, 1:]], 2)
    return video, audio
