"""Two towers, a plan that pairs their blocks, and one fusion per pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ovi.block import Block
from ovi.clock import Clock
from ovi.errors import OviError
from ovi.fusion.base import Fusion
from ovi.geometry import Geometries, Geometry, Positions, build_geometry
from ovi.layout import LatentLayout
from ovi.plan import LayerPlan, PlanSpec, fused_pairs, layer_plan
from ovi.recompute import CheapOperations, Recompute, straight
from ovi.rope import Alignment, Scaling, seconds
from ovi.stream import Control, EncodedText, Gate, Stream
from ovi.tower import Text, Tower


class TwinDiT(nn.Module):
    """Joint audio-video velocity network (2510.01284).

    Args:
        video: the video tower.
        audio: the audio tower.
        clock: rates of the latents it is fed.
        fusion: builds the Fusion of a pair from its (video, audio) blocks.
        plan: which blocks are paired and exchange, as ``layer_plan`` takes it.
        rope_alignment: positions of latent frames and audio tokens in time, for self-attention and the exchange.
        self_alignment: another alignment for self-attention; None takes the same.
        time_axis_only: rotate the exchange's video tokens by time alone, not by height and width too as published.
        rope_scaling: how rotations change for clips longer than those trained on; None not at all.
        recompute: what training computes again instead of keeping; None keeps everything.

    Raises:
        OviError: for a plan that the towers' depths do not allow, or a fusion that their widths, or two sets of
            positions, do not.
    """

    def __init__(
        self,
        video: Tower,
        audio: Tower,
        clock: Clock,
        *,
        fusion: Callable[[Block, Block], Fusion],
        plan: PlanSpec = "all",
        rope_alignment: Alignment = seconds,
        self_alignment: Alignment | None = None,
        time_axis_only: bool = False,
        rope_scaling: Scaling | None = None,
        recompute: Recompute | None = None,
    ) -> None:
        super().__init__()
        self.video, self.audio, self.clock = video, audio, clock
        self.rope_alignment, self.self_alignment = rope_alignment, self_alignment or rope_alignment
        self.time_axis_only, self.recompute = time_axis_only, recompute or straight
        self.rope_scaling = rope_scaling
        self.plan = layer_plan(plan, len(video.blocks), len(audio.blocks))
        self.fusions = nn.ModuleList(
            fusion(video.blocks[v], audio.blocks[a])  # type: ignore[arg-type]
            for v, a in fused_pairs(self.plan)
        )
        if any(f.one_clock for f in self.fusions):
            self._require_one_clock()
        self._geometries = Geometries()
        # Of one token each: widths that no rotation fits show here and not in the first step.
        with torch.device("cpu"):
            build_geometry(self._positions, self._towers, ((1, 1, 1), (1,)), torch.device("cpu"))

    def forward(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        sigma: Tensor | tuple[Tensor, Tensor],
        video_text: Text | EncodedText | None,
        audio_text: Text | EncodedText | None,
        *,
        clean_first_frame: bool = False,
        skip_blocks: Blocks = (),
        perturb_blocks: Blocks = (),
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
            video_text: prompt for the video tower, [B, n, text_dim] or a list of [n_i, text_dim], or what
                ``encode_text`` made of it; None without video.
            audio_text: the same for the audio tower.
            clean_first_frame: the first latent frame is given clean (image-to-video).
            skip_blocks: blocks of both towers left out whole, counted from 0 (skip-layer guidance); or one such
                sequence a sample.
            perturb_blocks: likewise, blocks whose self-attention is replaced by its values (spatio-temporal guidance).
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
        given = {
            "video": video,
            "audio": audio,
            "sigma": sigma_video,
            "audio's sigma": sigma_audio,
            "a2v": a2v,
            "v2a": v2a,
        }
        size = _batch_size({**given, "audio_mask": audio_mask})
        if audio_mask is not None and (
            audio_mask.dtype != torch.bool or audio is None or audio_mask.shape != audio.shape[:2]
        ):
            raise OviError(
                f"audio_mask must be bool [B, L], True for real tokens of the audio; got {audio_mask.dtype} "
                f"{list(audio_mask.shape)}"
            )
        for name, blocks in (("skip_blocks", skip_blocks), ("perturb_blocks", perturb_blocks)):
            self._check_blocks(name, blocks, size)
        geometry = self._geometry(video, audio)
        texts = self.encode_text(
            None if video is None else _given(video_text, "video"),
            None if audio is None else _given(audio_text, "audio"),
            text_mask,
            keys=False,
        )
        _batch_size({"sigma": sigma_video, **{f"{n}_text": t and t.tokens for n, t in zip(("video", "audio"), texts)}})

        def embed(i: int, latent: Tensor | None, sigma: Tensor, **options: Any) -> Stream | None:
            text = texts[i]
            if latent is None or text is None:
                return None
            return self._towers[i].embed(
                latent,
                sigma,
                text,
                geometry.own[i],
                exchange_rope=geometry.queries[i],
                partner_rope=geometry.partner[i],
                times=geometry.times[i],
                rate_hz=(self.clock.latent_fps, self.clock.tokens_per_s)[i],
                **options,
            )

        v = embed(0, video, sigma_video, clean_first_frame=clean_first_frame)
        a = embed(1, audio, sigma_audio, mask=audio_mask)
        control = Control(a2v, v2a)
        fusions = iter(self.fusions)
        for n, m in self.plan:
            fusion = next(fusions) if n is not None and m is not None else None
            number = n if n is not None else m
            assert number is not None
            kept = samples_that_run(number, skip_blocks)
            if kept == []:
                continue
            perturbed = _samples_in(number, perturb_blocks, sigma_video)
            own, other = (
                None if s is None or k is None else _at_block(k, s, text).with_values_only(perturbed)
                for k, s, text in zip((n, m), (v, a), texts)
            )
            if kept is None:
                own, other = self._step(number, n, m, fusion, own, other, control)
            else:
                some = [s and s.samples(kept) for s in (own, other)]
                done = self._step(number, n, m, fusion, some[0], some[1], control.samples(kept))
                own, other = (s and part and s.with_samples(kept, part.tokens) for s, part in zip((own, other), done))
            v, a = own or v, other or a
        return None if v is None else self.video.head(v), None if a is None else self.audio.head(a)

    def encode_text(
        self,
        video_text: Text | EncodedText | None,
        audio_text: Text | EncodedText | None,
        mask: Tensor | None = None,
        *,
        keys: bool = True,
    ) -> tuple[EncodedText | None, EncodedText | None]:
        """Prompts of both towers for repeated use, in every step of sampling: they depend on no noise level.

        Args:
            video_text: as ``forward`` takes it; None stays None.
            audio_text: likewise.
            mask: text tokens that may be attended, [B, text_len] bool.
            keys: also compute the keys and values of every block, 4 * D numbers a token, block and pair of towers.
        """
        encoded = any(isinstance(text, EncodedText) for text in (video_text, audio_text))
        if encoded and mask is not None:
            raise OviError("text_mask came with prompts that are encoded already: give it to encode_text")
        video, audio = (
            text if text is None or isinstance(text, EncodedText) else tower.encode_text(text, mask, keys=keys)
            for tower, text in zip(self._towers, (video_text, audio_text))
        )
        return video, audio

    def compile_layers(self, **options: Any) -> None:
        """Compile every pair of blocks with its fusion, in place; state names stay.

        Args:
            options: for ``torch.compile``; without graph breaks (``fullgraph``) unless they say otherwise.

        Raises:
            OviError: with ``recompute=operation``, which cannot see inside compiled code.
        """
        if isinstance(self.recompute, CheapOperations):
            raise OviError(
                "model/recompute=operation works on operations one by one, a compiled block has none: the compiler "
                "chooses by itself what to keep. Use model/recompute=none or block with compile=true"
            )
        for module in (*self.fusions, *self.video.blocks, *self.audio.blocks):
            module.compile(**{"fullgraph": True, **options})

    @property
    def _towers(self) -> tuple[Tower, Tower]:
        return self.video, self.audio

    def _require_one_clock(self) -> None:
        """Positions and frequencies must agree where own and partner's tokens meet in one softmax."""
        if self.self_alignment is not self.rope_alignment:
            raise OviError(
                "model.self_alignment: this fusion has one attention for both modalities, so one set of positions: "
                "set model.self_alignment=null, or choose another model/fusion"
            )
        sizes, thetas = ([(t.dim, t.num_heads) for t in self._towers], [t.theta for t in self._towers])
        if sizes[0] == sizes[1] and thetas[0] != thetas[1]:  # towers of unequal size turn the partner's keys themselves
            raise OviError(
                "model.video.theta={:g} and model.audio.theta={:g}: this fusion has one attention for both modalities, "
                "so one base of RoPE frequencies: set them alike".format(*thetas)
            )

    def _check_blocks(self, name: str, blocks: Blocks, size: int) -> None:
        depth = max(len(tower.blocks) for tower in self._towers)
        named = {n for entry in blocks for n in (entry if isinstance(entry, Sequence) else (entry,))}
        if any(not 0 <= n < depth for n in named):
            raise OviError(f"{name} names {sorted(named)}, but the towers have blocks 0 to {depth - 1}")
        unequal = [p for p in fused_pairs(self.plan) if p[0] != p[1] and named & set(p)]
        if unequal:
            raise OviError(f"{name} names {sorted(named)}, but model.plan pairs blocks of unequal number: {unequal}")
        if any(isinstance(entry, Sequence) for entry in blocks) and len(blocks) != size:
            raise OviError(f"{name} has {len(blocks)} entries for a batch of {size}: give one a sample")

    def _step(
        self,
        number: int,
        n: int | None,
        m: int | None,
        fusion: nn.Module | None,
        v: Stream | None,
        a: Stream | None,
        control: Control,
    ) -> tuple[Stream | None, Stream | None]:
        """One step of the plan: a pair through its fusion, or each block of it alone."""
        run = self.recompute if torch.is_grad_enabled() else straight
        if fusion is not None and v is not None and a is not None:
            v, a = run(number, fusion, v, a, self.video.blocks[n], self.audio.blocks[m], control)  # type: ignore[index]
            return v, a
        if v is not None:
            v = run(number, self.video.blocks[n], v)  # type: ignore[index]
        if a is not None:
            a = run(number, self.audio.blocks[m], a)  # type: ignore[index]
        return v, a

    def _geometry(self, video: Tensor | None, audio: Tensor | None) -> Geometry:
        """What a pair of latents' shapes fix."""
        grid_v = (0, 0, 0) if video is None else self.video.patch_embedding.grid(video)
        grid_a = (0,) if audio is None else self.audio.patch_embedding.grid(audio)
        device = (video if video is not None else audio).device  # type: ignore[union-attr]
        return self._geometries.of(self._positions, self._towers, (grid_v, grid_a), device)

    @property
    def _positions(self) -> Positions:
        # Asked anew each time, so that an alignment exchanged in a notebook takes effect.
        return Positions(self.clock, self.self_alignment, self.rope_alignment, self.rope_scaling, self.time_axis_only)


