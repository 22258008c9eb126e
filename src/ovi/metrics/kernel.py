"""Kernel distances: the unbiased estimate of the squared maximum mean discrepancy, zero on average between equals.

Unlike a Frechet distance it does not grow as samples get fewer, and assumes no Gaussians: the better figure for few
samples. It can come out below 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovi.errors import OviError
from ovi.metrics.frechet import as_features
from ovi.metrics.rows import RowStates

MAX_SAMPLES = 2048
_SLACK = 256
_KAD_SCALE = 100.0
_KAD_EPSILON = 1e-8


def kernel_distance(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    *,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
) -> Tensor:
    """Squared MMD of the polynomial kernel (gamma a.b + coef0)^degree over all pairs, unbiased (Binkowski et al.,
    1801.01401, section 4; no random subsets).

    Args:
        x: [N, D].
        y: [M, D].
        degree: of the polynomial.
        gamma: factor of the product; None is 1 / D.
        coef0: added to it.

    Returns:
        float64, 0-d; below 0 by chance.

    Raises:
        OviError: for fewer than 2 samples a side, other shapes, or values that are not finite.
    """
    first, second = _two_sets(x, y)
    scale = 1.0 / first.shape[1] if gamma is None else gamma
    kernels = [(a @ b.T * scale + coef0) ** degree for a, b in ((first, first), (second, second), (first, second))]
    return _unbiased(*kernels)


def kernel_audio_distance(generated: Tensor | np.ndarray, real: Tensor | np.ndarray) -> Tensor:
    """Kernel audio distance: 100 times the squared MMD of a Gaussian kernel as wide as the median distance between two
    real samples, unbiased (Chung et al., 2502.15602; all pairs for the median).

    Args:
        generated: [N, D].
        real: [M, D].

    Returns:
        float64, 0-d; below 0 by chance.

    Raises:
        OviError: for fewer than 2 samples a side, other shapes, or values that are not finite.
    """
    first, second = _two_sets(generated, real)
    apart = [torch.cdist(a, b) for a, b in ((first, first), (second, second), (first, second))]
    above_diagonal = torch.ones_like(apart[1], dtype=torch.bool).triu(1)
    width = apart[1][above_diagonal].median()
    gamma = 1.0 / (2.0 * width.square() + _KAD_EPSILON)
    return _KAD_SCALE * _unbiased(*(torch.exp(-gamma * distances.square()) for distances in apart))


def _two_sets(x: Tensor | np.ndarray, y: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    first, second = as_features(x), as_features(y)
    if first.shape[1] != second.shape[1]:
        raise OviError(f"features must be as wide in both sets, got {list(first.shape)} and {list(second.shape)}")
    if min(len(first), len(second)) < 2:
        raise OviError(f"a kernel distance needs 2 or more samples a side, got {len(first)} and {len(second)}")
    return first, second


def _unbiased(xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    """Mean over pairs of different samples within each set, minus twice the mean between them."""
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    return within[0] + within[1] - 2 * xy.mean()


# --- a bounded choice of samples ----------------------------------------------------------------------------------


def lots(numbers: Iterable[int], window: int = 0) -> Tensor:
    """A number in 0..1 for each sample, decided by its own number (and window) alone, as if drawn: float64 [B]."""
    drawn = (hashlib.blake2b(f"{int(n)}/{window}".encode(), digest_size=8).digest() for n in numbers)
    return torch.tensor([(int.from_bytes(d, "big") >> 11) / 2**53 for d in drawn], dtype=torch.float64)


def lowest(rows: Tensor, number: int) -> Tensor:
    """The rows of the lowest lots (first column), in that order."""
    return rows[rows[:, 0].argsort(stable=True)[:number]]


def add_choice(metric: RowStates, name: str, feature_dim: int, max_samples: int) -> None:
    """Give a metric a state of rows (lot, features), of which the ``max_samples`` of lowest lots are sure to stay."""
    shrink = partial(lowest, number=max_samples)
    metric.add_row_state(name, 1 + feature_dim, limit=max_samples + _SLACK, shrink=shrink)


class KernelDistance(RowStates):
    """Unbiased squared MMD of a polynomial kernel between features of generated and of real samples.

    At most ``max_samples`` a side are kept, chosen by their numbers as if drawn by lot: neither order nor number of
    processes matters.

    Args:
        feature_dim: D.
        max_samples: kept a side.
        degree: as for ``kernel_distance``.
        gamma: as for ``kernel_distance``.
        coef0: as for ``kernel_distance``.

    Raises:
        OviError: from ``compute`` when there are fewer than 2 samples on either side.
    """

    full_state_update = False

    def __init__(
        self,
        feature_dim: int,
        *,
        max_samples: int = MAX_SAMPLES,
        degree: int = 3,
        gamma: float | None = None,
        coef0: float = 1.0,
        **metric_knobs: Any,
    ) -> None:
        super().__init__(**metric_knobs)
        if max_samples < 2:
            raise OviError(f"max_samples must be 2 or more, got {max_samples}")
        self.feature_dim, self.max_samples = feature_dim, max_samples
        self.degree, self.gamma, self.coef0 = degree, gamma, coef0
        for name in ("real", "generated"):
            add_choice(self, name, feature_dim, max_samples)

    def update(self, features: Tensor, real: bool, numbers: Iterable[int]) -> None:
        """Add features [B, D] of real or of generated samples, with the number of each in its set."""
        given, drawn = as_features(features), lots(numbers)
        if given.shape[1] != self.feature_dim or len(drawn) != len(given):
            raise OviError(
                f"features must be [B, {self.feature_dim}] with B numbers, got {list(given.shape)} and {len(drawn)}"
            )
        self.add_rows("real" if real else "generated", torch.cat([drawn.to(given.device)[:, None], given], dim=1))

    def compute(self) -> Tensor:
        """The distance, 0-d."""
        generated, real = (lowest(self.rows(name), self.max_samples)[:, 1:] for name in ("generated", "real"))
        return kernel_distance(generated, real, degree=self.degree, gamma=self.gamma, coef0=self.coef0)
