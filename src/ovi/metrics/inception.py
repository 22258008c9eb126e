"""Scores from a classifier's logits: how sure and how varied it finds a set, and how far pairs are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from ovi.errors import OviError

KL_EPSILON = 1e-6


def inception_score(logits: Tensor | np.ndarray) -> Tensor:
    """exp of the mean KL(p(class | sample) || p(class)) (Salimans et al., 1606.03498, section 4).

    Over the whole set at once: the mean over ten splits, which papers often give, comes out lower, the more so the
    smaller the set.

    Args:
        logits: [N, K].

    Returns:
        float64, 0-d, from 1 (all alike, or unsure of all) to K.

    Raises:
        OviError: for another shape, no samples, or values that are not finite.
    """
    given = _as_logits(logits)
    return score_of_sums(torch.tensor(len(given)), *class_sums(given))


def kl_divergence(
    logits_generated: Tensor | np.ndarray, logits_real: Tensor | np.ndarray, *, epsilon: float = KL_EPSILON
) -> Tensor:
    """Mean over pairs of KL(real || generated) between class probabilities, the "KL softmax" of av-benchmark.

    Args:
        logits_generated: [N, K].
        logits_real: [N, K]; row n belongs to the same prompt as row n of the other.
        epsilon: added to the generated probabilities before their log, as in that protocol (which makes the figure of
            equal pairs slightly negative); 0 for the plain divergence.

    Returns:
        float64, 0-d.

    Raises:
        OviError: for shapes that differ, no pairs, or values that are not finite.
    """
    return _divergences(logits_generated, logits_real, epsilon).mean()


def class_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of p [K], sum of p log p over samples and classes): all that an inception score needs of its samples."""
    log_p = logits.to(torch.float64).log_softmax(-1)
    p = log_p.exp()
    return p.sum(0), torch.where(p > 0, p * log_p, 0.0).sum()


def score_of_sums(count: Tensor, probabilities: Tensor, negative_entropies: Tensor) -> Tensor:
    """The inception score of so many samples with these ``class_sums``."""
    marginal = probabilities / count
    return torch.exp(negative_entropies / count + torch.special.entr(marginal).sum())


class InceptionScore(Metric):
    """Inception score over all samples of all processes.

    Args:
        num_classes: K.

    Raises:
        OviError: from ``compute`` when there are no samples.
    """

    full_state_update = False
    count: Tensor
    probabilities: Tensor
    negative_entropies: Tensor

    def __init__(self, num_classes: int, **metric_knobs: Any) -> None:
        super().__init__(**metric_knobs)
        for name, shape in (("count", ()), ("probabilities", (num_classes,)), ("negative_entropies", ())):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        """Add logits [B, K]."""
        probabilities, negative_entropies = class_sums(_as_logits(logits))
        if probabilities.shape != self.probabilities.shape:
            raise OviError(f"logits must be [B, {len(self.probabilities)}], got {list(logits.shape)}")
        self.count += len(logits)
        self.probabilities += probabilities
        self.negative_entropies += negative_entropies

    def compute(self) -> Tensor:
        """The score, 0-d."""
        if not self.count:
            raise OviError("an inception score needs samples, got 0")
        return score_of_sums(self.count, self.probabilities, self.negative_entropies)


class KLDivergence(Metric):
    """Mean KL(real || generated) of class probabilities over pairs of all processes.

    Args:
        epsilon: as for ``kl_divergence``.

    Raises:
        OviError: from ``compute`` when there are no pairs.
    """

    full_state_update = False
    pairs: Tensor
    total: Tensor

    def __init__(self, *, epsilon: float = KL_EPSILON, **metric_knobs: Any) -> None:
        super().__init__(**metric_knobs)
        self.epsilon = epsilon
        for name in ("pairs", "total"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits_generated: Tensor, logits_real: Tensor) -> None:
        """Add pairs, logits [B, K] each."""
        divergences = _divergences(logits_generated, logits_real, self.epsilon)
        self.pairs += len(divergences)
        self.total += divergences.sum()

    def compute(self) -> Tensor:
        """The mean, 0-d."""
        if not self.pairs:
            raise OviError("a KL divergence needs pairs of a generated and a real sample, got 0")
        return self.total / self.pairs


def _divergences(logits_generated: Tensor | np.ndarray, logits_real: Tensor | np.ndarray, epsilon: float) -> Tensor:
    generated, real = _as_logits(logits_generated), _as_logits(logits_real)
    if generated.shape != real.shape:
        raise OviError(f"logits of pairs must have one shape, got {list(generated.shape)} and {list(real.shape)}")
    log_p, log_q = real.log_softmax(-1), generated.log_softmax(-1)
    if epsilon:
        log_q = (log_q.exp() + epsilon).log()
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def _as_logits(given: Tensor | np.ndarray) -> Tensor:
    logits = torch.as_tensor(given).detach().to(torch.float64)
    if logits.ndim != 2 or not len(logits) or not logits.shape[1]:
        raise OviError(f"logits must be [N, K] with N of 1 or more, got {list(logits.shape)}")
    if not logits.isfinite().all():
        raise OviError("logits hold NaN or infinite values")
    return logits
