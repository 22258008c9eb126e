"""Which shard each clip goes to: fixed before the first clip is encoded.

Splits hang on a hash of a file's key alone, so clips of one file stay together and adding files moves none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ovi.data.index import SPLITS
from ovi.data.media import Crop
from ovi.data.sources import ClipFormat, SourceItem
from ovi.errors import OviError


@dataclass(frozen=True)
class ClipJob:
    """One clip to encode.

    Args:
        key: name of its sample.
        item: the file it comes from.
        start_s: where it begins, in seconds after the file's first picture.
        caption: prompt; a stage may have changed the file's.
        crop: rectangle that is read; None for the whole picture.
        figures: what stages have measured so far.
        form: what it is read as; None is as the set's.
    """

    key: str
    item: SourceItem
    start_s: float
    caption: str = ""
    crop: Crop | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    form: ClipFormat | None = None


@dataclass(frozen=True)
class ShardPlan:
    """One shard: its file name, its split, and the clips of one form meant for it in order."""

    file: str
    split: str
    jobs: tuple[ClipJob, ...]

    @property
    def form(self) -> ClipFormat | None:
        """What its clips are read as; None is as the set's."""
        return self.jobs[0].form

    def __len__(self) -> int:
        return len(self.jobs)


def plan_shards(
    items: Sequence[SourceItem],
    jobs: Iterable[ClipJob],
    *,
    shard_size: int,
    val_fraction: float,
    behind: Sequence[ShardPlan] = (),
) -> list[ShardPlan]:
    """Deal clips to shards, split by split and form by form as these first come up, in their order.

    Args:
        items: all media files: the split of each hangs on its key.
        jobs: clips.
        shard_size: clips per shard; rejected ones leave theirs smaller.
        val_fraction: share of the files that validate, as hashed.
        behind: shards of files that were there before; the numbers go on from theirs, and hashes alone decide.
    """
    check_keys(items)
    keys = [item.key for item in items]
    validates = {key for key in keys if key_fraction(key) < val_fraction}
    if not behind:
        validates = validation_keys(keys, val_fraction)
    by_split: dict[str, dict[ClipFormat | None, list[ClipJob]]] = {split: {} for split in SPLITS}
    for job in jobs:
        of_split = by_split["val" if job.item.key in validates else "train"]
        of_split.setdefault(job.form, []).append(job)
    plans = []
    for split, by_form in by_split.items():
        shards = [tuple(of[at : at + shard_size]) for of in by_form.values() for at in range(0, len(of), shard_size)]
        first = sum(plan.split == split for plan in behind)
        plans += [ShardPlan(f"{split}-{number:06d}.tar", split, chosen) for number, chosen in enumerate(shards, first)]
    return plans


def check_keys(items: Sequence[SourceItem]) -> None:
    """See that every file has a key of its own.

    Raises:
        OviError: when two files share one.
    """
    if len({item.key for item in items}) < len(items):
        raise OviError("two files of the source have the same key; rename one of them")


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
        digest.update(_about(item))
    return digest.hexdigest()


def item_digest(item: SourceItem) -> str:
    """Hash of one file's name and size and all that was said about it."""
    return hashlib.blake2b(_about(item), digest_size=8).hexdigest()


def _about(item: SourceItem) -> bytes:
    size = item.num_bytes if item.url else _size(item.path)
    line: list[Any] = [item.file, size, item.caption, item.extra]
    return json.dumps(line, sort_keys=True, default=str).encode()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a dangling link; reading it will reject it
        return -1
