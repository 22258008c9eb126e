"""Frechet distance between Gaussians fitted to two sets of features, in float64, streamed and exact over processes.

||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al., 1706.08500, section 3). With factors F^T F = S, the trace
of the root is the nuclear norm of F1 F2^T: singular values of a matrix that is as small as the smaller of samples and
dimensions, and no root of an ill-conditioned product.

A set is streamed as rows (1, features). When there are more than about D of them, the triangle of their QR
factorisation takes their place: it has D + 1 rows and the same Gram matrix, that is, the same number, mean and
covariance. Triangles of parts, stacked, are rows again, so parts add up in any order. Sums of x x^T would do
the same and lose the covariance of features whose mean is far above their spread; a triangle does not square them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovi.errors import OviError
from ovi.metrics.rows import RowStates

_SLACK = 256
"""Rows above the fewest possible that may gather before they are folded."""


def frechet_distance(
    mean1: Tensor | np.ndarray, cov1: Tensor | np.ndarray, mean2: Tensor | np.ndarray, cov2: Tensor | np.ndarray
) -> Tensor:
    """Squared Frechet (2-Wasserstein) distance between two Gaussians, from their moments.

    Where features are at hand, ``frechet_distance_of`` is more exact: roots of eigenvalues near 0 are not.

    Args:
        mean1: [D].
        cov1: [D, D], symmetric.
        mean2: [D].
        cov2: [D, D], symmetric.

    Returns:
        float64, 0-d, never below 0.

    Raises:
        OviError: for shapes that do not belong together.
    """
    m1, s1, m2, s2 = (torch.as_tensor(given).to(torch.float64) for given in (mean1, cov1, mean2, cov2))
    if m1.ndim != 1 or m2.shape != m1.shape or not s1.shape == s2.shape == (len(m1), len(m1)):
        shapes = [list(given.shape) for given in (m1, s1, m2, s2)]
        raise OviError(f"means must be [D] and covariances [D, D], got {', '.join(map(str, shapes))}")
    values, vectors = torch.linalg.eigh(s1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    return ((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * cross).clamp(min=0)


def frechet_distance_of(
    features1: Tensor | np.ndarray, features2: Tensor | np.ndarray, *, unbiased: bool = False
) -> Tensor:
    """Squared Frechet distance between the Gaussians fitted to two sets of features.

    Args:
        features1: [N, D].
        features2: [M, D].
        unbiased: divide covariances by N - 1, as ``np.cov`` does, instead of N.

    Returns:
        float64, 0-d, never below 0.

    Raises:
        OviError: for fewer than 2 samples a side, other shapes, or values that are not finite.
    """
    first, second = as_features(features1), as_features(features2)
    if first.shape[1] != second.shape[1]:
        raise OviError(f"features must be as wide in both sets, got {list(first.shape)} and {list(second.shape)}")
    return distance_between(FeatureStatistics.of(first), FeatureStatistics.of(second), unbiased=unbiased)


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Number, mean and covariance of a set of features.

    Attributes:
        count: of samples.
        mean: float64 [D].
        factor: float64 [K, D] with K at most D: its Gram matrix is the sum of (x - mean)(x - mean)^T.
    """

    count: int
    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Of features [N, D]."""
        return cls.of_rows(as_rows(features))

    @classmethod
    def of_rows(cls, rows: Tensor) -> FeatureStatistics:
        """Of rows [R, 1 + D], folded or not."""
        triangle = folded(rows)
        if not len(triangle):
            return cls(0, rows.new_zeros(rows.shape[1] - 1), rows.new_zeros(0, rows.shape[1] - 1))
        count = round(float(triangle[0, 0].square()))
        return cls(count, triangle[0, 1:] / triangle[0, 0], triangle[1:, 1:])

    def covariance(self, *, unbiased: bool = False) -> Tensor:
        """[D, D], divided by the number of samples, or by one less."""
        return self.factor.T @ self.factor / (self.count - unbiased)


def distance_between(one: FeatureStatistics, other: FeatureStatistics, *, unbiased: bool = False) -> Tensor:
    """Squared Frechet distance, as ``frechet_distance_of`` has it.

    Raises:
        OviError: for fewer than 2 samples a side.
    """
    if min(one.count, other.count) < 2:
        raise OviError(f"a Frechet distance needs 2 or more samples a side, got {one.count} and {other.count}")
    a, b = (side.factor / (side.count - unbiased) ** 0.5 for side in (one, other))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    apart = (one.mean - other.mean).square().sum()
    return (apart + a.square().sum() + b.square().sum() - 2 * cross).clamp(min=0)


def as_features(given: Tensor | np.ndarray) -> Tensor:
    """float64 [N, D].

    Raises:
        OviError: for another shape, or values that are not finite.
    """
    features = torch.as_tensor(given)
    if features.ndim != 2 or not features.shape[1]:
        raise OviError(f"features must be [N, D], got {list(features.shape)}")
    features = features.detach().to(torch.float64)
    if not features.isfinite().all():
        raise OviError(f"{int((~features.isfinite()).any(1).sum())} of {len(features)} features hold NaN or infinity")
    return features


def as_rows(features: Tensor) -> Tensor:
    """Rows (1, features) [N, 1 + D], to be stacked with others and folded."""
    features = features.to(torch.float64)
    return torch.cat([features.new_ones(len(features), 1), features], dim=1)


def folded(rows: Tensor) -> Tensor:
    """At most 1 + D rows [min(R, 1 + D), 1 + D] in place of R, with the same Gram matrix: the triangle of their QR."""
    return torch.linalg.qr(rows, mode="r").R if len(rows) else rows


def add_moments(metric: RowStates, name: str, feature_dim: int) -> None:
    """Give a metric a state of rows (1, features) that are folded as they come: memory stays near D x D."""
    metric.add_row_state(name, 1 + feature_dim, limit=1 + feature_dim + _SLACK, shrink=folded)


class FrechetDistance(RowStates):
    """Squared Frechet distance between features of generated and of real samples.

    Exact over batches and processes up to rounding; a process may have seen none of either. Memory is bounded by about
    (D + 256) x D numbers a side.

    Args:
        feature_dim: D.
        unbiased: divide covariances by N - 1 instead of N.

    Raises:
        OviError: from ``compute`` when there are fewer than 2 samples on either side.
    """

    full_state_update = False

    def __init__(self, feature_dim: int, *, unbiased: bool = False, **metric_knobs: Any) -> None:
        super().__init__(**metric_knobs)
        self.feature_dim, self.unbiased = feature_dim, unbiased
        add_moments(self, "real", feature_dim)
        add_moments(self, "generated", feature_dim)

    def update(self, features: Tensor, real: bool) -> None:
        """Add features [B, D] of real or of generated samples."""
        rows = as_rows(as_features(features))
        if rows.shape[1] != 1 + self.feature_dim:
            raise OviError(f"features must be [B, {self.feature_dim}], got {list(features.shape)}")
        self.add_rows("real" if real else "generated", rows)

    def compute(self) -> Tensor:
        """The distance, 0-d."""
        generated, real = (FeatureStatistics.of_rows(self.rows(name)) for name in ("generated", "real"))
        return distance_between(generated, real, unbiased=self.unbiased)
