"""Loss by noise level: where along the way from noise to data a network is good, which one mean hides."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from ovi.errors import OviError


class SigmaLoss(Metric):
    """Mean error of the samples in each of several equal ranges of sigma.

    Sums and counts are kept, and added up over processes: each figure is the mean over all samples of its range,
    however they came in batches. Nothing waits for the device.

    Args:
        num_buckets: ranges that 0..1 is split into; each takes its lower end, the last also 1.

    Raises:
        OviError: for less than one.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, num_buckets: int = 5) -> None:
        super().__init__()
        if num_buckets < 1:
            raise OviError(f"num_buckets must be at least 1, got {num_buckets}")
        self.num_buckets = num_buckets
        # float32: some devices have nothing wider, and losses need no more.
        for name in ("sums", "counts"):
            self.add_state(name, torch.zeros(num_buckets, dtype=torch.float32), dist_reduce_fx="sum")

    @property
    def edges(self) -> list[tuple[float, float]]:
        """(from, to) of every range."""
        return [(n / self.num_buckets, (n + 1) / self.num_buckets) for n in range(self.num_buckets)]

    def update(self, sigma: Tensor, error: Tensor) -> None:
        """Add samples.

        Args:
            sigma: noise levels [B] in 0..1.
            error: of each sample, [B].
        """
        bucket = (sigma.to(self.sums.device) * self.num_buckets).long().clamp(0, self.num_buckets - 1)
        error = error.detach().to(self.sums)
        self.sums = self.sums.index_add(0, bucket, error)
        self.counts = self.counts.index_add(0, bucket, torch.ones_like(error))

    def compute(self) -> tuple[Tensor, Tensor]:
        """(mean error of every range, NaN where none came; samples in it), [num_buckets] each, or 0-d for one range."""
        return self.sums / self.counts, self.counts
