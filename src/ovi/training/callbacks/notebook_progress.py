"""Progress of a run in one line of a notebook."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

_EVERY_S = 0.5


class NotebookProgress(ProgressBar):
    """One line below the cell: steps, losses, speed. Terminal bars leave a line an update behind in a notebook.

    Args:
        refresh_rate: batches between two updates; never more than two a second.
    """

    def __init__(self, *, refresh_rate: int = 10) -> None:
        super().__init__()
        self.refresh_rate, self._enabled = refresh_rate, True
        self._handle: Any = None
        self._began = self._shown = 0.0
        self._first = 0

    def disable(self) -> None:
        """Show nothing, as Lightning asks of all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show lines again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began, self._first, self._handle = time.monotonic(), trainer.global_step, None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.refresh_rate == 0 and time.monotonic() - self._shown > _EVERY_S:
            self._show(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._show(trainer, " (validation)")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show(trainer)

    def _show(self, trainer: L.Trainer, doing: str = "") -> None:
        if not self._enabled:
            return
        from IPython.display import display

        seconds = time.monotonic() - self._began
        speed = (trainer.global_step - self._first) / max(seconds, 1e-9)
        losses = [
            f"{name} {float(trainer.callback_metrics[name]):.3f}"
            for name in ("train/loss", "val/loss")
            if name in trainer.callback_metrics
        ]
        steps = f"step {trainer.global_step} of {trainer.max_steps}{doing}"
        line = _Line(", ".join([steps, *losses, f"{speed:.1f} steps/s", f"{seconds:.0f} s"]))
        if self._handle is None:
            self._handle = display(line, display_id=True)
        else:
            self._handle.update(line)
        self._shown = time.monotonic()


class _Line:
    """Text that a notebook shows without quotes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text
