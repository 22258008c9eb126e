"""What is read in an epoch, and by which rank: the same for any number of workers.

The batches of an epoch are formed once for all ranks, in one row that follows from the plan and the epoch alone. Batch
i of the row is rank i % world_size's. A loader's workers take the batches of their rank in turn and hand them over in
turn, so that neither their number nor an interruption changes what comes next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

from ovi.data.reading.buckets import Batches, form_batches
from ovi.data.reading.order import Ints, Stream, interleaved, quotas

Shape = TypeVar("Shape")


@dataclass(frozen=True)
class ReadingPlan:
    """The batches of every epoch.

    Args:
        streams: the samples of each set; numbers go on from one set to the next.
        buckets: for every set, the bucket of each of its shards.
        batch_sizes: samples in a whole batch of each bucket.
        weights: of the sets; None draws each set's every sample once an epoch, whatever their sizes.
        num_samples: drawn in an epoch; None takes as many as the sets have.
        train: whole batches only, as far as a bucket fills any, and as many for each rank; otherwise every sample is
            in a batch, and batches are halved until their number divides by the ranks.

    With ``weights`` a set's share of an epoch is exact to one sample. Its samples come in turn, pass after pass, across
    epochs, so that over a run each is seen equally often to within one; sets drawn with replacement aside.
    """

    streams: tuple[Stream, ...]
    buckets: tuple[tuple[int, ...], ...]
    batch_sizes: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    num_samples: int | None = None
    train: bool = True

    @property
    def fingerprint(self) -> str:
        """Hash of all that the row of batches depends on but the epoch."""
        return hashlib.blake2b(repr(self).encode(), digest_size=8).hexdigest()

    def quotas(self) -> list[int]:
        """Samples that each set gives to an epoch."""
        sizes = [stream.num_samples for stream in self.streams]
        if self.weights is None and self.num_samples is None:
            return sizes
        return quotas(self.weights or sizes, self.num_samples or sum(sizes))

    def samples(self, epoch: int) -> Ints:
        """Numbers of an epoch's samples in order."""
        rows, offset = [], 0
        for stream, quota in zip(self.streams, self.quotas()):
            rows.append(stream.take(epoch * quota, (epoch + 1) * quota) + offset)
            offset += stream.num_samples
        if not self.train:
            return np.concatenate(rows)
        return interleaved(rows, self.streams[0].seed, epoch)

    def batches(self, epoch: int) -> Batches:
        """All batches of an epoch."""
        return _batches(self, epoch)

    def of_rank(self, epoch: int, rank: int, world_size: int) -> Batches:
        """One rank's batches of an epoch; every rank has ``num_batches``.

        Where there are fewer batches than ranks, the first ones are repeated: every rank must have one.
        """
        row = self.batches(epoch)
        count = self.num_batches(world_size)
        if not self.train:
            # Halved, not dropped and not repeated, as long as there are samples to go round.
            short = count * world_size - len(row)
            row = row.split(min(short, len(row.samples) - len(row)))
        return row.pick(np.arange(rank, count * world_size, world_size) % len(row))

    def num_batches(self, world_size: int) -> int:
        """Batches of each rank in any epoch.

        Where an epoch is no whole number of passes, the mix of its shapes varies a little, and with it the number of
        batches that fill: the first epoch's number holds for all, batches beyond it are left out and missing ones made
        up for by the epoch's first.
        """
        count = len(self.batches(0))
        return max(1, count // world_size if self.train else -(-count // world_size))


@lru_cache(maxsize=4)
def _batches(plan: ReadingPlan, epoch: int) -> Batches:
    samples = plan.samples(epoch)
    sizes = [np.asarray(stream.sizes, np.int64) for stream in plan.streams]
    ends = np.cumsum(np.concatenate(sizes))
    shards = np.concatenate([np.asarray(buckets, np.int64) for buckets in plan.buckets])
    buckets = shards[np.searchsorted(ends, samples, side="right")]
    return form_batches(samples, buckets, plan.batch_sizes, drop_last=plan.train)


@dataclass(frozen=True)
class Position:
    """How far reading has come: ``batch`` batches of ``epoch`` are done on each of ``world_size`` ranks."""

    epoch: int = 0
    batch: int = 0
    world_size: int = 1

    def on(self, world_size: int) -> Position:
        """The same place for another number of ranks.

        Exact when the batches done by all ranks together divide by the new number; otherwise up to ``world_size`` - 1
        batches come a second time, and none is lost.
        """
        return Position(self.epoch, self.batch * self.world_size // world_size, world_size)


def shapes_to_buckets(shapes: Sequence[Sequence[Shape]]) -> tuple[tuple[tuple[int, ...], ...], list[Shape]]:
    """Numbers for the different shapes of all sets' shards, in order of first appearance.

    Args:
        shapes: for every set, the shape of each of its shards.

    Returns:
        (for every set, the bucket of each shard; the shape of each bucket).
    """
    kinds: dict[Shape, int] = {}
    numbers = tuple(tuple(kinds.setdefault(shape, len(kinds)) for shape in row) for row in shapes)
    return numbers, list(kinds)
