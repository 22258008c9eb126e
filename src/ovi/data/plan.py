"""Which clips are cut from which files, and which shard each goes to: fixed before the first frame is decoded.

Splits hang on a hash of a file's key alone, so clips of one file stay together and adding files moves none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovi.data.index import SPLITS
from ovi.data.media import MediaError, probe
from ovi.data.sources import ClipFormat, SourceItem
from ovi.errors import OviError


@dataclass(frozen=True)
class ClipJob:
    """One clip to encode: where it comes from and what its sample is called."""

    key: str
    item: SourceItem
    start_s: float


@dataclass(frozen=True)
class ShardPlan:
    """One shard: its file name, its split, and the clips meant for it in order."""

    file: str
    split: str
    jobs: tuple[ClipJob, ...]


def plan_shards(
    items: Sequence[SourceItem], form: ClipFormat, *, shard_size: int, val_fraction: float, clips_per_file: int | None
) -> list[ShardPlan]:
    """Cut every file into consecutive clips and deal them to shards, split by split, in the order of the items.

    Args:
        items: media files.
        form: the clips' length.
        shard_size: clips per shard; rejected ones leave theirs smaller.
        val_fraction: share of the files that validate, as hashed.
        clips_per_file: the most clips taken of one file, from its start; None takes as many as fit.

    Raises:
        OviError: when two files share a key.
    """
    if len({item.key for item in items}) < len(items):
        raise OviError("two files of the source have the same key; rename one of them")
    validates = validation_keys([item.key for item in items], val_fraction)
    plans = []
    for split in SPLITS:
        chosen = [item for item in items if (item.key in validates) == (split == "val")]
        jobs = [job for item in chosen for job in _cut(item, form, clips_per_file)]
        for number, at in enumerate(range(0, len(jobs), shard_size)):
            plans.append(ShardPlan(f"{split}-{number:06d}.tar", split, tuple(jobs[at : at + shard_size])))
    return plans


def validation_keys(keys: Sequence[str], val_fraction: float) -> set[str]:
    """Keys whose hash, read as a number in 0..1, lies below ``val_fraction``.

    Where chance leaves a split without any of at least two keys, the nearest one changes sides: a handful of clips
    trains and validates too. One key alone trains.
    """
    if not val_fraction or len(keys) < 2:
        return set()
    order = sorted(keys, key=key_fraction)
    below = sum(key_fraction(key) < val_fraction for key in order)
    return set(order[: min(max(below, 1), len(order) - 1)])


def key_fraction(key: str) -> float:
    """Hash of a key as a number in 0..1, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


def source_digest(items: Sequence[SourceItem]) -> str:
    """Hash of the files' names and sizes and all that was said about them."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        line: list[Any] = [item.file, _size(item.path), item.caption, item.extra]
        digest.update(json.dumps(line, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a dangling link; reading it will reject it
        return -1


def _cut(item: SourceItem, form: ClipFormat, clips_per_file: int | None) -> list[ClipJob]:
    count = 1
    if clips_per_file != 1:
        try:
            info = probe(item.path)
        except MediaError:
            pass  # one job, which will be rejected with the reason when its turn comes
        else:
            if info.has_video and info.has_audio:
                count = max(1, int(info.duration_s / form.duration_s + 1e-6))
    count = min(count, clips_per_file or count)
    return [ClipJob(f"{item.key}-{n:04d}", item, n * form.num_frames / form.fps) for n in range(count)]
