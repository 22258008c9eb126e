"""Weights of any scheme to published names, without a model in between."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovi.checkpoint.files import Weights
from ovi.checkpoint.fit import check_fit, in_our_names
from ovi.checkpoint.into import towers_in, wanted_towers
from ovi.checkpoint.names import MODALITIES, to_reference
from ovi.checkpoint.sizes import Shapes, sizes_of, stored_config, tower_of
from ovi.checkpoint.skeleton import without_storage
from ovi.checkpoint.write import write_weights
from ovi.clock import Clock
from ovi.fusion.ovi import OviFusion
from ovi.twin import TwinDiT


def republish(
    weights: Weights,
    path: str | Path,
    *,
    towers: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
) -> list[Path]:
    """Write weights again under published names: cast, whole or in shards, or their towers alone.

    What is written down beside them (heads, eps, RoPE factor) goes into the header; where nothing is, nothing is added.

    Args:
        weights: of ``read_weights``.
        path: ends in .safetensors; what stood there is replaced.
        towers: modalities to keep, without the fusion; None keeps all there is.
        dtype: to cast to; None keeps the stored one.
        max_shard_bytes: writes shards of at most that size; None writes one file.

    Returns:
        The files written.

    Raises:
        OviError: for a tower that is not there, or tensors that are missing, unexpected or misshapen.
    """
    tensors, unknown = in_our_names(weights)
    kept = wanted_towers(weights, towers)
    whole = towers is None and towers_in(weights) == MODALITIES and any(n.startswith("fusions.") for n in tensors)
    parts = (*kept, "fusions") if whole else kept
    configs = {modality: stored_config(weights, modality) for modality in kept}
    got = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in parts}
    check_fit(_expected({n: tuple(t.shape) for n, t in tensors.items()}, configs, whole), got, unknown, weights)
    return write_weights(
        path,
        to_reference(got),
        metadata=_metadata(weights, configs, got),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def _expected(shapes: Shapes, configs: Mapping[str, Mapping[str, Any]], whole: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the whole towers, and twin, that tensors are of; heads leave no trace in them."""
    with without_storage():
        towers = {m: tower_of(shapes, m, {"num_heads": 1, **config})() for m, config in configs.items()}
        if whole:
            twin = TwinDiT(towers["video"], towers["audio"], Clock(), fusion=OviFusion)
            return {name: tuple(t.shape) for name, t in twin.state_dict().items()}
    return {f"{m}.{name}": tuple(t.shape) for m, tower in towers.items() for name, t in tower.state_dict().items()}


def _metadata(
    weights: Weights, configs: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    metadata = {"format": "pt", **{k: weights.metadata[k] for k in ("clock", "differences") if k in weights.metadata}}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for modality, config in configs.items():
        if config:
            metadata[f"{modality}_config"] = json.dumps({**sizes_of(shapes, modality), **config})
    return metadata
