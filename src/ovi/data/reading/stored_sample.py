"""One sample where it lies in its shard: what its json and header say, and its numbers read to where they are wanted.

Read and not mapped: out of mapped files numbers are copied nearly twice as fast from pages that stay mapped, and more
slowly from those that do not, as in any set much larger than what is kept open; and a shard that shrinks, or a disk
that fails, under a mapping ends the process instead of raising an error.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ovi.data.index import Shard
from ovi.data.quantise import CHANNEL_AXIS, SCALE, dequantise
from ovi.data.reading.safetensors_header import Entry, header_length, read_header
from ovi.data.reading.tar_index import TarSample

_GUESS = 4096
"""Bytes read to find a sample's header in; more where it is longer."""


@dataclass(frozen=True)
class StoredSample:
    """Where a sample lies, and what its header says of it.

    Not in which open file: of many shards those used longest ago are closed, and their descriptors given to others.

    Args:
        number: of the sample.
        place: of its shard.
        shard: the shard.
        key: of the sample.
        offset: where its safetensors begin in the shard, in bytes.
        entries: its tensors.
        about: its json.
    """

    number: int
    place: int
    shard: Shard
    key: str
    offset: int
    entries: dict[str, Entry]
    about: dict[str, Any]


def find_stored(file: int, number: int, place: int, shard: Shard, sample: TarSample) -> StoredSample:
    """What a sample's json and header say.

    Raises:
        KeyError: when it lacks either.
        ValueError: when one is damaged or of another shape than its shard's.
        OSError: when the shard cannot be read.
    """
    offset, size = sample.members["safetensors"]
    json_at, json_size = sample.members["json"]
    start = os.pread(file, min(size, _GUESS), offset)
    length = header_length(start, size)
    if length > len(start):
        start = os.pread(file, length, offset)
    entries = read_header(start[:length], size)
    about = json.loads(os.pread(file, json_size, json_at))
    if not isinstance(about, dict):
        raise ValueError("its json is no object")
    if "text" not in entries or len(entries["text"].shape) != 2:
        raise ValueError("it has no text [n, text_dim]")
    for name, expected in (("video", shard.shapes.video), ("audio", shard.shapes.audio)):
        if math.prod(expected) == 0 and name not in entries:
            continue
        shape = entries[name].shape if name in entries else None
        if shape != expected:
            said = "none" if shape is None else list(shape)
            raise ValueError(f"{name} latents are {said}, the index says {list(expected)}")
    return StoredSample(number, place, shard, sample.key, offset, entries, about)


def read_stored(file: int, one: StoredSample, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """A sample's numbers into its rows of a block.

    Args:
        file: descriptor of its shard.
        one: the sample.
        parts: uint8 [bytes] by name; those that the sample lacks stay as they are.
        dtype: of the numbers in the block.

    Raises:
        ValueError: when they are fewer than the header says.
        OSError: when the shard cannot be read.
    """
    order = sorted((name for name in parts if name in one.entries), key=lambda name: one.entries[name].begin)
    in_row = all(one.entries[a].end == one.entries[b].begin for a, b in pairwise(order))
    if in_row and all(one.entries[name].dtype == dtype for name in order):
        first = one.entries[order[0]].begin
        views = [parts[name].numpy().data for name in order if parts[name].numel()]
        expected = sum(map(len, views))
        if views and os.preadv(file, views, one.offset + first) != expected:
            raise ValueError("ends early")
    else:
        for name in order:
            parts[name].view(dtype).copy_(_converted(file, one, name).flatten())


def check_finite(one: StoredSample, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Look at what was read for numbers that are not finite.

    Raises:
        ValueError: when there is one.
    """
    for name in one.entries.keys() & parts.keys():
        if not _finite(parts[name].view(dtype)):
            raise ValueError(f"{name} has numbers that are not finite")


def _converted(file: int, one: StoredSample, name: str) -> Tensor:
    """One tensor of a sample as numbers, whatever type it is stored in."""

    def stored(part: str) -> Tensor:
        entry = one.entries[part]
        raw = bytearray(entry.end - entry.begin)
        if raw and os.preadv(file, [raw], one.offset + entry.begin) != len(raw):
            raise ValueError("ends early")
        return torch.frombuffer(raw, dtype=entry.dtype).view(entry.shape) if raw else torch.empty(entry.shape)

    tensor = stored(name)
    if tensor.dtype != torch.int8:
        return tensor
    if name + SCALE not in one.entries:
        raise ValueError(f"{name} is stored in 8 bits without its scale")
    return dequantise(tensor, stored(name + SCALE), axis=CHANNEL_AXIS[name])


def _finite(numbers: Tensor) -> bool:
    """Whether all are.

    A sum is finite only if they are, and is many times faster than a look at each; where it overflows, the extremes
    decide.
    """
    if not numbers.numel() or bool(numbers.sum().isfinite()):
        return True
    low, high = torch.aminmax(numbers)
    return bool(low.isfinite()) and bool(high.isfinite())
