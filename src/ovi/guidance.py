"""Guidance as weights over forward passes that sum to 1, per modality.

Since they sum to 1, weighting velocities or clean estimates is the same. All passes of a step go through the network
as one batch, or a few at a time where memory asks for it; passes without weight do not run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ovi.errors import OviError
from ovi.flow import Network, Sigma, of_each, per_sample
from ovi.registry import Registry

GUIDANCES = Registry("guidance", group="generation/guidance", doc="which forward passes are combined, and how")


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Args:
        positive: with the positive prompts; otherwise with the negative ones.
        a2v: gate of what video hears; 0 is off.
        v2a: gate of what audio sees.
        skip_blocks: blocks of both towers left out whole, counted from 0.
        perturb_blocks: blocks whose self-attention is replaced by its values.
        null: "video" or "audio" is given as a clean null instead of its noised latent: zeros, the mean of normalised
            latents, at sigma 0. What the network says of it means nothing. None for neither.
    """

    positive: bool = True
    a2v: float = 1.0
    v2a: float = 1.0
    skip_blocks: tuple[int, ...] = ()
    perturb_blocks: tuple[int, ...] = ()
    null: str | None = None


@dataclass(frozen=True)
class Guidance:
    """Passes and their weights for video and for audio.

    Args:
        passes: the first is the conditional one, which ``rescale`` looks at.
        video_weights: of each pass's video.
        audio_weights: of each pass's audio.
        rescale: r in 0..1; the clean estimate p becomes ``p * (r * std(conditional) / std(p) + 1 - r)``, per sample
            and modality, against the contrast that large scales bring (2305.08891, section 3.4; on clean estimates as
            in LTX-2).

    Raises:
        OviError: when the weights of a modality do not sum to 1, a null has a weight, or rescale is out of range.
    """

    passes: tuple[Pass, ...]
    video_weights: tuple[float, ...]
    audio_weights: tuple[float, ...]
    rescale: float = 0.0

    def __post_init__(self) -> None:
        for name, weights in (("video", self.video_weights), ("audio", self.audio_weights)):
            if len(weights) != len(self.passes) or abs(sum(weights) - 1) > 1e-6:
                raise OviError(f"guidance needs one {name} weight a pass, summing to 1; got {weights}")
            for p, weight in zip(self.passes, weights):
                if p.null not in (None, "video", "audio"):
                    raise OviError(f"a pass's null is 'video', 'audio' or None, got {p.null!r}")
                if p.null == name and weight:
                    raise OviError(
                        f"a pass whose {name} is a null says nothing of it: its weight must be 0, not {weight}"
                    )
        if not 0 <= self.rescale <= 1:
            raise OviError(f"generation.guidance.rescale must be in 0 to 1, got {self.rescale}")

    @property
    def used(self) -> tuple[int, ...]:
        """Numbers of the passes that have to run: those with a weight, and the conditional one for ``rescale``."""
        weighted = [bool(v or a) for v, a in zip(self.video_weights, self.audio_weights)]
        return tuple(i for i, some in enumerate(weighted) if some or (i == 0 and self.rescale))

    @property
    def needs_negative(self) -> bool:
        """Whether a pass uses the negative prompt."""
        return not all(self.passes[i].positive for i in self.used)


@GUIDANCES.register("none")
def no_guidance() -> Guidance:
    """The positive prompt alone."""
    return Guidance((Pass(),), (1.0,), (1.0,))


@GUIDANCES.register("cfg")
def cfg(*, video_scale: float = 4.0, audio_scale: float = 3.0, skip_blocks: Sequence[int] = ()) -> Guidance:
    """Classifier-free guidance with a scale per modality (published Ovi: 4 and 3, block 11 skipped).

    ``negative + s * (positive - negative)``.

    Args:
        video_scale: weight of the positive pass for video; 1 is no guidance.
        audio_scale: the same for audio.
        skip_blocks: pairs left out in the negative pass (skip-layer guidance).
    """
    passes = (Pass(), Pass(positive=False, skip_blocks=tuple(skip_blocks)))
    return Guidance(passes, (video_scale, 1 - video_scale), (audio_scale, 1 - audio_scale))


