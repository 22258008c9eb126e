"""Ends a run that is not worth going on with."""

from __future__ import annotations

import math
from collections.abc import Callable

import lightning as L

from ovi.errors import OviError

Report = Callable[[int, float], bool]
"""(step, figure) -> whether to stop: whoever compares runs decides."""


class Pruning(L.Callback):
    """Reports a figure after each validation round and ends training where the answer says so.

    A figure that is not a number is not reported.

    Args:
        report: told the step and the figure.
        tag: of the figure, such as ``val/loss``.

    Attributes:
        pruned: the step at which training was ended; None while it was not.

    Raises:
        OviError: after the first round, when no figure has that tag.
    """

    def __init__(self, report: Report, tag: str) -> None:
        self.report, self.tag = report, tag
        self.pruned: int | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        found = trainer.callback_metrics
        if self.tag not in found:
            raise OviError(f"no figure is called {self.tag!r}; validation gave {', '.join(sorted(found)) or 'none'}")
        value, last = float(found[self.tag]), trainer.global_step >= trainer.max_steps > 0
        stop = trainer.is_global_zero and math.isfinite(value) and self.report(trainer.global_step, value)
        # All processes end at once, and a run at its last step is whole.
        if trainer.strategy.broadcast(stop) and not last:
            self.pruned, trainer.should_stop = trainer.global_step, True
