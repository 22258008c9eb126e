"""Guidance as weights over forward passes that sum to 1, per modality.

Since they sum to 1, weighting velocities or clean estimates is the same. All passes that leave out the same blocks go
through the network as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ovi.errors import OviError
from ovi.flow import Network
from ovi.registry import Registry

GUIDANCES = Registry("guidance", group="generation/guidance", doc="which forward passes are combined, and how")


@dataclass(frozen=True)
class Pass:
    """One forward pass: with the positive or the negative prompt, gates of the exchange, pairs left out."""

    positive: bool = True
    a2v: float = 1.0
    v2a: float = 1.0
    skip_blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Guidance:
    """Passes and their weights for video and for audio.

    Raises:
        OviError: when the weights of a modality do not sum to 1.
    """

    passes: tuple[Pass, ...]
    video_weights: tuple[float, ...]
    audio_weights: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, weights in (("video", self.video_weights), ("audio", self.audio_weights)):
            if len(weights) != len(self.passes) or abs(sum(weights) - 1) > 1e-6:
                raise OviError(f"guidance needs one {name} weight a pass, summing to 1; got {weights}")

    @property
    def needs_negative(self) -> bool:
        """Whether a pass uses the negative prompt."""
        return not all(p.positive for p in self.passes)


@GUIDANCES.register("none")
def no_guidance() -> Guidance:
    """The positive prompt alone."""
    return Guidance((Pass(),), (1.0,), (1.0,))


@GUIDANCES.register("cfg")
def cfg(*, video_scale: float = 4.0, audio_scale: float = 3.0, skip_blocks: Sequence[int] = ()) -> Guidance:
    """Classifier-free guidance with a scale per modality (published Ovi: 4 and 3, block 11 skipped).

    Args:
        video_scale: weight of the positive pass for video; 1 is no guidance.
        audio_scale: the same for audio.
        skip_blocks: pairs left out in the negative pass (skip-layer guidance).
    """
    passes = (Pass(), Pass(positive=False, skip_blocks=tuple(skip_blocks)))
    return Guidance(passes, (video_scale, 1 - video_scale), (audio_scale, 1 - audio_scale))


@dataclass(frozen=True)
class Prompts:
    """Text embeddings of a batch for both towers, positive and negative: lists of [n_i, text_dim]."""

    video: Sequence[Tensor]
    audio: Sequence[Tensor]
    negative_video: Sequence[Tensor]
    negative_audio: Sequence[Tensor]


def guided(
    model: Callable[..., tuple[Tensor, Tensor]], guidance: Guidance, prompts: Prompts, **conditions: Any
) -> Network:
    """The guided velocity field of a twin: (video, audio, sigma [B]) -> velocities.

    Args:
        model: called as ``TwinDiT`` is.
        guidance: passes and weights.
        prompts: text of both towers.
        conditions: further keywords for every pass, such as clean_first_frame.
    """

    groups: dict[tuple[int, ...], list[int]] = {}
    for i, p in enumerate(guidance.passes):
        groups.setdefault(p.skip_blocks, []).append(i)

    def velocity(video: Tensor, audio: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        total_video, total_audio = torch.zeros_like(video), torch.zeros_like(audio)
        for skip, members in groups.items():
            passes = [guidance.passes[i] for i in members]
            n, size = len(passes), video.shape[0]
            v, a = model(
                torch.cat([video] * n),
                torch.cat([audio] * n),
                sigma.repeat(n),
                [t for p in passes for t in (prompts.video if p.positive else prompts.negative_video)],
                [t for p in passes for t in (prompts.audio if p.positive else prompts.negative_audio)],
                skip_blocks=skip,
                a2v=_gates([p.a2v for p in passes], size, sigma),
                v2a=_gates([p.v2a for p in passes], size, sigma),
                **conditions,
            )
            for i, v_pass, a_pass in zip(members, v.chunk(n), a.chunk(n)):
                total_video = total_video + guidance.video_weights[i] * v_pass
                total_audio = total_audio + guidance.audio_weights[i] * a_pass
        return total_video, total_audio

    return velocity


def _gates(values: list[float], size: int, like: Tensor) -> float | Tensor:
    """One gate per sample of the joined batch; a plain number when all passes agree."""
    if len(set(values)) == 1:
        return values[0]
    return torch.tensor(values, device=like.device).repeat_interleave(size)


def no_text(like: Tensor) -> Tensor:
    """The embedding of no prompt at all: one row of zeros, as text dropout trains it; like [n, text_dim]."""
    return like.new_zeros(1, like.shape[-1])