@GUIDANCES.register("modality")
def modality(
    *,
    text_video: float = 3.0,
    text_audio: float = 7.0,
    perturb_video: float = 0.0,
    perturb_audio: float = 0.0,
    exchange_video: float = 3.0,
    exchange_audio: float = 3.0,
    perturb_blocks: Sequence[int] = (),
    rescale: float = 0.7,
) -> Guidance:
    """Away from no text, from perturbed self-attention and from no exchange, each with its scale (LTX-2, 2601.03233).

    ``c + (s_text - 1) (c - negative) + s_perturb (c - perturbed) + (s_exchange - 1) (c - without exchange)`` of the
    conditional pass c, then rescaled. LTX-2 itself perturbs block 29 of 48 with a scale of 1. Without exchange is what
    training with ``flow.exchange_dropout`` teaches.

    Args:
        text_video: text scale of video; 1 is none.
        text_audio: text scale of audio.
        perturb_video: scale of the spatio-temporal perturbation for video; 0 is none.
        perturb_audio: the same for audio.
        exchange_video: scale of the exchange (LTX-2's modality scale) for video; 1 is none.
        exchange_audio: the same for audio.
        perturb_blocks: blocks of both towers whose self-attention is replaced by its values in the perturbed pass.
        rescale: how far the result's deviation is brought to the conditional pass's, 0 to 1.

    Raises:
        OviError: for a scale of the perturbation without blocks to perturb.
    """
    if (perturb_video or perturb_audio) and not perturb_blocks:
        raise OviError(
            f"generation.guidance: perturb_video={perturb_video} and perturb_audio={perturb_audio} need "
            "perturb_blocks, the blocks to perturb, such as perturb_blocks=[2]"
        )
    passes = (Pass(), Pass(positive=False), Pass(perturb_blocks=tuple(perturb_blocks)), Pass(a2v=0.0, v2a=0.0))

    def weights(text: float, perturb: float, exchange: float) -> tuple[float, ...]:
        return text + perturb + exchange - 1, 1 - text, -perturb, 1 - exchange

    video = weights(text_video, perturb_video, exchange_video)
    audio = weights(text_audio, perturb_audio, exchange_audio)
    return Guidance(passes, video, audio, rescale)


@GUIDANCES.register("dual")
def dual(
    *,
    text_video: float = 4.0,
    text_audio: float = 3.0,
    exchange_video: float = 2.0,
    exchange_audio: float = 2.0,
) -> Guidance:
    """Text and exchange guided apart, one upon the other (MOVA, 2602.08794).

    ``neither + s_exchange (exchange - neither) + s_text (text and exchange - exchange)``, neither being the negative
    prompt without exchange. An exchange scale of 1 is classifier-free guidance. Without exchange is what training with
    ``flow.exchange_dropout`` teaches.

    Args:
        text_video: scale of the prompt for video.
        text_audio: scale of the prompt for audio.
        exchange_video: scale of what video hears.
        exchange_audio: scale of what audio sees.
    """
    passes = (Pass(), Pass(positive=False), Pass(positive=False, a2v=0.0, v2a=0.0))
    return Guidance(
        passes,
        (text_video, exchange_video - text_video, 1 - exchange_video),
        (text_audio, exchange_audio - text_audio, 1 - exchange_audio),
    )


@GUIDANCES.register("sync")
def sync(*, video_scale: float = 2.0, audio_scale: float = 2.0) -> Guidance:
    """Away from what a modality would be beside a clean null of its partner (Harmony's SyncCFG, 2511.21579).

    ``null + s (joint - null)``: beside null audio for video, beside null video for audio; three passes. The clean
    partner is what training with ``flow/timesteps=tasks`` teaches.

    Args:
        video_scale: weight of the joint pass for video; 1 is no guidance.
        audio_scale: the same for audio.
    """
    passes = (Pass(), Pass(null="audio"), Pass(null="video"))
    return Guidance(passes, (video_scale, 1 - video_scale, 0.0), (audio_scale, 0.0, 1 - audio_scale))


@GUIDANCES.register("interaction")
def interaction(*, video_scale: float = 2.0, audio_scale: float = 2.0) -> Guidance:
    """Away from what each modality would be without the exchange (UniAVGen's MA-CFG, 2511.03334).

    ``without + s (with - without)``, both with the positive prompt. Without exchange is what training with
    ``flow.exchange_dropout`` teaches.

    Args:
        video_scale: weight of the pass with exchange for video; 1 is no guidance.
        audio_scale: the same for audio.
    """
    passes = (Pass(), Pass(a2v=0.0, v2a=0.0))
    return Guidance(passes, (video_scale, 1 - video_scale), (audio_scale, 1 - audio_scale))


@dataclass(frozen=True)
class Prompts:
    """Text embeddings of a batch for both towers, positive and negative: lists of [n_i, text_dim]."""

    video: Sequence[Tensor]
    audio: Sequence[Tensor]
    negative_video: Sequence[Tensor]
    negative_audio: Sequence[Tensor]


