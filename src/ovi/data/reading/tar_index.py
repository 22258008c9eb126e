"""Where each sample of a tar lies: one pass over its headers, then any sample is one read away.

Names and grouping are webdataset's: a member belongs to the sample that its path says up to the first dot of its last
part, neighbours of one such key are one sample, and what follows the dot is the suffix, in lower case.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BLOCK = 512
_NAME = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)", re.DOTALL)
_SPECIAL = re.compile(r"__[^/]*__(?:$|/)")
_REGULAR = (b"0", b"\0", b"7")
_NOTES = (b"x", b"g", b"L", b"K")


@dataclass(frozen=True)
class TarSample:
    """One sample's key, and (offset, size) in bytes of each of its members by suffix."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class TarIndex:
    """The samples of a tar in their order, and what is wrong with it: None where it is whole."""

    samples: tuple[TarSample, ...]
    damage: str | None = None


class _Damaged(Exception):
    """The tar cannot be read beyond here."""


def scan_tar(file: int) -> TarIndex:
    """Read a tar's headers up to its end, or to where it is damaged; what lies before the damage stays readable.

    Args:
        file: descriptor of an open file; its position is neither used nor moved.

    Raises:
        OSError: when the file cannot be read.
    """
    samples: list[TarSample] = []
    damage = None
    try:
        for name, offset, size in _members(file):
            parts = _NAME.fullmatch(name)
            if parts is None or _SPECIAL.match(name):
                continue
            key, suffix = parts[1], parts[2].lower()
            if not samples or samples[-1].key != key:
                samples.append(TarSample(key))
            if suffix in samples[-1].members:
                raise _Damaged(f"sample {key} has two members .{suffix}")
            samples[-1].members[suffix] = (offset, size)
    except _Damaged as error:
        damage = str(error)
    return TarIndex(tuple(samples), damage)


def _members(file: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every regular file."""
    end, at = os.fstat(file).st_size, 0
    noted: dict[str, str] = {}
    while True:
        header = os.pread(file, BLOCK, at)
        if len(header) < BLOCK:
            raise _Damaged(f"ends at byte {end} without an end mark")
        if not header.rstrip(b"\0"):
            return
        _check_sum(header, at)
        kind, size, begin = header[156:157], _number(header[124:136], at), at + BLOCK
        name = noted.pop("path", None) or _name(header)
        if "size" in noted:
            size = _pax_size(noted.pop("size"), at)
        if kind not in _REGULAR and kind not in _NOTES:
            size = 0 if kind in (b"1", b"2", b"3", b"4", b"5", b"6") else size
        if begin + size > end:
            raise _Damaged(f"ends at byte {end} within {name}, which goes on to byte {begin + size}")
        if kind == b"L":
            noted["path"] = _text(os.pread(file, size, begin))
        elif kind == b"x":
            noted |= _pax(os.pread(file, size, begin), begin)
        elif kind in _REGULAR:
            yield name, begin, size
        at = begin + -(-size // BLOCK) * BLOCK


def _check_sum(header: bytes, at: int) -> None:
    found = sum(header[:148]) + 8 * 32 + sum(header[156:])
    try:
        said = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        said = -1
    if found != said:
        raise _Damaged(f"byte {at} begins no tar header")


def _number(field: bytes, at: int) -> int:
    if field[0] & 0x80:  # too large for octal digits: GNU's binary form
        return int.from_bytes(field[1:], "big")
    try:
        return _size(int(field.strip(b" \0") or b"0", 8))
    except ValueError:
        raise _Damaged(f"the tar header at byte {at} has no readable size") from None


def _pax_size(value: str, at: int) -> int:
    try:
        return _size(int(value))
    except ValueError:
        raise _Damaged(f"the tar header at byte {at} has no readable size in its extension") from None


def _size(number: int) -> int:
    if number < 0:  # reading would go back and never end
        raise ValueError(number)
    return number


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    posix = header[257:263] == b"ustar\0"
    return f"{prefix}/{name}" if posix and prefix else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax(content: bytes, at: int) -> dict[str, str]:
    """The records ``LENGTH key=value`` that matter here."""
    records: dict[str, str] = {}
    while content.strip(b"\0"):
        try:
            length = int(content[: content.index(b" ")])
            key, _, value = content[content.index(b" ") + 1 : length].partition(b"=")
            if length < 5 or not value.endswith(b"\n"):
                raise ValueError
        except ValueError:
            raise _Damaged(f"the extended tar header at byte {at} cannot be read") from None
        if key in (b"path", b"size"):
            records[key.decode()] = value[:-1].decode("utf-8", "surrogateescape")
        content = content[length:]
    return records
