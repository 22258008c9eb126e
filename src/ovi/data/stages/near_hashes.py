"""Hashes within a Hamming distance of each other, among millions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Ints = NDArray[np.int64]

_BAND_BITS = 20
"""The most bits of a band that are looked up: tables of 2^20 places stay in a processor's cache."""
_DENSE = 4096
"""Fewer hashes than this are compared one by one: faster than looking them up."""
_LEAF = 1024
_QUERIES = 2**15
_PAIRS = 2**22
"""Pairs compared at a time; bounds the memory."""
_NONE = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Distances:
    """Pairs are near when both hashes differ in few bits.

    Args:
        most: bits that may differ in the first hash.
        most_second: bits that may differ in the second.
    """

    most: int
    most_second: int


class NearHashes:
    """Finds, among pairs of hashes in a given order, which to keep so that no two kept ones are near each other.

    Equal ones are joined first. Of the first hash, bits are dealt to so many bands that two hashes within the distance
    differ by at most one bit in at least one band (the pigeonhole principle): looking up each band, and each band with
    one bit changed, misses none (after Norouzi, Punjani and Fleet, 2012). Only kept ones are looked up. Time therefore
    grows little faster than the number of hashes, except for many that are near by the first hash and not by the
    second: all pairs of those are compared.

    Args:
        first: [N, W] words of 64 bits, which are searched.
        second: [N, V] words that are compared where the first are near; V may be 0.
        within: how far near ones may be apart.
    """

    def __init__(self, first: Words, second: Words, within: Distances) -> None:
        self.first, self.second, self.within = first, second, within
        num_bits = first.shape[1] * 64
        self.num_bands = min(within.most // 2 + 1, num_bits)
        self._keys = self._bands(num_bits)

    def _bands(self, num_bits: int) -> NDArray[np.int32]:
        """[N, bands] values of the bands; neighbouring bits, which tell much the same, go to different ones."""
        weights = np.zeros((num_bits, self.num_bands), np.float32)
        self.widths = []
        for band in range(self.num_bands):
            mine = np.arange(band, num_bits, self.num_bands)[:_BAND_BITS]
            weights[mine, band] = 2.0 ** np.arange(len(mine))
            self.widths.append(len(mine))
        keys = np.empty((len(self.first), self.num_bands), np.int32)
        for at in range(0, len(keys), _QUERIES):
            words = np.ascontiguousarray(self.first[at : at + _QUERIES])
            keys[at : at + _QUERIES] = np.unpackbits(words.view(np.uint8), axis=1).astype(np.float32) @ weights
        return keys

    def kept(self) -> Ints:
        """Numbers, ascending, of those that no kept one before them is near."""
        if not len(self.first):
            return np.empty(0, np.int64)
        both = np.ascontiguousarray(np.concatenate([self.first, self.second], axis=1))
        _, distinct = np.unique(
            both.view(np.dtype((np.void, both.itemsize * both.shape[1]))).ravel(), return_index=True
        )
        return self._kept_of(np.sort(distinct).astype(np.int64))

    def nearest(self, queries: Ints, kept: Ints) -> tuple[Ints, Ints]:
        """Of the kept ones that come before each query and are near it: the least distance by the first hash, and the
        first number at that distance; -1 and -1 where there is none.

        Args:
            queries, kept: numbers.
        """
        best = np.full(len(queries), _NONE)
        for places, others, bits in self._near(queries, kept):
            before = others < queries[places]
            np.minimum.at(best, places[before], bits[before] * len(self.first) + others[before])
        none = best == _NONE
        return np.where(none, -1, best // len(self.first)), np.where(none, -1, best % len(self.first))

    def _kept_of(self, numbers: Ints) -> Ints:
        """Halves: what the first keeps thins out the second before that is looked at."""
        if len(numbers) <= _LEAF:
            return self._kept_of_few(numbers)
        middle = len(numbers) // 2
        kept, rest = self._kept_of(numbers[:middle]), numbers[middle:]
        alike = np.zeros(len(rest), bool)
        for places, _, _ in self._near(rest, kept):
            alike[places] = True
        return np.concatenate([kept, self._kept_of(rest[~alike])])

    def _kept_of_few(self, numbers: Ints) -> Ints:
        alike = np.zeros((len(numbers), len(numbers)), bool)
        for places, others, _ in self._near(numbers, numbers):
            alike[places, np.searchsorted(numbers, others)] = True
        keep = np.ones(len(numbers), bool)
        for n in np.flatnonzero(np.tril(alike, -1).any(1)):
            keep[n] = not (alike[n, :n] & keep[:n]).any()
        return numbers[keep]

    def _near(self, queries: Ints, kept: Ints) -> Iterator[tuple[Ints, Ints, Ints]]:
        """Pairs that are near, some more than once: (place in ``queries``, number of the other, bits that differ)."""
        if len(kept) <= _DENSE:
            yield from self._near_among_all(queries, np.arange(len(queries)), kept)
            return
        tables = [_Table(self._keys[kept, band], width) for band, width in enumerate(self.widths)]
        # A pair that is looked up costs as much as several of those that are compared in a row.
        most = len(kept) // 4
        for at in range(0, len(queries), _QUERIES):
            some = queries[at : at + _QUERIES]
            found = [table.look_up(self._keys[some, band]) for band, table in enumerate(tables)]
            crowded = np.sum([counts.sum(1) for _, counts in found], axis=0) > most
            yield from self._near_among_all(queries, at + np.flatnonzero(crowded), kept)
            for table, (starts, counts) in zip(tables, found):
                counts[crowded] = 0
                for places, others in table.pairs(starts, counts):
                    yield from self._judged(queries, at + places, kept[others])

    def _near_among_all(self, queries: Ints, places: Ints, kept: Ints) -> Iterator[tuple[Ints, Ints, Ints]]:
        step = max(_PAIRS // max(len(kept), 1), 1)
        for at in range(0, len(places), step):
            some = places[at : at + step]
            # Most differ too much in their first word alone.
            near = popcount(self.first[queries[some], 0, None] ^ self.first[None, kept, 0]) <= self.within.most
            rows, columns = np.nonzero(near)
            yield from self._judged(queries, some[rows], kept[columns])

    def _judged(self, queries: Ints, places: Ints, others: Ints) -> Iterator[tuple[Ints, Ints, Ints]]:
        """Those of the pairs that are near."""
        for at in range(0, len(places), _PAIRS):
            mine, theirs = places[at : at + _PAIRS], others[at : at + _PAIRS]
            bits = np.zeros(len(mine), np.int64)
            for word in range(self.first.shape[1]):
                bits += popcount(self.first[queries[mine], word] ^ self.first[theirs, word])
                near = bits <= self.within.most
                mine, theirs, bits = mine[near], theirs[near], bits[near]
            second = np.zeros(len(mine), np.int64)
            for word in range(self.second.shape[1]):
                second += popcount(self.second[queries[mine], word] ^ self.second[theirs, word])
            near = second <= self.within.most_second
            if near.any():
                yield mine[near], theirs[near], bits[near]


class _Table:
    """Where each value of a band stands."""

    def __init__(self, keys: NDArray[np.int32], width: int) -> None:
        self.order = np.argsort(keys, kind="stable").astype(np.int32)
        self.starts = np.zeros((1 << width) + 1, np.int32)
        np.cumsum(np.bincount(keys, minlength=1 << width), out=self.starts[1:])
        self.flips = np.array([0, *(1 << n for n in range(width))], np.int32)

    def look_up(self, keys: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """[Q, 1 + width] first places in ``order``, and how many, of each value and of those one bit away."""
        asked = keys[:, None] ^ self.flips
        starts = self.starts[asked]
        return starts, self.starts[asked + 1] - starts

    def pairs(self, starts: NDArray[np.int32], counts: NDArray[np.int32]) -> Iterator[tuple[Ints, Ints]]:
        """(Row of the query, place of what was found), a bounded number at a time."""
        rows, columns = np.nonzero(counts)
        first, many = starts[rows, columns].astype(np.int64), counts[rows, columns].astype(np.int64)
        ends = np.cumsum(many)
        at = 0
        while at < len(rows):
            done = ends[at - 1] if at else 0
            to = max(int(np.searchsorted(ends, done + _PAIRS, side="right")), at + 1)
            some = many[at:to]
            inside = np.arange(some.sum()) - np.repeat(ends[at:to] - some - done, some)
            yield np.repeat(rows[at:to], some), self.order[np.repeat(first[at:to], some) + inside].astype(np.int64)
            at = to


def popcount(words: Words) -> NDArray[np.integer]:
    """Bits that are set in each word."""
    if hasattr(np, "bitwise_count"):  # numpy 2
        counted: NDArray[np.integer] = np.bitwise_count(words)
        return counted
    pairs, nibbles, ones = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333), np.uint64(0x0101010101010101)
    words = words - ((words >> np.uint64(1)) & pairs)
    words = (words & nibbles) + ((words >> np.uint64(2)) & nibbles)
    words = (words + (words >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((words * ones) >> np.uint64(56)).astype(np.int64)


__all__ = ["Distances", "NearHashes", "popcount"]
