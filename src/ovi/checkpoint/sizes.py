"""Sizes of a tower: read off its tensors, and what they do not hold from the configuration written beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ovi.checkpoint.files import Weights
from ovi.checkpoint.names import OURS, PUBLISHED, WAN
from ovi.errors import OviError
from ovi.patch import AudioPatch, VideoPatch
from ovi.tower import Tower

HEAD_DIM = 128
"""Width of a head in every published model; a checkpoint does not hold the number of heads."""

TEXT_LEN = 512
"""Text tokens of every published model; a checkpoint does not hold them either."""

Shapes = Mapping[str, tuple[int, ...]]


def stored_config(weights: Weights, modality: str) -> dict[str, Any]:
    """What is written down of a tower beside its weights, in the words of the reference's configuration.

    It stands in the metadata of files that ``save_reference`` wrote, in the ``config.json`` of Wan2.2 and of diffusers,
    in the record of a run. Empty where nothing is known.

    Raises:
        OviError: for metadata that is no JSON.
    """
    text = weights.metadata.get(f"{modality}_config")
    if text is not None:
        return _parsed(weights, f"{modality}_config", text)
    if weights.scheme is PUBLISHED or weights.scheme is WAN["audio" if modality == "video" else "video"]:
        return {}
    beside = weights.beside.get(modality, {}) if weights.scheme is OURS else weights.beside
    names = {"num_heads": "num_heads", "num_attention_heads": "num_heads", "eps": "eps"}
    return {ours: beside[theirs] for theirs, ours in names.items() if theirs in beside}


def stored_clock(weights: Weights) -> dict[str, Any] | None:
    """Rates of the latents that the weights were trained on, where the file says so."""
    text = weights.metadata.get("clock")
    return None if text is None else _parsed(weights, "clock", text)


def sizes_of(shapes: Shapes, modality: str) -> dict[str, Any]:
    """Sizes of a tower in the words of the reference's configuration, as its tensors have them.

    Args:
        shapes: by our names.
        modality: ``video`` or ``audio``.

    Raises:
        OviError: when a tensor that says a size is missing.
    """

    def shape(name: str, dims: int) -> tuple[int, ...]:
        key = f"{modality}.{name}"
        if len(shapes.get(key, ())) != dims:
            raise OviError(
                f"the checkpoint has no {PUBLISHED.from_ours(key)} of {dims} dimensions, which says the {modality} "
                "tower's size: it is not a whole Ovi checkpoint in published names"
            )
        return shapes[key]

    embedding = shape("patch_embedding.proj.weight", 5 if modality == "video" else 3)
    blocks = [int(m[1]) for m in (re.match(rf"{modality}\.blocks\.(\d+)\.", key) for key in shapes) if m]
    return {
        "dim": embedding[0],
        "in_dim": embedding[1],
        "patch_size": list(embedding[2:]) if modality == "video" else [1],
        "ffn_dim": shape("blocks.0.ffn.0.weight", 2)[0],
        "freq_dim": shape("time_embedding.0.weight", 2)[1],
        "text_dim": shape("text_embedding.0.weight", 2)[1],
        "num_layers": 1 + max(blocks, default=-1),
    }


def tower_of(shapes: Shapes, modality: str, config: Mapping[str, Any]) -> Callable[[], Tower]:
    """A builder of the tower that tensors and configuration describe.

    Args:
        shapes: by our names.
        modality: ``video`` or ``audio``.
        config: the reference's configuration, whole or in part; sizes that it does not say are the tensors'.

    Raises:
        OviError: when tensors and configuration contradict each other, or neither says the number of heads.
    """
    sizes = sizes_of(shapes, modality)
    wrong = [
        f"{name} {_plain(config[name])}, the tensors {size}"
        for name, size in sizes.items()
        if name in config and _plain(config[name]) != size
    ]
    if wrong:
        raise OviError(f"{modality}_config says {'; '.join(wrong)}: give the configuration of this checkpoint")
    dim = sizes["dim"]
    if "num_heads" not in config and dim % HEAD_DIM:
        raise OviError(
            f"the {modality} tower's width {dim} is no multiple of {HEAD_DIM}: say its num_heads in {modality}_config"
        )
    kernel = shapes[f"{modality}.patch_embedding.proj.weight"][2:]
    patch = partial(VideoPatch, size=kernel) if modality == "video" else partial(AudioPatch, kernel=kernel[0])
    return partial(
        Tower,
        sizes["in_dim"],
        sizes["text_dim"],
        int(config.get("text_len", TEXT_LEN)),
        patch=patch,
        dim=dim,
        num_heads=int(config.get("num_heads", dim // HEAD_DIM)),
        num_blocks=sizes["num_layers"],
        ffn_dim=sizes["ffn_dim"],
        freq_dim=sizes["freq_dim"],
        eps=float(config.get("eps", 1e-6)),
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _parsed(weights: Weights, name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise OviError(f"{weights.origin}: {name} in its metadata is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise OviError(f"{weights.origin}: {name} in its metadata must be an object, it is {text[:40]!r}")
    return value
