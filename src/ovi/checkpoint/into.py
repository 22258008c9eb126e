"""Weights into a twin that exists: its towers alone, or all of it. The model keeps its types and devices."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from ovi.checkpoint.files import Source, Weights, read_weights
from ovi.checkpoint.fit import check_fit, in_our_names
from ovi.checkpoint.names import MODALITIES
from ovi.checkpoint.sizes import Shapes, sizes_of, stored_config
from ovi.errors import OviError
from ovi.tower import Tower
from ovi.twin import TwinDiT


def load_towers(
    model: TwinDiT, source: Source | Weights, *, modalities: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Take the weights of towers, not of the fusion, from a checkpoint; for fusions that are learnt anew.

    Args:
        model: the twin; it is changed in place, or not at all when something does not fit.
        source: what ``read_weights`` takes: published Ovi weights, one tower in the names of Wan2.2 or of diffusers'
            ``WanTransformer3DModel`` (both TI2V-5B), or a run of ``ovi train``.
        modalities: the towers to load; None takes every tower there is.

    Returns:
        The towers that were loaded, video before audio.

    Raises:
        OviError: for a tower that was asked for and is not there; for tensors that are missing, unexpected or
            misshapen, all in one; for heads or eps written beside the weights that are not the model's.
    """
    weights = _read(source)
    check_towers(model, weights, modalities=modalities)
    wanted = wanted_towers(weights, modalities)
    _copy(model, weights, wanted)
    return wanted


def load_twin(model: TwinDiT, source: Source | Weights) -> None:
    """Take all weights of a twin, its fusion's too, from published weights or a run of ``ovi train``.

    Args:
        model: the twin; it is changed in place, or not at all when something does not fit.
        source: what ``read_weights`` takes.

    Raises:
        OviError: as ``load_towers`` does.
    """
    weights = _read(source)
    check_twin(model, weights)
    _copy(model, weights, (*MODALITIES, "fusions"))


def check_towers(model: TwinDiT, source: Source | Weights, *, modalities: Sequence[str] | None = None) -> None:
    """See that ``load_towers`` would succeed; the model may be on the meta device.

    Raises:
        OviError: as ``load_towers`` does.
    """
    weights = _read(source)
    _check(model, weights, wanted_towers(weights, modalities), "")


def check_twin(model: TwinDiT, source: Source | Weights) -> None:
    """See that ``load_twin`` would succeed; the model may be on the meta device.

    Raises:
        OviError: as ``load_twin`` does.
    """
    fusion = type(model.fusions[0]).__name__ if len(model.fusions) else "none"
    hint = f". The model's fusion is {fusion}; init_towers (load_towers) takes the towers alone"
    _check(model, _read(source), (*MODALITIES, "fusions"), hint)


def towers_in(weights: Weights) -> tuple[str, ...]:
    """Modalities that a checkpoint has a tower of, video before audio."""
    first = {(weights.scheme.to_ours(name) or "").partition(".")[0] for name in weights.tensors}
    return tuple(modality for modality in MODALITIES if modality in first)


def wanted_towers(weights: Weights, modalities: Sequence[str] | None) -> tuple[str, ...]:
    """The towers that are asked for, video before audio; every one there is when None are.

    Raises:
        OviError: when one is not there, or is no modality.
    """
    there = towers_in(weights)
    wanted = there if modalities is None else tuple(m for m in MODALITIES if m in modalities)
    unknown = [m for m in modalities or () if m not in MODALITIES]
    if unknown or not wanted:
        raise OviError(f"modalities are {' and '.join(MODALITIES)}, got {list(modalities or ())}")
    absent = [m for m in wanted if m not in there]
    if absent:
        raise OviError(
            f"{weights.origin} holds {weights.scheme.name}, with no {' and no '.join(absent)} tower; there is "
            f"{' and '.join(there) or 'none'}"
        )
    return wanted


def _read(source: Source | Weights) -> Weights:
    return source if isinstance(source, Weights) else read_weights(source)


def _check(model: TwinDiT, weights: Weights, parts: Collection[str], hint: str) -> None:
    tensors, unknown = in_our_names(weights)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items() if name.partition(".")[0] in parts}
    got = {name: t for name, t in tensors.items() if name.partition(".")[0] in parts}
    shapes = {name: tuple(t.shape) for name, t in got.items()}
    towers = [modality for modality in MODALITIES if modality in parts]
    sizes = "".join(_other_sizes(getattr(model, modality), shapes, modality) for modality in towers)
    check_fit(expected, got, unknown, weights, sizes + hint)
    for modality in towers:
        _check_config(getattr(model, modality), stored_config(weights, modality), modality, weights)


def _other_sizes(tower: Tower, shapes: Shapes, modality: str) -> str:
    """The knobs that would make a tower the checkpoint's, where its tensors say so; for a message."""
    try:
        there = sizes_of(shapes, modality)
    except OviError:  # what is missing is listed anyway
        return ""
    ffn_dim = tower.blocks[0].ffn[0].out_features  # type: ignore[index,union-attr]
    have = {"dim": tower.dim, "num_blocks": len(tower.blocks), "ffn_dim": ffn_dim, "freq_dim": tower.freq_dim}
    wanted = {**there, "num_blocks": there["num_layers"]}
    knobs = [f"model.{modality}.{name}={wanted[name]}" for name, size in have.items() if size != wanted[name]]
    return f". Its {modality} tower needs {' '.join(knobs)}" if knobs else ""


def _check_config(tower: Tower, stored: dict[str, Any], modality: str, weights: Weights) -> None:
    """Heads and eps are in no tensor's shape: a wrong one loads, and computes something else."""
    have = {"num_heads": tower.num_heads, "eps": tower.blocks[0].eps}
    wrong = [
        f"{name} {stored[name]} against {value}" for name, value in have.items() if stored.get(name, value) != value
    ]
    if wrong:
        raise OviError(
            f"{weights.origin}: the {modality} tower there has {', '.join(wrong)} in the model: set "
            f"model.{modality}.{' and '.join(w.split()[0] for w in wrong)} alike"
        )


@torch.no_grad()
def _copy(model: TwinDiT, weights: Weights, parts: Collection[str]) -> None:
    tensors, _ = in_our_names(weights)
    state = {name: t for name, t in model.state_dict().items() if name.partition(".")[0] in parts}
    bare = [name for name, tensor in state.items() if tensor.is_meta]
    if bare:
        raise OviError(
            f"the model has no storage to load into ({bare[0]} is on the meta device): give it some by "
            "model.to_empty(device=...)"
        )
    for name, tensor in state.items():
        tensor.copy_(tensors[name])
