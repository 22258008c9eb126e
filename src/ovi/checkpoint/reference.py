"""Published Ovi weights in and out: a twin from them without a second copy, and a twin to them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovi.checkpoint.files import Source, Weights, read_weights
from ovi.checkpoint.fit import check_fit, in_our_names
from ovi.checkpoint.names import MODALITIES, PUBLISHED, to_reference
from ovi.checkpoint.published import PUBLISHED_FACTOR, check_form, differences, metadata_of
from ovi.checkpoint.sizes import stored_clock, stored_config, tower_of
from ovi.checkpoint.skeleton import without_storage
from ovi.checkpoint.write import write_weights
from ovi.clock import Clock
from ovi.errors import OviError
from ovi.fusion.ovi import OviFusion
from ovi.rope import scale
from ovi.twin import TwinDiT

WHOLE = (*MODALITIES, "fusions")
"""Parts of a whole twin."""


def load_reference(
    source: Source,
    *,
    video_config: Mapping[str, Any] | None = None,
    audio_config: Mapping[str, Any] | None = None,
    clock: Clock | None = None,
    dtype: torch.dtype | None = None,
) -> TwinDiT:
    """A twin with published weights. The model is made without storage and takes the tensors one by one.

    Without a cast its parameters are the file's pages, read when first used and copied when first written to: a file
    larger than memory loads at once, and training leaves it as it is. Of a state dict it shares the tensors.

    Args:
        source: a .safetensors file, the .index.json of a sharded one, their folder, a .pt file of the authors, or a
            state dict in published names.
        video_config: the reference's own configuration of the tower (dim, num_heads, num_layers, ...). None takes what
            ``save_reference`` wrote into the file; where that is nothing, sizes are read off the tensors, with heads
            128 wide and 512 text tokens as in all published models.
        audio_config: likewise; its ``temporal_rope_scaling_factor`` is 0.19676 where nothing says otherwise.
        clock: rates of the latents; None takes the file's, or the published ones.
        dtype: to cast to; None keeps the stored one.

    Raises:
        OviError: for a source that cannot be read, a configuration that contradicts it, or tensors that are missing,
            unexpected or misshapen: all in one.
    """
    weights = read_weights(source)
    if weights.scheme is not PUBLISHED:
        raise OviError(
            f"{weights.origin} holds {weights.scheme.name}, not a whole Ovi checkpoint in published names: "
            "load_towers takes its towers into a model that exists"
        )
    tensors, unknown = in_our_names(weights)
    configs = {
        modality: stored_config(weights, modality) if given is None else given
        for modality, given in (("video", video_config), ("audio", audio_config))
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    video, audio = (tower_of(shapes, modality, configs[modality]) for modality in MODALITIES)
    factor = float(configs["audio"].get("temporal_rope_scaling_factor", PUBLISHED_FACTOR))
    rates = clock or Clock(**(stored_clock(weights) or {}))
    with without_storage():
        model = TwinDiT(video(), audio(), rates, fusion=OviFusion, rope_alignment=partial(scale, factor=factor))
    check_fit({name: tuple(t.shape) for name, t in model.state_dict().items()}, tensors, unknown, weights)
    _warn_of_differences(weights)
    for name, tensor in tensors.items():
        _assign(model, name, tensor if dtype is None else tensor.to(dtype))
    return model


def save_reference(
    model: TwinDiT,
    path: str | Path,
    *,
    parts: Collection[str] = WHOLE,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    allow_differences: bool = False,
) -> list[Path]:
    """Write a twin in published names, whole or not at all; the original and tools that read it run it.

    Sizes that tensors do not show (heads, text length, RoPE factor, rates) go into the header, where ``load_reference``
    finds them; the original takes them from its own configuration.

    Args:
        model: the twin; only one tensor at a time is held beside it.
        path: ends in .safetensors; what stood there is replaced.
        parts: of ``video``, ``audio`` and ``fusions``; towers alone need no published fusion.
        dtype: to cast to; None keeps the model's.
        max_shard_bytes: writes shards of at most that size, with an index; None writes one file.
        allow_differences: write even a twin that the original would run differently, because its positions in time or
            its masks are others; what differs is noted in the header and said when the file is loaded.

    Returns:
        The files written.

    Raises:
        OviError: for a twin without published form, one that the original would run differently, or a disk that
            refuses.
    """
    check_form(model, parts)
    differs = differences(model, parts)
    if differs and not allow_differences:
        raise OviError(
            f"the original would run this twin's weights differently: {'; '.join(differs)}. To write them all the "
            "same, give allow_differences=True (ovi convert --allow-differences)"
        )
    state = {name: t for name, t in model.state_dict().items() if name.partition(".")[0] in parts}
    return write_weights(
        path,
        to_reference(state),
        metadata=metadata_of(model, parts),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def _warn_of_differences(weights: Weights) -> None:
    text = weights.metadata.get("differences")
    if text is not None:
        warnings.warn(
            f"{weights.origin}: these weights were trained otherwise than the published network runs: "
            f"{'; '.join(json.loads(text))}",
            stacklevel=3,
        )


def _assign(model: TwinDiT, name: str, tensor: Tensor) -> None:
    module_name, _, leaf = name.rpartition(".")
    setattr(
        model.get_submodule(module_name), leaf, torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    )
