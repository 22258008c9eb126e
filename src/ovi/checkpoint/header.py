"""The header of a safetensors file: 8 bytes of length, JSON, then the tensors' bytes end to end.

Format: https://huggingface.co/docs/safetensors, 'Format'.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names that the format gives to types; it has more, which no checkpoint of ours has."""

_LENGTH_BYTES = 8
_METADATA = "__metadata__"


class Entry(NamedTuple):
    """Where one tensor lies: its type's name, its shape, its first byte and the one after its last."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def encode_header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file, padded so that the tensors start at a multiple of 8.

    Args:
        entries: by name, with bytes counted from the end of the header.
        metadata: free texts by name.
    """
    content: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for name, e in entries.items():
        content[name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.begin, e.end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_header(path: Path) -> dict[str, Entry]:
    """Entries of a valid file by name, with bytes counted from its start."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        content = json.loads(file.read(length))
    content.pop(_METADATA, None)
    start = _LENGTH_BYTES + length
    return {
        name: Entry(e["dtype"], tuple(e["shape"]), *(start + offset for offset in e["data_offsets"]))
        for name, e in content.items()
    }
