"""Published Ovi weights in and out: key names both ways, sizes from tensors, loading without a second copy.

The names are those of spec 'Checkpoint keys'. A training checkpoint of the authors nests them under ``module`` or
``app.model``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ovi.clock import Clock
from ovi.errors import OviError
from ovi.fusion.ovi import OviFusion
from ovi.patch import AudioPatch, VideoPatch
from ovi.rope import scale
from ovi.tower import Tower
from ovi.twin import TwinDiT

HEAD_DIM = 128
"""Width of a head in every published model; a checkpoint does not hold the number of heads."""

PUBLISHED_FACTOR = 0.19676
"""Latent frames per audio token that the published models rotate by (spec, 'RoPE')."""

# (published, ours); the first that matches counts. {m} is a modality, {n} a block, {p} the rest of the name.
_NAMES = (
    ("video_model.patch_embedding.{p}", "video.patch_embedding.proj.{p}"),
    ("audio_model.patch_embedding.0.{p}", "audio.patch_embedding.proj.{p}"),
    ("audio_model.patch_embedding.2.{p}", "audio.patch_embedding.mix.{p}"),
    ("{m}_model.blocks.{n}.modulation.modulation", "{m}.blocks.{n}.modulation"),
    # The reference keeps a pair's fusion in the block that queries.
    ("{m}_model.blocks.{n}.cross_attn.k_fusion.{p}", "fusions.{n}.{m}.k.{p}"),
    ("{m}_model.blocks.{n}.cross_attn.v_fusion.{p}", "fusions.{n}.{m}.v.{p}"),
    ("{m}_model.blocks.{n}.cross_attn.pre_attn_norm_fusion.{p}", "fusions.{n}.{m}.norm.{p}"),
    ("{m}_model.blocks.{n}.cross_attn.norm_k_fusion.{p}", "fusions.{n}.{m}.norm_k.{p}"),
    ("{m}_model.head.modulation", "{m}.out.modulation"),
    ("{m}_model.head.head.{p}", "{m}.out.head.{p}"),
    ("{m}_model.{p}", "{m}.{p}"),
)


def to_our_name(published: str) -> str | None:
    """Our name of a published tensor; None for a name that is not of the scheme."""
    return _renamed(published, _NAMES)


def to_published_name(ours: str) -> str | None:
    """The published name of one of our tensors; None for a name that no published model has."""
    return _renamed(ours, tuple((b, a) for a, b in _NAMES))


def from_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in published names to ours; names it does not know are kept, so that loading reports them."""
    return {to_our_name(key) or key: _ours(key, tensor) for key, tensor in state.items()}


