"""What of a twin the published code can express: its configuration, and where it would compute something else."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import torch

from ovi.errors import OviError
from ovi.fusion.base import FUSIONS
from ovi.fusion.ovi import OviFusion
from ovi.patch import PATCHES, AudioPatch, VideoPatch
from ovi.registry import Registry
from ovi.rope import Alignment
from ovi.tower import Tower
from ovi.twin import TwinDiT

PUBLISHED_FACTOR = 0.19676
"""Latent frames per audio token that the published models rotate by (spec, 'RoPE')."""

_KERNEL = 7
_THETA = 10000.0
# Latent frames and audio tokens of the published clips, and shorter: an alignment may depend on the length.
_LENGTHS = ((5, 26), (31, 157), (61, 314))


def check_form(model: TwinDiT, parts: Collection[str]) -> None:
    """See that parts of a twin have the published form.

    Args:
        model: the twin.
        parts: of ``video``, ``audio`` and ``fusions``.

    Raises:
        OviError: naming each part that the published code has no counterpart of, and how to train one that has.
    """
    wrong = []
    if "video" in parts and not isinstance(model.video.patch_embedding, VideoPatch):
        wrong.append(f"its video patch is {_kind(model.video.patch_embedding, PATCHES)}, not 'video'")
    audio = model.audio.patch_embedding
    if "audio" in parts and not isinstance(audio, AudioPatch):
        wrong.append(
            f"its audio patch is {_kind(audio, PATCHES)}, not 'audio': train with model/patch@model.audio.patch=audio"
        )
    elif isinstance(audio, AudioPatch) and "audio" in parts and audio.proj.kernel_size != (_KERNEL,):
        kernel = audio.proj.kernel_size[0]
        wrong.append(f"its audio patch has a kernel of {kernel}: train with model.audio.patch.kernel={_KERNEL}")
    if "fusions" in parts:
        others = sorted({_kind(f, FUSIONS) for f in model.fusions if type(f) is not OviFusion})
        if others:
            wrong.append(
                f"its fusion is {', '.join(others)}, not 'ovi': train with model/fusion=ovi, or write its towers alone"
            )
        if model.plan != [(n, n) for n in range(len(model.fusions))] or len(model.fusions) != len(model.video.blocks):
            wrong.append("not every block of one tower is paired with the block of the same number in the other")
        for name in ("dim", "num_heads"):
            sizes = [getattr(tower, name) for tower in (model.video, model.audio)]
            if sizes[0] != sizes[1]:
                wrong.append(f"its towers differ in {name}, {sizes[0]} and {sizes[1]}, but the fusion needs them alike")
    if wrong:
        raise OviError(f"this twin cannot be written in published names: {'; '.join(wrong)}")


def differences(model: TwinDiT, parts: Collection[str]) -> list[str]:
    """Where the published code, given these parts' tensors, would compute something else; empty when nowhere.

    RoPE positions and masks are in no tensor: a file of weights does not show them.
    """
    found = []
    both = {"video", "audio"} <= set(parts)
    if _factor(model.self_alignment, model, parts) is None or _factor(model.rope_alignment, model, parts) is None:
        found.append(
            "its tokens lie at other positions in time than latent frame i at i and audio token j at factor * j: "
            "train with model/rope_alignment=scale"
        )
    elif both and _factor(model.self_alignment, model, parts) != _factor(model.rope_alignment, model, parts):
        found.append("self-attention and exchange have different positions: train with model.self_alignment=null")
    if _is_scaled(model):
        found.append("its rotations are changed for longer clips: train with model/rope_scaling=identity")
    if "fusions" in parts and model.time_axis_only:
        found.append("the exchange rotates by time alone: train with model.time_axis_only=false")
    for modality in ("video", "audio"):
        tower: Tower = getattr(model, modality)
        if modality not in parts:
            continue
        if tower.theta != _THETA:
            found.append(f"the {modality} tower's theta is {tower.theta:g}: train with {_THETA:g}")
        if tower.mask_text_padding:
            found.append(
                f"the {modality} tower hides the padding of prompts: train with "
                f"model.{modality}.mask_text_padding=false"
            )
    return found


def metadata_of(model: TwinDiT, parts: Collection[str]) -> dict[str, str]:
    """What a checkpoint does not hold, for the header of a safetensors file: JSON by name.

    ``video_config`` and ``audio_config`` have the words of the reference's own configuration; ``clock`` the rates of
    the latents; ``differences`` those of ``differences``, if any.
    """
    metadata: dict[str, str] = {"format": "pt", "clock": json.dumps(model.clock.to_dict())}
    if "video" in parts:
        size = model.video.patch_embedding.size
        metadata["video_config"] = json.dumps({"model_type": "ti2v", "patch_size": size, **_config(model.video)})
    if "audio" in parts:
        factor = _factor(model.rope_alignment, model, parts)
        clock = {} if factor is None else {"temporal_rope_scaling_factor": factor}
        metadata["audio_config"] = json.dumps({"model_type": "t2a", "patch_size": [1], **_config(model.audio), **clock})
    differs = differences(model, parts)
    if differs:
        metadata["differences"] = json.dumps(differs)
    return metadata


def rope_factor(model: TwinDiT) -> float | None:
    """Latent frames per audio token as a twin's tokens lie; None when they lie otherwise than frame i at i."""
    return _factor(model.rope_alignment, model, ("video", "audio"))


def _config(tower: Tower) -> dict[str, Any]:
    block = tower.blocks[0]
    return {
        "dim": tower.dim,
        "ffn_dim": block.ffn[0].out_features,  # type: ignore[index,union-attr]
        "freq_dim": tower.freq_dim,
        "num_heads": tower.num_heads,
        "num_layers": len(tower.blocks),
        "in_dim": tower.patch_embedding.channels,
        "out_dim": tower.patch_embedding.channels,
        "text_len": tower.text_len,
        "text_dim": tower.text_dim,
        "qk_norm": True,
        "cross_attn_norm": True,
        "eps": block.eps,
    }


def _factor(alignment: Alignment, model: TwinDiT, parts: Collection[str]) -> float | None:
    """The factor of an alignment that puts latent frame i at i and audio token j at factor * j; None for another."""
    factors = set()
    for frames, tokens in _LENGTHS:
        video, audio = alignment(model.clock, frames, tokens)
        factor = float(audio[1])
        if "video" in parts and not torch.equal(video, torch.arange(frames, dtype=video.dtype)):
            return None
        if "audio" in parts and not torch.equal(audio, torch.arange(tokens, dtype=audio.dtype) * factor):
            return None
        factors.add(factor if "audio" in parts else 1.0)
    return factors.pop() if len(factors) == 1 else None


def _is_scaled(model: TwinDiT) -> bool:
    if model.rope_scaling is None:
        return False
    positions = torch.arange(_LENGTHS[-1][0], dtype=torch.float64)
    frequencies = _THETA ** -torch.linspace(0, 1, 22, dtype=torch.float64)
    scaled, turned, magnitude = model.rope_scaling(positions, frequencies, _THETA)
    return not (torch.equal(scaled, positions) and torch.equal(turned, frequencies) and magnitude == 1)


def _kind(module: Any, registry: Registry) -> str:
    """The name a component is registered under, or its class's."""
    return repr(next((name for name in registry if registry[name] is type(module)), type(module).__name__))
