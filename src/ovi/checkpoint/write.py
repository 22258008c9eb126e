"""Weights to safetensors, one tensor in memory at a time, in one file or in shards; all of it or nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ovi.checkpoint.header import TYPES, Entry, encode_header
from ovi.data.files import PARTIAL
from ovi.errors import OviError

SUFFIX = ".safetensors"


def write_weights(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
) -> list[Path]:
    """Write tensors under ``path``, replacing what stood there, in one file or in shards.

    The library's own writer wants all tensors at once, cast already; this one casts and writes one after another.

    Args:
        path: ends in .safetensors. Shards are called ``NAME-00001-of-00003.safetensors`` and their index
            ``NAME.safetensors.index.json``, as everywhere.
        tensors: by name.
        metadata: for the header of every file.
        dtype: to cast to; None keeps each tensor's own.
        max_shard_bytes: size that no shard exceeds unless by a single tensor; None, or a size that holds all, writes
            one file.

    Returns:
        The files written; the index last.

    Raises:
        OviError: for another suffix, a type the format lacks, numbers too large for ``dtype``, or a disk that refuses;
            what stood there before is untouched then.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise OviError(f"{path}: weights are written as {SUFFIX}: give it that ending")
    types = {name: dtype if dtype and t.is_floating_point() else t.dtype for name, t in tensors.items()}
    unknown = sorted({str(kind) for kind in types.values() if kind not in TYPES})
    if unknown:
        raise OviError(f"{path}: safetensors has no {', '.join(unknown)}; say a dtype to cast to")
    sizes = {name: t.numel() * types[name].itemsize for name, t in tensors.items()}
    _check_room(path, sum(sizes.values()))
    shards = _plan(sizes, max_shard_bytes)
    files = _names(path, len(shards))
    before = written_under(path)
    for abandoned in _files_of(path, PARTIAL):  # by a writer that was killed
        abandoned.unlink(missing_ok=True)
    with _all_or_nothing(path, files) as partials:
        for shard, partial in zip(shards, partials):
            with open(partial, "wb") as file:
                _write(file, {name: tensors[name] for name in shard}, types, metadata or {})
                file.flush()
                os.fsync(file.fileno())
        if len(shards) > 1:
            weight_map = {name: file.name for shard, file in zip(shards, files) for name in shard}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            partials[-1].write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        # An index names its shards: while they are exchanged there must be none.
        index_of(path).unlink(missing_ok=True)
    for stale in set(before) - set(files):
        stale.unlink(missing_ok=True)
    return files


def written_under(path: Path) -> list[Path]:
    """Files that ``write_weights`` left or would replace under a path: the file, or shards and their index."""
    return _files_of(path, "")


def index_of(path: Path) -> Path:
    """Where the index of shards written under a path lies."""
    return path.with_name(path.name + ".index.json")


def _files_of(path: Path, ending: str) -> list[Path]:
    shard = re.compile(re.escape(path.stem) + r"-\d{5}-of-\d{5}" + re.escape(SUFFIX + ending))
    shards = [f for f in sorted(path.parent.glob(f"*{SUFFIX}{ending}")) if shard.fullmatch(f.name)]
    others = [file.with_name(file.name + ending) for file in (path, index_of(path))]
    return [file for file in (others[0], *shards, others[1]) if file.is_file()]


def _plan(sizes: Mapping[str, int], most: int | None) -> list[list[str]]:
    """Names in shards, in their order, each filled until the next tensor would exceed it."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if most is not None and shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _names(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    shards = [path.with_name(f"{path.stem}-{n:05d}-of-{count:05d}{SUFFIX}") for n in range(1, count + 1)]
    return [*shards, index_of(path)]


def _check_room(path: Path, needed: int) -> None:
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise OviError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
    if free < needed:
        raise OviError(
            f"{path}: needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free on its disk: make room, choose "
            "another folder or a smaller dtype"
        )


@contextmanager
def _all_or_nothing(path: Path, files: Sequence[Path]) -> Iterator[list[Path]]:
    """Names to write under; they become ``files`` when the block ends without an error, and vanish otherwise."""
    partials = [file.with_name(file.name + PARTIAL) for file in files]
    try:
        try:
            yield partials
            for partial, file in zip(partials, files):
                os.replace(partial, file)
        finally:
            for partial in partials:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise OviError(
            f"{path}: cannot be written ({error.strerror or error}), and nothing was: make room, or choose another "
            "folder"
        ) from error


def _write(
    file: BinaryIO, tensors: Mapping[str, Tensor], types: Mapping[str, torch.dtype], metadata: Mapping[str, str]
) -> None:
    """One file of the format."""
    # Wider types first keeps every tensor aligned to its own width; readers expect no gaps.
    names = sorted(tensors, key=lambda name: -types[name].itemsize)
    entries: dict[str, Entry] = {}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * types[name].itemsize
        entries[name] = Entry(TYPES[types[name]], tuple(tensors[name].shape), begin, end)
    file.write(encode_header(entries, metadata))
    for name in names:
        # No name for the cast tensor: it would live until the next is made.
        file.write(_bytes(_cast(name, tensors[name].detach(), types[name])))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if dtype == tensor.dtype or not cast.numel() or not dtype.is_floating_point:
        return cast
    # Both ends are finite when all is, and cost a fiftieth of asking each number.
    ends = torch.stack(torch.aminmax(cast))
    if not ends.isfinite().all() and not torch.equal(cast.isfinite(), tensor.isfinite()):
        raise OviError(
            f"{name} reaches {tensor.abs().max():g}, which is too large for {str(dtype).removeprefix('torch.')}: "
            "write it as bfloat16 or float32"
        )
    return cast
