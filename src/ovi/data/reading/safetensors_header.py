"""The header of a safetensors file, apart from its numbers: they are read straight to where a batch wants them.

The library's own readers want the whole content in memory, or a file of its own; here it is a member of a tar.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
PREFIX = 8
"""Bytes that say how long the header is."""


@dataclass(frozen=True)
class Entry:
    """One tensor: its type, its shape, and its bytes from ``begin`` to before ``end`` of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def header_length(start: bytes, size: int) -> int:
    """Bytes of prefix and header together.

    Args:
        start: the first bytes of the file, at least ``PREFIX``.
        size: of the whole file, in bytes.

    Raises:
        ValueError: when it cannot be the start of such a file.
    """
    length = PREFIX + int.from_bytes(start[:PREFIX], "little")
    if len(start) < PREFIX or length > size:
        raise ValueError("is no safetensors file, or one cut short")
    return length


def read_header(header: bytes, size: int) -> dict[str, Entry]:
    """The tensors of a file by name.

    Args:
        header: prefix and header.
        size: of the whole file, in bytes.

    Raises:
        ValueError: when it is damaged: no JSON, unknown types, or numbers that lie outside the file.
    """
    try:
        content = json.loads(header[PREFIX:])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError("its header is no JSON object")
    content.pop("__metadata__", None)
    return {name: _entry(name, value, len(header), size) for name, value in content.items()}


def _entry(name: str, value: object, offset: int, size: int) -> Entry:
    try:
        dtype = TYPES[value["dtype"]]  # type: ignore[index]
        shape = tuple(int(n) for n in value["shape"])  # type: ignore[index]
        begin, end = (offset + int(n) for n in value["data_offsets"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"its header says nothing readable of {name!r}") from None
    if not offset <= begin <= end <= size or min(shape, default=0) < 0:
        raise ValueError(f"{name!r} would lie outside the file")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} has {end - begin} bytes for the shape {list(shape)}")
    return Entry(dtype, shape, begin, end)
