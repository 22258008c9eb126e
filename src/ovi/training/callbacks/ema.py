"""Averaged weights that are of use from the first steps on."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ovi.errors import OviError


class WarmupEMA(WeightAveraging):
    """Exponential moving average whose decay grows: after n updates ``min(decay, (1 + n) / (10 + n))``.

    With a fixed decay of 0.999 the average of a run of a hundred steps would be little else than the initial weights.

    Args:
        decay: share of the old average that an update keeps, once warmed up.
        update_every_n_steps: optimizer steps between updates.
    """

    def __init__(self, *, decay: float = 0.999, update_every_n_steps: int = 1) -> None:
        if not 0 <= decay < 1 or update_every_n_steps < 1:
            raise OviError(
                f"callbacks.ema needs decay in 0 to below 1 and update_every_n_steps of at least 1, got {decay} and "
                f"{update_every_n_steps}"
            )
        super().__init__(multi_avg_fn=self._average)
        self.decay, self.update_every_n_steps = decay, update_every_n_steps

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to update after this optimizer step, counted from 0."""
        return step_idx is not None and (step_idx + 1) % self.update_every_n_steps == 0

    def _average(self, averaged: Any, current: Any, num_averaged: Tensor | int) -> None:
        n = int(num_averaged)
        get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))(averaged, current, num_averaged)