def guided(
    model: Callable[..., tuple[Tensor, Tensor]],
    guidance: Guidance,
    prompts: Prompts,
    *,
    passes_at_once: int | None = None,
    **conditions: Any,
) -> Network:
    """The guided velocity field of a twin: (video, audio, sigma) -> velocities.

    A model that has ``encode_text`` gets every prompt encoded once, not in every step.

    Args:
        model: called as ``TwinDiT`` is; given a sigma for each modality, or ``perturb_blocks``, only where a pass asks
            for it.
        guidance: passes and weights.
        prompts: text of both towers.
        passes_at_once: passes that go through the network as one batch; None for all.
        conditions: further keywords for every pass, such as clean_first_frame.
    """
    used = guidance.used
    step = passes_at_once or len(used)
    groups = [used[first : first + step] for first in range(0, len(used), step)]
    # A given frame is no estimate: it takes no part in the deviations.
    num_given = 1 if conditions.get("clean_first_frame") else 0

    @functools.cache
    def texts(group: tuple[int, ...]) -> tuple[Any, Any]:
        passes = [guidance.passes[i] for i in group]
        video = [t for p in passes for t in (prompts.video if p.positive else prompts.negative_video)]
        audio = [t for p in passes for t in (prompts.audio if p.positive else prompts.negative_audio)]
        encode = getattr(model, "encode_text", None)
        return (video, audio) if encode is None else encode(video, audio)

    def run(group: tuple[int, ...], video: Tensor, audio: Tensor, sigma: Sigma) -> tuple[Tensor, Tensor]:
        passes, size = [guidance.passes[i] for i in group], video.shape[0]
        nulls = [p.null for p in passes]
        sigma_video, sigma_audio = of_each(sigma)
        levels = _joined(sigma_video, "video", nulls), _joined(sigma_audio, "audio", nulls)
        apart = isinstance(sigma, tuple) or any(nulls)
        further = dict(conditions)
        if any(p.perturb_blocks for p in passes):
            further["perturb_blocks"] = _blocks([p.perturb_blocks for p in passes], size)
        return model(
            _joined(video, "video", nulls),
            _joined(audio, "audio", nulls),
            levels if apart else levels[0],
            *texts(group),
            skip_blocks=_blocks([p.skip_blocks for p in passes], size),
            a2v=_gates([p.a2v for p in passes], size, sigma_video),
            v2a=_gates([p.v2a for p in passes], size, sigma_video),
            **further,
        )

    def velocity(video: Tensor, audio: Tensor, sigma: Sigma) -> tuple[Tensor, Tensor]:
        total_video, total_audio = torch.zeros_like(video), torch.zeros_like(audio)
        conditional: tuple[Tensor, Tensor] | None = None
        for group in groups:
            v, a = run(group, video, audio, sigma)
            for i, v_pass, a_pass in zip(group, v.chunk(len(group)), a.chunk(len(group))):
                if i == 0 and guidance.rescale:
                    conditional = v_pass, a_pass
                if guidance.video_weights[i]:
                    total_video = total_video + guidance.video_weights[i] * v_pass
                if guidance.audio_weights[i]:
                    total_audio = total_audio + guidance.audio_weights[i] * a_pass
        if conditional is not None:
            levels, r = of_each(sigma), guidance.rescale
            total_video = rescaled(total_video, conditional[0], video, levels[0], r, num_given=num_given)
            total_audio = rescaled(total_audio, conditional[1], audio, levels[1], r)
        return total_video, total_audio

    return velocity


def rescaled(
    velocity: Tensor, conditional: Tensor, x: Tensor, sigma: Tensor, strength: float, *, num_given: int = 0
) -> Tensor:
    """A guided velocity whose clean estimate has, as far as asked, the deviation of the conditional one's.

    ``p * (r * std(c) / std(p) + 1 - r)`` of the clean estimates ``p = x - sigma * velocity`` and c, per sample.

    Args:
        velocity: guided, [B, ...].
        conditional: velocity of the conditional pass.
        x: the noised latent.
        sigma: its noise level, [B].
        strength: r in 0..1.
        num_given: leading frames of a video latent [B, C, F, H, W] that are given and count for no deviation.
    """
    level = per_sample(sigma, x)
    wanted, have = ((x - level * v)[:, :, num_given:].flatten(1).std(1) for v in (conditional, velocity))
    factor = per_sample(strength * wanted / have.clamp_min(1e-12) + 1 - strength, x)
    # (x - factor * p) / sigma, without a difference of near equals. Solvers count in thousandths: below is 0.
    return factor * velocity + (1 - factor) * x / level.clamp_min(1e-3)


def _joined(x: Tensor, name: str, nulls: list[str | None]) -> Tensor:
    """A modality's latent or sigma [B, ...] once a pass, zeros where it is the null."""
    return torch.cat([torch.zeros_like(x) if null == name else x for null in nulls])


def _blocks(blocks: list[tuple[int, ...]], size: int) -> tuple[int, ...] | list[tuple[int, ...]]:
    """Blocks that a joined batch names; those of each of its samples where passes differ."""
    return blocks[0] if len(set(blocks)) == 1 else [b for b in blocks for _ in range(size)]


def _gates(values: list[float], size: int, like: Tensor) -> float | Tensor:
    """One gate per sample of the joined batch; a plain number when all passes agree."""
    if len(set(values)) == 1:
        return values[0]
    # Pinned and not waited for: the host runs on while the few numbers travel.
    gates = torch.tensor(values, pin_memory=like.is_cuda).to(like.device, non_blocking=True)
    return gates.repeat_interleave(size)


def no_text(like: Tensor) -> Tensor:
    """The embedding of no prompt at all: one row of zeros, as text dropout trains it; like [n, text_dim]."""
    return like.new_zeros(1, like.shape[-1])
