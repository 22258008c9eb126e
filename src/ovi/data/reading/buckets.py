"""Samples to batches of one shape each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ovi.data.reading.order import Ints
from ovi.errors import OviError


@dataclass(frozen=True)
class Batches:
    """All batches of an epoch in their order: batch i has ``samples[bounds[i]:bounds[i + 1]]``, all of one bucket."""

    samples: Ints
    bounds: Ints

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, number: int) -> Ints:
        return self.samples[self.bounds[number] : self.bounds[number + 1]]

    def pick(self, numbers: Ints) -> Batches:
        """These batches alone, in the order given."""
        sizes = (self.bounds[1:] - self.bounds[:-1])[numbers]
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        shift = np.repeat(self.bounds[:-1][numbers] - bounds[:-1], sizes)
        return Batches(self.samples[np.arange(bounds[-1]) + shift], bounds)

    def split(self, count: int) -> Batches:
        """The same samples in ``count`` more batches, made by halving the largest ones (the first of them first)."""
        sizes = np.diff(self.bounds).tolist()
        parts = [[size] for size in sizes]
        for _ in range(count):
            where = max(range(len(parts)), key=lambda i: max(parts[i]))
            biggest = max(parts[where])
            place = parts[where].index(biggest)
            parts[where][place : place + 1] = [biggest - biggest // 2, biggest // 2]
        return Batches(self.samples, np.concatenate([[0], np.cumsum([n for row in parts for n in row])]))


def batch_sizes(tokens: Sequence[int], *, batch_size: int | None, token_budget: int | None) -> list[int]:
    """Samples in a whole batch of each bucket.

    Args:
        tokens: latent positions of a sample of each bucket, video and audio together.
        batch_size: the most samples of a batch; None sets no limit.
        token_budget: the most latent positions of a batch; None sets no limit.

    Raises:
        OviError: when neither limits, or one sample alone exceeds the budget.
    """
    if batch_size is None and token_budget is None:
        raise OviError("give data.batch_size, data.token_budget, or both: something must limit a batch")
    if token_budget is not None and max(tokens) > token_budget:
        raise OviError(
            f"a sample of {max(tokens)} latent positions exceeds data.token_budget={token_budget}: raise it, or leave "
            f"the set with such samples out"
        )
    sizes = [batch_size or max(tokens) * len(tokens) + 2**31 for _ in tokens]
    return [min(size, token_budget // count) if token_budget else size for size, count in zip(sizes, tokens)]


def form_batches(samples: Ints, buckets: Ints, sizes: Sequence[int], *, drop_last: bool) -> Batches:
    """Batches in the order in which they fill up as the samples come.

    Args:
        samples: numbers of the samples in the order of the epoch.
        buckets: of each of these samples.
        sizes: of a whole batch of each bucket.
        drop_last: leave out what remains of a bucket that filled at least one batch; without it, and where a bucket
            has too few samples for even one, the remainder is a batch of its own, where its last sample comes.
    """
    order, counts, filled = [], [], []
    for bucket in np.unique(buckets).tolist():
        places, size = np.flatnonzero(buckets == bucket), sizes[bucket]
        whole, rest = divmod(len(places), size)
        keep_rest = rest and not (drop_last and whole)
        order.append(places[: whole * size + (rest if keep_rest else 0)])
        counts += [size] * whole + ([rest] if keep_rest else [])
        filled += places[size - 1 :: size].tolist() + (places[-1:].tolist() if keep_rest else [])
    bounds = np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))])
    flat = samples[np.concatenate(order)] if order else samples[:0]
    return Batches(flat, bounds).pick(np.argsort(np.asarray(filled, np.int64), kind="stable"))
