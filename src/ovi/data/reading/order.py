"""The order of samples: a pure function of the seed, the pass and the sizes of the shards, on any machine.

Shards are permuted, and samples within windows of consecutive shards: reading stays near a few shards at a time, which
is what a disk, and a cache of remote shards, can follow. Permutations sort by a hash, so that no library's random
generator, which may change with its version, is part of a checkpoint's meaning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_DRAWS = 32
"""Samples taken of a shard that is drawn with replacement, before the next is drawn; fewer where shards are small."""


def hashes(count: int, *parts: object, start: int = 0) -> NDArray[np.uint64]:
    """``count`` numbers that look random, uniform over 64 bits, from whatever names them (splitmix64; Steele 2014)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    x = np.uint64(int.from_bytes(digest, "big")) + np.arange(start, start + count, dtype=np.uint64) * np.uint64(
        0x9E3779B97F4A7C15
    )
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fractions(count: int, *parts: object) -> NDArray[np.float64]:
    """``count`` numbers, uniform in 0 to below 1."""
    return (hashes(count, *parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Stream:
    """An endless row of samples of one set: pass after pass, each in an order of its own.

    Args:
        sizes: samples of every shard; a sample's number counts through them.
        seed: of the order.
        window: samples, in whole shards, that are permuted among themselves.
        shuffle: False repeats the stored order.
        replace: draw with replacement, every sample being equally likely at every place: some of one shard at a time.
        name: which stream of a mixture this is; each has an order of its own.
    """

    sizes: tuple[int, ...]
    seed: int = 0
    window: int = 1024
    shuffle: bool = True
    replace: bool = False
    name: int = 0

    @property
    def num_samples(self) -> int:
        return sum(self.sizes)

    def take(self, start: int, stop: int) -> Ints:
        """Numbers of the samples at places ``start`` to before ``stop`` of the row."""
        total = self.num_samples
        first, last = start // total, -(-stop // total)
        passes = [self.one_pass(number) for number in range(first, last)]
        row = np.concatenate(passes) if passes else np.zeros(0, np.int64)
        return row[start - first * total : stop - first * total]

    def one_pass(self, number: int) -> Ints:
        """One pass, which is as long as the set: each sample once, unless drawn with replacement."""
        sizes, total = np.asarray(self.sizes, np.int64), self.num_samples
        if not self.shuffle:
            return np.arange(total, dtype=np.int64)
        starts = np.cumsum(sizes) - sizes
        if self.replace:
            return self._drawn(number, sizes, starts)
        shards = np.argsort(hashes(len(sizes), "shards", self.seed, self.name, number), kind="stable")
        chosen = sizes[shards]
        before = np.cumsum(chosen) - chosen
        rows = np.repeat(starts[shards] - before, chosen) + np.arange(chosen.sum(), dtype=np.int64)
        return self._mixed(rows, np.repeat(before // self.window, chosen), number)

    def _drawn(self, number: int, sizes: Ints, starts: Ints) -> Ints:
        """One pass of draws: a shard by its size, some samples of it, the next shard."""
        total = self.num_samples
        some = max(1, min(_DRAWS, total // len(sizes)))
        places = fractions(-(-total // some), "draws", self.seed, self.name, number) * total
        shards = np.repeat(np.searchsorted(np.cumsum(sizes), places, side="right"), some)[:total]
        within = fractions(total, "within", self.seed, self.name, number) * sizes[shards]
        rows = starts[shards] + within.astype(np.int64)
        return self._mixed(rows, np.arange(total) // self.window, number)

    def _mixed(self, rows: Ints, window: Ints, number: int) -> Ints:
        """Rows permuted within each window."""
        return rows[np.lexsort((hashes(len(rows), "samples", self.seed, self.name, number), window))]


def quotas(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to ``total``, each within one of its share by weight (largest remainders)."""
    shares = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def interleaved(rows: Sequence[Ints], *parts: object) -> Ints:
    """Rows merged at random places, each evenly spread over the whole and in its own order."""
    if len(rows) == 1:
        return rows[0]
    places = [
        (np.arange(len(row)) + fractions(len(row), "interleave", number, *parts)) / max(1, len(row))
        for number, row in enumerate(rows)
    ]
    return np.concatenate(rows)[np.argsort(np.concatenate(places), kind="stable")]