def to_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict to published names; the inverse of ``from_reference``, bit for bit.

    Raises:
        OviError: for tensors that published models have no name for, such as those of another fusion.
    """
    names = {key: to_published_name(key) for key in state}
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        raise OviError(
            f"published checkpoints have no name for {_some(unknown)}: only a twin with the fusion 'ovi' and the "
            "patches 'video' and 'audio' can be saved as one"
        )
    # The reference keeps a leading axis of 1 on its modulation tables.
    return {
        str(names[key]): tensor.unsqueeze(0) if str(names[key]).endswith("modulation") else tensor
        for key, tensor in state.items()
    }


def load_reference(
    source: str | Path | Mapping[str, Tensor],
    *,
    video_config: Mapping[str, Any] | None = None,
    audio_config: Mapping[str, Any] | None = None,
    clock: Clock | None = None,
    dtype: torch.dtype | None = None,
) -> TwinDiT:
    """A twin with published weights. The model is made without storage and takes the tensors one by one.

    Args:
        source: a .safetensors file, the .index.json of a sharded one, a .pt file, or a state dict in published names.
        video_config: the reference's own configuration of the tower (dim, num_heads, num_layers, ...); None reads the
            sizes off the tensors, with heads 128 wide and 512 text tokens as in all published models.
        audio_config: likewise.
        clock: rates of the latents; None is the published ones.
        dtype: to cast to; None keeps the stored one.

    Raises:
        OviError: for a source that cannot be read, or tensors that are missing, unexpected or misshapen: all in one.
    """
    with _tensors(source) as (shapes, read):
        video = _tower(shapes, "video", video_config)
        audio = _tower(shapes, "audio", audio_config)
        factor = float((audio_config or {}).get("temporal_rope_scaling_factor", PUBLISHED_FACTOR))
        with torch.device("meta"):
            model = TwinDiT(
                video(), audio(), clock or Clock(), fusion=OviFusion, rope_alignment=partial(scale, factor=factor)
            )
        _check_names(model, shapes)
        for key in shapes:
            tensor = _ours(key, read(key))
            _assign(model, str(to_our_name(key)), tensor if dtype is None else tensor.to(dtype))
    return model


def save_reference(model: TwinDiT, path: str | Path) -> None:
    """Write a twin as one .safetensors file in published names; whole or not at all.

    Raises:
        OviError: as ``to_reference`` does.
    """
    path = Path(path)
    state = {key: tensor.contiguous() for key, tensor in to_reference(model.state_dict()).items()}
    partial_path = path.with_name(path.name + ".partial")
    try:
        save_file(state, partial_path)
        os.replace(partial_path, path)
    except (OSError, SafetensorError) as error:
        raise OviError(f"{path}: cannot be written ({error}); check the space left and the permissions") from error
    finally:
        partial_path.unlink(missing_ok=True)


Shapes = Mapping[str, tuple[int, ...]]


@contextmanager
def _tensors(source: str | Path | Mapping[str, Tensor]) -> Iterator[tuple[Shapes, Callable[[str], Tensor]]]:
    """Shapes by published name, and a reader of single tensors."""
    if isinstance(source, Mapping):
        yield {key: tuple(tensor.shape) for key, tensor in source.items()}, lambda key: source[key]
        return
    path = Path(source)
    if not path.is_file():
        raise OviError(f"{path}: there is no such checkpoint")
    if path.suffix in (".pt", ".pth"):
        state = _unnested(path)
        yield {key: tuple(tensor.shape) for key, tensor in state.items()}, lambda key: state[key]
        return
    try:
        files = {path.with_name(n) for n in _shards(path)} if path.suffix == ".json" else {path}
        opened = [safe_open(file, "pt") for file in sorted(files)]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise OviError(f"{path}: cannot be read as safetensors ({error})") from error
    owner = {key: file for file in opened for key in file.keys()}  # noqa: SIM118
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key, file in owner.items()}
    yield shapes, lambda key: owner[key].get_tensor(key)


def _shards(index: Path) -> set[str]:
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())


def _unnested(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for damaged files
        raise OviError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {error})") from error
    for nest in (("module",), ("app", "model"), ()):
        found: Any = state
        for key in nest:
            found = found.get(key, {}) if isinstance(found, dict) else {}
        if isinstance(found, dict) and any(str(key).startswith(("video_model.", "audio_model.")) for key in found):
            return found
    raise OviError(
        f"{path}: holds no video_model.* or audio_model.* tensors, at the top, in 'module' or in 'app.model'"
    )


def _tower(shapes: Shapes, modality: str, config: Mapping[str, Any] | None) -> Callable[[], Tower]:
    """A builder of the tower that the tensors, and the configuration where given, describe."""

    def shape(name: str) -> tuple[int, ...]:
        key = f"{modality}_model.{name}"
        if key not in shapes:
            raise OviError(f"the checkpoint has no {key}: it is not a whole Ovi checkpoint in published names")
        return shapes[key]

    given = dict(config or {})
    embedding = shape("patch_embedding.weight" if modality == "video" else "patch_embedding.0.weight")
    dim, channels = embedding[:2]
    blocks = [int(m[1]) for m in (re.match(rf"{modality}_model\.blocks\.(\d+)\.", key) for key in shapes) if m]
    if "num_heads" not in given and dim % HEAD_DIM:
        raise OviError(
            f"the {modality} tower's width {dim} is no multiple of {HEAD_DIM}: say its num_heads in {modality}_config"
        )
    patch = partial(VideoPatch, size=embedding[2:]) if modality == "video" else partial(AudioPatch, kernel=embedding[2])
    return partial(
        Tower,
        channels,
        shape("text_embedding.0.weight")[1],
        int(given.get("text_len", 512)),
        patch=patch,
        dim=dim,
        num_heads=int(given.get("num_heads", dim // HEAD_DIM)),
        num_blocks=1 + max(blocks, default=-1),
        ffn_dim=shape("blocks.0.ffn.0.weight")[0],
        freq_dim=shape("time_embedding.0.weight")[1],
        eps=float(given.get("eps", 1e-6)),
    )


def _check_names(model: TwinDiT, shapes: Shapes) -> None:
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    got = {to_our_name(key) or key: _squeezed(key, shape) for key, shape in shapes.items()}
    wrong = [f"missing {to_published_name(key)}" for key in expected if key not in got]
    wrong += [f"unexpected {key}" for key in shapes if (to_our_name(key) or key) not in expected]
    wrong += [
        f"{to_published_name(key)} is {list(got[key])}, expected {list(expected[key])}"
        for key in expected
        if key in got and got[key] != expected[key]
    ]
    if wrong:
        raise OviError(f"the checkpoint does not fit the model, {len(wrong)} tensors: {_some(wrong, 20)}")


def _assign(model: TwinDiT, name: str, tensor: Tensor) -> None:
    module_name, _, leaf = name.rpartition(".")
    setattr(
        model.get_submodule(module_name), leaf, torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    )


def _ours(published: str, tensor: Tensor) -> Tensor:
    return tensor.squeeze(0) if _has_leading_axis(published, tensor.dim()) else tensor


def _squeezed(published: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:] if _has_leading_axis(published, len(shape)) and shape[0] == 1 else shape


def _has_leading_axis(published: str, dims: int) -> bool:
    return published.endswith("modulation") and dims == 3


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    for source, target in table:
        found = _pattern(source).fullmatch(name)
        if found:
            return target.format(**found.groupdict())
    return None


def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{m\}", "(?P<m>video|audio)").replace(r"\{n\}", r"(?P<n>\d+)")
    return re.compile(pattern.replace(r"\{p\}", "(?P<p>.+)"))


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
