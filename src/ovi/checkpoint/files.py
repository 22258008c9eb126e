"""Weights read from disk, in whatever file they come: mapped into memory, so that a tensor costs nothing until used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ovi.adapters import merged_state
from ovi.checkpoint.mapped import map_file
from ovi.checkpoint.names import OURS, Scheme, find_scheme, some
from ovi.errors import OviError

Source = str | Path | Mapping[str, Tensor]
"""A checkpoint: a file, a folder, or a state dict."""

RUN = "checkpoints/last.ckpt"
"""Where a run of ``ovi train`` keeps its newest checkpoint."""

_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
# Where training checkpoints keep their weights: (keys that lead there, prefix of every name); the authors', then ours.
_NESTS = ((("module",), ""), (("app", "model"), ""), (("state_dict",), "model."), ((), ""))
_DIFFUSERS_STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Weights:
    """Tensors of a checkpoint and what was written down beside them.

    Args:
        origin: what to call it in messages.
        scheme: whose names the tensors have.
        tensors: by name; those of a file are mapped from it, privately: writing to one leaves the file as it is.
        metadata: of the safetensors header.
        beside: the ``config.json`` that lies beside the file, or the model's node in the record of a run.
    """

    origin: str
    scheme: Scheme
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)

    @property
    def of_run(self) -> bool:
        """Whether they are a run's of ``ovi train``."""
        return self.scheme is OURS


def read_weights(source: Source) -> Weights:
    """A checkpoint's tensors by name, without reading them.

    Args:
        source: a .safetensors file, the .index.json of a sharded one, a .pt or .pth file of the authors, a checkpoint
            of ``ovi train``, a folder that ``find_weights`` understands, or a state dict.

    Raises:
        OviError: for what cannot be read, or holds no tensors under names that we know.
    """
    if isinstance(source, Mapping):
        return Weights("the state dict", _scheme("the state dict", source), source)
    path = find_weights(source)
    if path.suffix in _PICKLES:
        return _pickled(path)
    tensors, metadata = _safetensors(path)
    return Weights(str(path), _scheme(str(path), tensors), tensors, metadata, _config_beside(path))


def find_weights(path: str | Path) -> Path:
    """The file that a path means: itself, or what a folder holds.

    A folder is a run's (its last checkpoint), or has an index of shards, a ``diffusion_pytorch_model.safetensors``, or
    one .safetensors file.

    Raises:
        OviError: when there is none, or more than one.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise OviError(f"{path}: there is no such checkpoint")
    if (path / RUN).is_file():
        return path / RUN
    indices, files = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
    for found in (indices, [f for f in files if f.stem == _DIFFUSERS_STEM], files):
        if len(found) == 1:
            return found[0]
    inside = sorted({f.parent.name for f in path.glob("*/*.safetensors")})
    if files:
        raise OviError(f"{path} holds several checkpoints: name one of {some([f.name for f in indices or files])}")
    raise OviError(
        f"{path}: holds no .safetensors file, no index of shards and no {RUN}"
        + (f"; its folders {some(inside)} do hold some: name one of them" if inside else "")
    )


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    try:
        for file in _shards(path) if path.suffix == ".json" else [path]:
            if not file.is_file():
                raise OviError(f"{path}: its shard {file.name} is not there; fetch it into {file.parent}")
            found, about = map_file(file)
            tensors |= found
            metadata |= about
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise OviError(f"{path}: cannot be read as safetensors ({type(error).__name__}: {error})") from error
    return tensors, metadata


def _shards(index: Path) -> list[Path]:
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [index.with_name(name) for name in sorted(names)]


def _pickled(path: Path) -> Weights:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for damaged files
        raise OviError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {error})") from error
    for nest, prefix in _NESTS:
        found: Any = content
        for key in nest:
            found = found.get(key, {}) if isinstance(found, dict) else {}
        if not isinstance(found, dict):
            continue
        tensors = {
            str(key).removeprefix(prefix): tensor
            for key, tensor in found.items()
            if isinstance(tensor, Tensor) and str(key).startswith(prefix)
        }
        scheme = find_scheme(tensors)
        if scheme is not None:
            record = (content.get("ovi") if prefix else None) or {}
            whole = merged_state(tensors, record.get("adapter"))
            return Weights(str(path), scheme, whole, beside=record.get("model", {}))
    raise OviError(
        f"{path}: holds no video_model.* or audio_model.* tensors and no tower, at the top, in 'module', in "
        "'app.model' or in 'state_dict'"
    )


def _scheme(origin: str, tensors: Mapping[str, Tensor]) -> Scheme:
    scheme = find_scheme(tensors)
    if scheme is None:
        raise OviError(
            f"{origin}: names its tensors in no way known here ({some(sorted(tensors), 4) or 'it holds none'}); "
            "expected published Ovi (video_model.*, audio_model.*), or one tower in the names of Wan2.2 or of diffusers"
        )
    return scheme


def _config_beside(path: Path) -> dict[str, Any]:
    """The ``config.json`` that publishers put beside the weights; nothing where there is none to read."""
    try:
        config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
