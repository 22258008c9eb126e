"""Distances between the features of generated clips and of real ones, whatever the network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ovi.errors import OviError
from ovi.metrics.clip_metric import ClipMetric, MeasuredClip
from ovi.metrics.features.base import Extractor
from ovi.metrics.frechet import FeatureStatistics, add_moments, as_features, as_rows, distance_between
from ovi.metrics.kernel import MAX_SAMPLES, add_choice, kernel_distance, lots, lowest
from ovi.metrics.rows import RowStates

COVARIANCES = ("biased", "unbiased")
SETS = ("generated", "real_even", "real_odd")
"""The real set is kept in halves, clips of even and of odd number, so that one can be held against the other."""

KernelFigure = Callable[[Tensor, Tensor], Tensor]
"""A kernel distance of (generated [N, D], real [M, D])."""


class FeatureDistance(ClipMetric, RowStates):
    """Frechet and kernel distance between the features of generated clips and of real ones.

    ``compute`` gives ``<tag>`` and ``<kernel_tag>``, each with ``_n`` (generated) and ``_n_real`` beside it, for a
    figure of another n is another figure: clips for the Frechet distance, kept samples for the kernel distance. Where a
    clip gives several features, ``<tag>_windows`` and ``<tag>_windows_real`` say how many there were. Windows of one
    clip are alike, so both distances then come out as high as fewer samples make them, and the kernel distance of
    equals is above 0: hold them against ``floor`` at an equal number of clips.

    Memory: about three times (D + 256) x D numbers, and 3 x ``max_samples`` x D for the kernel distance.

    Args:
        fps: frames per second of the clips.
        sample_rate: of their sound, in Hz.
        extractor: gives the features.
        tag: of the Frechet distance; says the network and what else decides the figure.
        kernel_tag: of the kernel distance.
        covariance: ``biased`` (divided by n) or ``unbiased`` (by n - 1).
        kernel: whether to give the kernel distance.
        max_samples: features a set that it rests on, chosen by clip number as if drawn by lot.
        kernel_figure: which kernel distance.

    Raises:
        OviError: for another covariance or fewer than 2 ``max_samples``; from ``compute`` when either set has too few
            clips.
    """

    SUMS: tuple[str, ...] = ("clips_real_even", "clips_real_odd")
    USES_REAL = True
    clips_real_even: Tensor
    clips_real_odd: Tensor

    def __init__(
        self,
        fps: float,
        sample_rate: int,
        *,
        extractor: Extractor,
        tag: str,
        kernel_tag: str,
        covariance: str = "biased",
        kernel: bool = True,
        max_samples: int = MAX_SAMPLES,
        kernel_figure: KernelFigure = kernel_distance,
        **metric_knobs: Any,
    ) -> None:
        super().__init__(fps, sample_rate, **metric_knobs)
        if covariance not in COVARIANCES:
            raise OviError(f"covariance must be {' or '.join(COVARIANCES)}, got {covariance!r}")
        if max_samples < 2:
            raise OviError(f"max_samples must be 2 or more, got {max_samples}")
        self.extractor, self.tag, self.kernel_tag = extractor, tag, kernel_tag
        self.covariance, self.kernel, self.max_samples = covariance, bool(kernel), int(max_samples)
        self._kernel_figure = kernel_figure
        for name in SETS:
            add_moments(self, f"moments_{name}", extractor.feature_dim)
            if self.kernel:
                add_choice(self, f"chosen_{name}", extractor.feature_dim, self.max_samples)

    @abstractmethod
    def features_of(self, clip: MeasuredClip) -> Tensor:
        """Features [R, D] of one clip: one row a window, or one for the whole."""

    def identity(self) -> dict[str, Any]:
        """What decides the figures."""
        chosen = {"max_samples": self.max_samples, "kernel_tag": self.kernel_tag} if self.kernel else {}
        network = {"network": self.extractor.name, "digest": self.extractor.digest}
        return {**super().identity(), "tag": self.tag, **network, "covariance": self.covariance, **chosen}

    def add_clip(self, clip: MeasuredClip) -> None:
        """Add the features of one clip to the set it is of.

        Raises:
            OviError: when the network gives NaN or another number of features than it says.
        """
        try:
            features = as_features(self.features_of(clip))
        except OviError as error:
            raise OviError(f"{self.tag}: clip {clip.number}: {error}") from error
        if features.shape[1] != self.extractor.feature_dim:
            raise OviError(
                f"{self.tag}: {self.extractor.name} gave {features.shape[1]} features a window, its feature_dim says "
                f"{self.extractor.feature_dim}"
            )
        half = "real_odd" if clip.number % 2 else "real_even"
        name = half if clip.real else "generated"
        if clip.real:
            setattr(self, f"clips_{half}", getattr(self, f"clips_{half}") + 1)
        self.add_rows(f"moments_{name}", as_rows(features))
        if self.kernel:
            drawn = torch.cat([lots([clip.number], window) for window in range(len(features))])
            self.add_rows(f"chosen_{name}", torch.cat([drawn.to(features.device)[:, None], features], dim=1))

    def compute(self) -> dict[str, Tensor]:
        """The figures of the generated clips against the real ones, by tag.

        Raises:
            OviError: when either set gave fewer than 2 features.
        """
        statistics = self._statistics("generated"), self._statistics("real_even", "real_odd")
        counts = self.clips, self._clips_real()
        if min(side.count for side in statistics) < 2:
            generated, real = (int(count) for count in counts)
            raise OviError(
                f"{self.tag} needs 2 or more clips in both sets, got {generated} generated and {real} real: measure "
                "more, or switch it off"
            )
        return self._figures(statistics, counts, (["generated"], ["real_even", "real_odd"]))

    def floor(self) -> dict[str, Tensor]:
        """The figures of the real clips of even number against those of odd number, by the same tags.

        A half of fewer than 2 clips leaves only the numbers of clips.
        """
        with self.over_processes():
            statistics = self._statistics("real_even"), self._statistics("real_odd")
            counts = self.clips_real_even.clone(), self.clips_real_odd.clone()
            if min(side.count for side in statistics) < 2:
                return self._numbers(counts)
            return self._figures(statistics, counts, (["real_even"], ["real_odd"]))

    def real_state(self) -> dict[str, Tensor]:
        """Statistics of the real set over all processes."""
        with self.over_processes():
            return {name: getattr(self, name).clone() for name in self._real_sums()} | {
                name: self.rows(name).clone() for name in self._real_rows()
            }

    def load_real_state(self, state: Mapping[str, Tensor]) -> None:
        """Take statistics of the real set, on one process only.

        Raises:
            OviError: when they are of another metric, or of features of another width.
        """
        sums, rows = self._real_sums(), self._real_rows()
        if set(state) != {*sums, *rows}:
            raise OviError(f"these are not statistics of {self.tag}: they hold {', '.join(state)}")
        wide = {name: state[name].shape[-1] for name in rows if state[name].shape[-1] != 1 + self.extractor.feature_dim}
        if wide:
            raise OviError(f"{self.tag} has features of {self.extractor.feature_dim}, the statistics {wide}")
        for name in sums:
            setattr(self, name, state[name].to(self.device, torch.float64, copy=True))
        for name in rows:
            self.set_rows(name, state[name])
        self._computed = None

    def _real_sums(self) -> tuple[str, ...]:
        return "clips_real_even", "clips_real_odd"

    def _real_rows(self) -> list[str]:
        kinds = ["moments", "chosen"] if self.kernel else ["moments"]
        return [f"{kind}_{name}" for kind in kinds for name in SETS[1:]]

    def _clips_real(self) -> Tensor:
        return self.clips_real_even + self.clips_real_odd

    def _statistics(self, *sets: str) -> FeatureStatistics:
        return FeatureStatistics.of_rows(torch.cat([self.rows(f"moments_{name}") for name in sets]))

    def _chosen(self, sets: list[str]) -> Tensor:
        return lowest(torch.cat([self.rows(f"chosen_{name}") for name in sets]), self.max_samples)[:, 1:]

    def _numbers(self, counts: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {f"{self.tag}_n": counts[0].clone(), f"{self.tag}_n_real": counts[1].clone()}

    def _figures(
        self,
        statistics: tuple[FeatureStatistics, FeatureStatistics],
        counts: tuple[Tensor, Tensor],
        sets: tuple[list[str], list[str]],
    ) -> dict[str, Tensor]:
        figures = {self.tag: distance_between(*statistics, unbiased=self.covariance == "unbiased")}
        figures.update(self._numbers(counts))
        windows = [counts[0].new_tensor(float(side.count)) for side in statistics]
        if any(int(n) != side.count for n, side in zip(counts, statistics)):
            figures.update({f"{self.tag}_windows": windows[0], f"{self.tag}_windows_real": windows[1]})
        if self.kernel:
            generated, real = (self._chosen(names) for names in sets)
            figures[self.kernel_tag] = self._kernel_figure(generated, real)
            figures[f"{self.kernel_tag}_n"] = counts[0].new_tensor(float(len(generated)))
            figures[f"{self.kernel_tag}_n_real"] = counts[0].new_tensor(float(len(real)))
        return figures