Blocks = Sequence[int] | Sequence[Sequence[int]]
"""Numbers of blocks, for the whole batch or one sequence a sample."""


def samples_that_run(block: int, skip_blocks: Blocks) -> list[int] | None:
    """Which samples of a batch a block runs on; None for all of them.

    Args:
        block: its number.
        skip_blocks: as ``TwinDiT`` takes it.
    """
    if not any(isinstance(skipped, Sequence) for skipped in skip_blocks):
        return [] if block in skip_blocks else None
    kept = [i for i, skipped in enumerate(skip_blocks) if block not in skipped]  # type: ignore[operator]
    return None if len(kept) == len(skip_blocks) else kept


def _given(text: Text | EncodedText | None, name: str) -> Text | EncodedText:
    if text is None:
        raise OviError(f"the {name} latent came without {name}_text: give its prompt embeddings")
    return text


def _at_block(n: int, s: Stream, text: EncodedText | None) -> Stream:
    return s if text is None or not text.keys else s.with_text(text.prompt(n))


def _samples_in(block: int, blocks: Blocks, like: Tensor) -> Tensor | None:
    """Which samples name a block, [B] bool on the device of ``like`` [B]; None when none does."""
    kept = samples_that_run(block, blocks)
    if kept is None:
        return None
    named = torch.tensor([i not in kept for i in range(len(like))], pin_memory=like.is_cuda)
    return named.to(like.device, non_blocking=True)


def _batch_size(given: Mapping[str, Any]) -> int:
    """The one batch size of all tensors given; numbers and None have none.

    Raises:
        OviError: naming the sizes, when they differ or a tensor has no batch axis.
    """
    tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
    shapes = {name: list(x.shape) for name, x in tensors.items()}
    if any(not shape for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) != 1:
        raise OviError(f"the batch sizes differ: {shapes}; video, audio, sigma, masks and gates share their first axis")
    return next(iter(shapes.values()))[0]


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
