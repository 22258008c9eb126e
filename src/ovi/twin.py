"""Two towers, a plan that pairs their blocks, and one fusion per pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ovi.block import Block
from ovi.clock import Clock
from ovi.errors import OviError
from ovi.fusion.base import Fusion, alone
from ovi.layout import LatentLayout
from ovi.rope import Alignment, Rotation, seconds
from ovi.stream import Control, Gate, Stream
from ovi.tower import Tower

LayerPlan = list[tuple[int | None, int | None]]
"""Which video block runs beside which audio block, in order; None where a block has no partner."""

Text = Tensor | Sequence[Tensor]

Ropes = tuple[tuple[Rotation, Rotation], tuple[Rotation, Rotation], tuple[Rotation, Rotation]]
"""Rotations of (video, audio): in self-attention, as queries of the exchange, of each one's partner's keys."""


class TwinDiT(nn.Module):
    """Joint audio-video velocity network (2510.01284).

    Args:
        video: the video tower.
        audio: the audio tower.
        clock: rates of the latents it is fed.
        fusion: builds the Fusion of a pair from its (video, audio) blocks.
        rope_alignment: positions of latent frames and audio tokens in time, for self-attention and the exchange.
        self_alignment: another alignment for self-attention; None takes the same.
        time_only: rotate the exchange's video tokens by time alone, not by height and width too as published.

    Raises:
        OviError: for towers of unequal depth.
    """

    def __init__(
        self,
        video: Tower,
        audio: Tower,
        clock: Clock,
        *,
        fusion: Callable[[Block, Block], Fusion],
        rope_alignment: Alignment = seconds,
        self_alignment: Alignment | None = None,
        time_only: bool = False,
    ) -> None:
        super().__init__()
        if len(video.blocks) != len(audio.blocks):
            raise OviError(
                f"towers of {len(video.blocks)} and {len(audio.blocks)} blocks cannot be paired one to one: "
                "set model.video.num_blocks and model.audio.num_blocks alike"
            )
        self.video, self.audio, self.clock = video, audio, clock
        self.rope_alignment, self.self_alignment = rope_alignment, self_alignment or rope_alignment
        self.time_only = time_only
        self.plan: LayerPlan = [(n, n) for n in range(len(video.blocks))]
        self.fusions = nn.ModuleList(fusion(video.blocks[n], audio.blocks[n]) for n in range(len(video.blocks)))  # type: ignore[arg-type]
        self._rotations: dict[Any, Ropes] = {}

    def forward(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        sigma: Tensor | tuple[Tensor, Tensor],
        video_text: Text | None,
        audio_text: Text | None,
        *,
        clean_first_frame: bool = False,
        skip_blocks: Sequence[int] = (),
        a2v: Gate = 1.0,
        v2a: Gate = 1.0,
        text_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Velocity (noise - data) of both modalities.

        Args:
            video: noised latent [B, C, F, H, W], or None to run audio alone.
            audio: noised latent [B, L, C], or None to run video alone.
            sigma: noise level in 0..1 (1 = noise), [B], or one for each modality.
            video_text: prompt for the video tower, [B, n, text_dim] or a list of [n_i, text_dim]; None without video.
            audio_text: the same for the audio tower.
            clean_first_frame: the first latent frame is given clean (image-to-video).
            skip_blocks: pairs left out whole, counted from 0 (skip-layer guidance).
            a2v: gate of what video hears, a number or [B]; 0 is off.
            v2a: gate of what audio sees.
            text_mask: text tokens that may be attended, [B, text_len] bool.
            audio_mask: real audio tokens, [B, L] bool.

        Returns:
            Velocities of the latents' shapes; None for an absent modality.

        Raises:
            OviError: without any latent, without the text of a latent, or for shapes that do not fit.
        """
        if video is None and audio is None:
            raise OviError("the twin needs a video latent, an audio latent, or both; both are None")
        sigma_video, sigma_audio = sigma if isinstance(sigma, tuple) else (sigma, sigma)
        self_ropes, exchange_ropes, partner_ropes = self._ropes(video, audio)

        def embed(
            i: int, name: str, latent: Tensor | None, s: Tensor, text: Text | None, **options: Any
        ) -> Stream | None:
            if latent is None:
                return None
            if text is None:
                raise OviError(f"the {name} latent came without {name}_text: give its prompt embeddings")
            tower = self.video if i == 0 else self.audio
            return tower.embed(
                latent,
                s,
                text,
                self_ropes[i],
                exchange_rope=exchange_ropes[i],
                partner_rope=partner_ropes[i],
                text_mask=text_mask,
                **options,
            )

        v = embed(0, "video", video, sigma_video, video_text, clean_first_frame=clean_first_frame)
        a = embed(1, "audio", audio, sigma_audio, audio_text, mask=audio_mask)
        control = Control(a2v, v2a)
        for n, fusion in enumerate(self.fusions):
            if n in skip_blocks:
                continue
            blocks = self.video.blocks[n], self.audio.blocks[n]
            if v is not None and a is not None:
                v, a = fusion(v, a, *blocks, control)
            elif v is not None:
                v = alone(v, blocks[0])  # type: ignore[arg-type]
            elif a is not None:
                a = alone(a, blocks[1])  # type: ignore[arg-type]
        return None if v is None else self.video.head(v), None if a is None else self.audio.head(a)

    def _ropes(self, video: Tensor | None, audio: Tensor | None) -> Ropes:
        """The rotations of a pair of latents, built once per shape and device, on the host in float64."""
        grid_v = (0, 0, 0) if video is None else self.video.patch_embedding.grid(video)
        grid_a = (0,) if audio is None else self.audio.patch_embedding.grid(audio)
        device = (video if video is not None else audio).device  # type: ignore[union-attr]
        key = (grid_v, grid_a, device)
        if key not in self._rotations:
            # Validation may come first, in inference mode, and training could not use tensors made there.
            with torch.inference_mode(False):
                self._rotations[key] = self._build_ropes((grid_v, grid_a), device)
        return self._rotations[key]

    def _build_ropes(self, grids: tuple[tuple[int, ...], tuple[int, ...]], device: torch.device) -> Ropes:
        towers = (self.video, self.audio)

        def pair(alignment: Alignment, *, time_only: bool, of_partner: bool) -> tuple[Rotation, Rotation]:
            times, built = alignment(self.clock, grids[0][0], grids[1][0]), []
            for i, tower in enumerate(towers):
                # A partner's keys are rotated by the partner's positions at the querying tower's head width.
                source = 1 - i if of_partner else i
                cos, sin = towers[source].patch_embedding.rotation(
                    times[source], grids[source], tower.head_dim, theta=tower.theta, time_only=time_only
                )
                built.append(Rotation(cos.to(device), sin.to(device)))
            return built[0], built[1]

        return (
            pair(self.self_alignment, time_only=False, of_partner=False),
            pair(self.rope_alignment, time_only=self.time_only, of_partner=False),
            pair(self.rope_alignment, time_only=self.time_only, of_partner=True),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rotations": {}}


def build_twin(
    layout: LatentLayout,
    *,
    video: Callable[[int, int, int], Tower],
    audio: Callable[[int, int, int], Tower],
    expects: Mapping[str, Any] | None = None,
    **knobs: Any,
) -> TwinDiT:
    """A twin that fits the latents of a shard set.

    Args:
        layout: channels, text width and clock of the latents.
        video: builds the video tower from (channels, text_dim, text_len).
        audio: builds the audio tower likewise.
        expects: parts of the layout the model insists on, as ``{video_channels: 48, fps: 24}``.
        knobs: those of TwinDiT.

    Raises:
        OviError: when the latents are not what the model expects, naming each difference.
    """
    have = {**layout.to_dict(), **layout.clock.to_dict()}
    wrong = [
        f"{name} {have.get(name, 'unknown')} where the model expects {value}"
        for name, value in (expects or {}).items()
        if have.get(name) != value
    ]
    if wrong:
        raise OviError(
            f"the latents do not fit the model: {'; '.join(wrong)}. "
            "Encode the data with matching codecs and fps, or change model.expects"
        )
    return TwinDiT(
        video(layout.video_channels, layout.text_dim, layout.text_len),
        audio(layout.audio_channels, layout.text_dim, layout.text_len),
        layout.clock,
        **knobs,
    )


def num_parameters(module: nn.Module) -> int:
    """Trainable and frozen parameters."""
    return sum(p.numel() for p in module.parameters())


__all__ = ["LayerPlan", "TwinDiT", "build_twin", "num_parameters"]
