"""Samples of latent shards by number, read from where they lie in their tars, one at a time or as a batch.

A damaged sample never ends a run unless asked to: it is left out of its batch, and the batch says so.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from warnings import warn

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ovi.data.batch import LatentBatch, PackedBatch, Skipped, aligned
from ovi.data.index import Shard, ShardIndex
from ovi.data.reading.blocks import BlockPool
from ovi.data.reading.remote import ShardCache, is_remote
from ovi.data.reading.stored_sample import StoredSample, check_finite, find_stored, read_stored
from ovi.data.reading.tar_index import TarIndex, scan_tar
from ovi.errors import OviError

__all__ = ["LatentSample", "LatentShards", "ShardIndex", "Skipped", "collate"]

_OPEN, _INDEXED = 64, 1024
"""Shards that stay open, and whose members stay known, at a time."""


@dataclass(frozen=True)
class LatentSample:
    """One clip: video [C, F, h, w], audio [L, C] and text [n, text_dim] as stored, and what its json says.

    Video is [C, 0, 0, 0] where there is sound alone, audio [0, C] where there are pictures alone.
    """

    key: str
    video: Tensor
    audio: Tensor
    text: Tensor
    about: dict[str, Any]


class Damage(OviError):
    """A sample that cannot be read."""

    def __init__(self, skipped: Skipped) -> None:
        super().__init__(
            f"{skipped}. `ovi data check` finds all damage; copy the shard again, or remove it and run `ovi encode` "
            f"again, or leave what is damaged out with data.strict=false"
        )
        self.skipped = skipped


class LatentShards(Dataset[LatentSample]):
    """Samples of one split of one set, or of several one after another, by number.

    Iterating gives them in the order written. Training reads whole batches through a ``LatentLoader``. Each sample's
    numbers are looked at for NaN when they are first read, and not in every epoch.

    Args:
        index: of the shards, one or several; of several, the layouts must agree.
        split: "train" or "val".
        strict: raise at a damaged sample instead of leaving it out.
        cache: where copies of shards that are elsewhere are kept.

    Raises:
        OviError: for an unknown or empty split, sets that cannot be mixed, or shards elsewhere and no cache.
    """

    def __init__(
        self,
        index: ShardIndex | Sequence[ShardIndex],
        split: str,
        *,
        strict: bool = False,
        cache: ShardCache | None = None,
    ) -> None:
        indexes = [index] if isinstance(index, ShardIndex) else list(index)
        self.shards = tuple(shard for one in indexes for shard in one.shards(split))
        self.strict, self.cache = strict, cache
        self.dtype = _common_dtype(indexes)
        self.text_dim = next((int(i.content["text"]["dim"]) for i in indexes if i.content.get("text")), None)
        self._ends = list(accumulate(shard.num_samples for shard in self.shards))
        self._files: OrderedDict[int, int] = OrderedDict()
        self._tars: OrderedDict[int, TarIndex] = OrderedDict()
        self._finite = torch.zeros(len(self), dtype=torch.bool)
        elsewhere = next((s.location for s in self.shards if is_remote(s.location)), None)
        if elsewhere and cache is None:
            raise OviError(f"{elsewhere} is elsewhere: name a folder for copies with data.cache_dir=FOLDER")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> LatentSample:
        """One sample.

        Raises:
            Damage: when it cannot be read.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        # A batch of one has its rows to itself.
        packed = self._pack([self._find(number)], BlockPool(), [], strict=True)
        assert packed is not None
        batch = packed.unpack()
        about = {"caption": batch.captions[0], **batch.extra[0]}
        return LatentSample(batch.keys[0], batch.video[0], batch.audio[0], batch.text[0], about)

    def __iter__(self) -> Iterator[LatentSample]:
        for number in range(len(self)):
            try:
                yield self[number]
            except Damage as error:
                if self.strict:
                    raise
                warn(f"left out: {error.skipped}", stacklevel=2)

    def read_batch(self, numbers: Sequence[int], pool: BlockPool | None = None) -> PackedBatch:
        """Samples of one shape as a batch, without those that are damaged.

        Where all are, the next readable sample of their shape, counted from the first number on, takes their place, or
        of another shape where there is none: a batch is never empty, and is the same whoever reads it.

        Args:
            numbers: of the samples.
            pool: gives the memory; None takes fresh memory.

        Raises:
            OviError: when no sample can be read, or at the first damage if ``strict``.
        """
        try:
            return self._batch(numbers, pool or BlockPool())
        except Damage as error:  # not of a kind of its own: what a loading process raises is made anew from its text
            raise OviError(str(error)) from error

    def _batch(self, numbers: Sequence[int], pool: BlockPool) -> PackedBatch:
        found, skipped = list[StoredSample](), list[Skipped]()
        for number in numbers:
            try:
                found.append(self._find(number))
            except Damage as error:
                if self.strict:
                    raise
                skipped.append(error.skipped)
        batch = self._pack(found, pool, skipped, strict=self.strict) if found else None
        others = self._others(numbers[0])
        while batch is None:
            other = next(others, None)
            if other is None:
                raise OviError(f"no sample can be read; the first: {skipped[0]}")
            with suppress(Damage):
                batch = self._pack([self._find(other)], pool, skipped, strict=True)
        return batch

    def share(self) -> None:
        """Have the copies of this that other processes get know which samples were found free of NaN by any of them."""
        self._finite.share_memory_()

    def look_again(self) -> None:
        """Look at all numbers anew, as if none had been read yet."""
        self._finite.zero_()

    def shards_of(self, numbers: Sequence[int]) -> list[Shard]:
        """The shards that samples lie in."""
        return [self.shards[place] for place in dict.fromkeys(self._shard(number)[1] for number in numbers)]

    def only(self, shard: Shard) -> LatentShards:
        """The samples of one shard alone."""
        made = copy(self)
        made.shards, made._ends = (shard,), [shard.num_samples]
        made._finite = torch.zeros(shard.num_samples, dtype=torch.bool)
        made._files, made._tars = OrderedDict(), OrderedDict()
        return made

    def close(self) -> None:
        """Close the shards that are open; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_tars": OrderedDict()}

    def _shard(self, number: int) -> tuple[Shard, int, int]:
        """A sample's shard, the shard's place, and the sample's place in it."""
        place = bisect_right(self._ends, number)
        return self.shards[place], place, number - self._ends[place] + self.shards[place].num_samples

    def _others(self, number: int) -> Iterator[int]:
        """The other samples of a sample's shape, from the one after it on, and round; then those of other shapes."""
        _, first, at = self._shard(number)
        shapes = self.shards[first].shapes
        for same in (True, False):
            for step in range(len(self.shards) + 1):
                place = (first + step) % len(self.shards)
                if (self.shards[place].shapes == shapes) is not same:
                    continue
                begin = self._ends[place] - self.shards[place].num_samples
                yield from range(begin + (at + 1 if step == 0 else 0), self._ends[place])

    def _open(self, place: int) -> tuple[int, TarIndex]:
        """A shard's descriptor and members.

        Raises:
            OSError: when it cannot be opened.
        """
        shard = self.shards[place]
        file = self._files.pop(place, None)
        if file is None:
            if is_remote(shard.location):
                assert self.cache is not None
                file = self.cache.open(shard.location, shard.num_bytes, shard.sha256)
            else:
                file = os.open(shard.location, os.O_RDONLY)
        self._files[place] = file
        tar = self._tars.pop(place, None)
        self._tars[place] = tar = tar or scan_tar(file)
        if len(self._files) > _OPEN:
            os.close(self._files.popitem(last=False)[1])
        if len(self._tars) > _INDEXED:
            self._tars.popitem(last=False)
        return file, tar

    def _find(self, number: int) -> StoredSample:
        """Where a sample lies.

        Raises:
            Damage: when its shard cannot be read up to it, or its header or json cannot be read.
        """
        shard, place, at = self._shard(number)
        try:
            file, tar = self._open(place)
        except OSError as error:
            reason = f"cannot be read: {error.strerror or error}"
            raise Damage(Skipped("", shard.location, reason)) from error
        if at >= len(tar.samples) or (self.strict and len(tar.samples) != shard.num_samples):
            reason = f"holds {len(tar.samples)} samples, the index says {shard.num_samples}"
            raise Damage(Skipped("", shard.location, f"{reason}; {tar.damage}" if tar.damage else reason))
        sample = tar.samples[at]
        try:
            return find_stored(file, number, place, shard, sample)
        except (KeyError, ValueError, OSError) as error:
            why = f"has no .{error.args[0]}" if isinstance(error, KeyError) else f"is damaged: {error}"
            raise Damage(Skipped(sample.key, shard.location, why)) from error

    def _pack(
        self, found: list[StoredSample], pool: BlockPool, skipped: list[Skipped], *, strict: bool
    ) -> PackedBatch | None:
        """Samples of one shape read into one block, less those that turn out to be damaged; None where all do.

        Args:
            found: the samples.
            pool: gives the block.
            skipped: what was left out of the batch already; takes the damaged ones.
            strict: raise at the first damaged one.

        Raises:
            Damage: if ``strict``.
        """
        shapes, size, item = found[0].shard.shapes, len(found), self.dtype.itemsize
        text_dim = found[0].entries["text"].shape[1] if self.text_dim is None else self.text_dim
        sizes = [math.prod(shapes.video) * item, math.prod(shapes.audio) * item]
        offsets = [0, aligned(size * sizes[0])]
        offsets.append(offsets[1] + aligned(size * sizes[1]))
        num_bytes = offsets[2] + sum(math.prod(one.entries["text"].shape) for one in found) * item
        taken = pool.take(num_bytes)
        try:
            rows = self._fill(taken.bytes, found, offsets, sizes, text_dim, skipped, strict=strict)
        except BaseException:
            taken.give_back()
            raise
        if not rows:
            taken.give_back()
            return None
        return PackedBatch(
            taken if pool.owner else taken.leased(),
            size,
            self.dtype,
            shapes.video,
            shapes.audio,
            [one.entries["text"].shape[0] for one in rows],
            text_dim,
            [str(one.about.get("caption", "")) for one in rows],
            [one.key for one in rows],
            [{name: value for name, value in one.about.items() if name != "caption"} for one in rows],
            tuple(skipped),
        )

    def _fill(
        self,
        block: Tensor,
        found: list[StoredSample],
        offsets: list[int],
        sizes: list[int],
        text_dim: int,
        skipped: list[Skipped],
        *,
        strict: bool,
    ) -> list[StoredSample]:
        """Read samples into their rows of a block; returns those that could be read, in the order of the rows."""
        rows, at = list[StoredSample](), offsets[2]
        for one in found:
            begin = [offsets[0] + len(rows) * sizes[0], offsets[1] + len(rows) * sizes[1], at]
            text = one.entries["text"].shape
            lengths = [*sizes, math.prod(text) * self.dtype.itemsize]
            parts = {name: block[b : b + n] for name, b, n in zip(("video", "audio", "text"), begin, lengths)}
            try:
                if text[1] != text_dim:
                    raise ValueError(f"its text has width {text[1]}, the set's {text_dim}")
                file, _ = self._open(one.place)
                read_stored(file, one, parts, self.dtype)
                if not self._finite[one.number]:
                    check_finite(one, parts, self.dtype)
                    self._finite[one.number] = True
            except (ValueError, OSError) as error:
                skip = Skipped(one.key, one.shard.location, f"is damaged: {error}")
                if strict:
                    raise Damage(skip) from error
                skipped.append(skip)
                continue
            rows.append(one)
            at += lengths[2]
        return rows


def _common_dtype(indexes: Sequence[ShardIndex]) -> torch.dtype:
    """The type that holds every set's numbers: theirs if it is one, else float32."""
    kinds = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.float16}
    found = {kinds.get(str(index.content.get("dtype")), torch.float32) for index in indexes}
    return found.pop() if len(found) == 1 else torch.float32


def collate(samples: Sequence[LatentSample]) -> LatentBatch:
    """Samples of one shape to a batch in float32; ``extra`` holds everything of their json but the caption."""
    return LatentBatch(
        video=torch.stack([sample.video for sample in samples]).float(),
        audio=torch.stack([sample.audio for sample in samples]).float(),
        text=[sample.text.float() for sample in samples],
        captions=[sample.about.get("caption", "") for sample in samples],
        keys=[sample.key for sample in samples],
        extra=[{name: value for name, value in sample.about.items() if name != "caption"} for sample in samples],
    )
