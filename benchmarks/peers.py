"""Peers that install from the package registry, built to the width and depth of our twin.

An adapter's docstring says what could not be made equal; it goes into the result file. All get the run's latents as
the same number of tokens, and prompts zero-padded to 512 rows without a mask, which leaves them their fastest
attention kernel. All parameters are cast to the run's dtype, also those their pipelines keep in float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange

from candidate import JOINT, VIDEO, Candidate, settled
from ovi.rope import axis_dims
from setting import PATCH, Batch, Setting

Builder = Callable[[Setting, Batch], Candidate]


def ltx2(setting: Setting, batch: Batch) -> Candidate:
    """diffusers' LTX2VideoTransformer3DModel (LTX-2), its audio as wide as its video.

    Feed-forward 4 x width, fixed there, against 4.67. The exchange is two attentions of its own with their queries,
    output projections, modulation and gates (8 D^2 parameters a layer against our 4 D^2). RMS norms without affine in
    place of layer norms; RoPE in the split form, tables computed anew in every forward; audio enters by a linear map.
    """
    from diffusers import LTX2VideoTransformer3DModel

    torch.manual_seed(0)
    channels = setting.video_channels * PATCH[1] * PATCH[2]  # its pipeline packs patches before the network
    with torch.device(setting.device):
        model: Any = LTX2VideoTransformer3DModel(
            in_channels=channels,
            out_channels=channels,
            num_attention_heads=setting.heads,
            attention_head_dim=setting.head_dim,
            cross_attention_dim=setting.width,
            vae_scale_factors=(4, 32, 32),
            audio_in_channels=setting.audio_channels,
            audio_out_channels=setting.audio_channels,
            audio_num_attention_heads=setting.heads,
            audio_attention_head_dim=setting.head_dim,
            audio_cross_attention_dim=setting.width,
            num_layers=setting.layers,
            caption_channels=setting.text_dim,
            rope_type="split",
        )
    settled(model, setting.torch_dtype)
    tokens = rearrange(batch.video, "b c f (h p) (w q) -> b (f h w) (c p q)", p=PATCH[1], q=PATCH[2]).contiguous()
    frames, rows, columns = setting.grid

    def velocities() -> tuple[torch.Tensor, ...]:
        return model(
            tokens,
            batch.audio,
            batch.text,
            batch.text,
            timestep=batch.sigma * 1000,
            num_frames=frames,
            height=rows,
            width=columns,
            audio_num_frames=setting.audio_tokens,
            return_dict=False,
        )

    return Candidate(model, velocities, JOINT, _said(ltx2))


def kandinsky6(setting: Setting, batch: Batch) -> Candidate:
    """diffusers' Kandinsky6Transformer3DModel (Kandinsky 6), flags as in its released configurations.

    Its transformer over the text (4 layers beside 60) is left out, since the depth is matched in the joint layers.
    The exchange is two attentions of its own with queries, output projections, modulation and gates (8 D^2 parameters
    a layer against our 4 D^2). A linear modulation in every block from a time embedding of D/4 (9 D^2/4 parameters a
    tower and layer) where ours has one for all blocks; a pooled text vector besides. Norms, gates and RoPE run in
    float32; QK norm per head; GELU exact; no bias in the feed-forward. One prompt projection, linear. Audio enters by
    a linear map.
    """
    from diffusers import Kandinsky6Transformer3DModel

    torch.manual_seed(0)
    with torch.device(setting.device):
        model: Any = Kandinsky6Transformer3DModel(
            in_visual_dim=setting.video_channels,
            out_visual_dim=setting.video_channels,
            in_text_dim=setting.text_dim,
            time_dim=setting.width // 4,
            patch_size=PATCH,
            model_dim=setting.width,
            ff_dim=setting.ffn,
            num_text_blocks=0,
            num_visual_blocks=setting.layers,
            axes_dims=axis_dims(setting.head_dim),
            visual_cond=False,
            in_audio_dim=setting.audio_channels,
            out_audio_dim=setting.audio_channels,
            ca_rope=True,
            cross_gates=True,
            fix_modulation=True,
        )
        pooled = torch.zeros(setting.batch, 768, dtype=setting.torch_dtype)
    settled(model, setting.torch_dtype)
    video = batch.video.movedim(1, -1).contiguous()

    def velocities() -> tuple[torch.Tensor, ...]:
        return model(video, batch.text, pooled, batch.sigma * 1000, audio_hidden_states=batch.audio, return_dict=False)

    return Candidate(model, velocities, JOINT, _said(kandinsky6))


def wan(setting: Setting, batch: Batch) -> Candidate:
    """diffusers' WanTransformer3DModel (Wan 2.2 TI2V), picture alone: compare with the video tower alone.

    The same architecture as the video tower. One timestep a sample is given, its cheaper form; the pipeline of the 5B
    model gives one a token. Layer norms, modulation and residual sums run in float32.
    """
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device(setting.device):
        model: Any = WanTransformer3DModel(
            patch_size=PATCH,
            num_attention_heads=setting.heads,
            attention_head_dim=setting.head_dim,
            in_channels=setting.video_channels,
            out_channels=setting.video_channels,
            text_dim=setting.text_dim,
            ffn_dim=setting.ffn,
            num_layers=setting.layers,
        )
    settled(model, setting.torch_dtype)

    def velocities() -> tuple[torch.Tensor, ...]:
        return model(batch.video, batch.sigma * 1000, batch.text, return_dict=False)

    return Candidate(model, velocities, VIDEO, _said(wan))


def _said(builder: Builder) -> str:
    return " ".join((inspect.getdoc(builder) or "").split())


PEERS: dict[str, Builder] = {"ltx2": ltx2, "kandinsky6": kandinsky6, "wan": wan}
