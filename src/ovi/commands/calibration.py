"""The time of a training step on this machine, found out before training starts."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig

from ovi.errors import OviError

WARM_UP, FEWEST, MOST = 3, 5, 200
"""Steps that are not timed, and the fewest and most that are."""
SHARE, LEAST_S, MOST_S = 0.02, 1.0, 60.0
"""Timing lasts for this share of the budget, and for so many seconds at least and at most (a slow step aside)."""


def seconds_per_step(config: DictConfig, module: L.LightningModule, folder: Path) -> float:
    """Mean time of an optimizer step, loading of data included, by training a copy for a moment.

    The copy is trained as configured (device, precision, weight averaging) and thrown away: the module, the order of
    the data and the state of random generators stay as they are.

    Args:
        config: of ``ovi train``, with ``budget.seconds``.
        module: to be trained.
        folder: of the run.

    Raises:
        OviError: where a run has several processes, or ends before anything is timed.
    """
    timer = _Timer(min(MOST_S, max(LEAST_S, SHARE * float(config.budget.seconds))))
    averaging = [c for c in instantiate(config.callbacks, _convert_="all").values() if isinstance(c, WeightAveraging)]
    quiet: dict[str, Any] = {"limit_val_batches": 0, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = instantiate(
        config.trainer,
        _convert_="all",
        default_root_dir=str(folder),
        max_steps=WARM_UP + MOST,
        callbacks=[timer, *averaging],
        logger=False,
        val_check_interval=None,
        **quiet,
    )
    if trainer.world_size > 1:
        raise OviError(
            f"budget.seconds is measured in one process, and this run has {trainer.world_size}: set trainer.devices=1, "
            "or give budget.steps or budget.flops"
        )
    trained = copy.deepcopy(module)
    if config.compile:  # a copy of a module is not compiled, even if the module is
        trained.model.compile_layers()  # type: ignore[operator, union-attr]
    with isolate_rng():
        trainer.fit(trained, datamodule=instantiate(config.data, _convert_="all"))
    if not timer.seconds_per_step:
        raise OviError(
            f"budget.seconds is measured over more than {WARM_UP} steps, and training ended before: raise "
            "trainer.max_epochs or trainer.max_time, or give budget.steps"
        )
    return timer.seconds_per_step


class _Timer(L.Callback):
    def __init__(self, lasting_s: float) -> None:
        self.lasting_s, self.seconds_per_step = lasting_s, 0.0
        self._began: tuple[int, float] | None = None
        self._last = 0, 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step < WARM_UP or step == self._last[0]:  # a step may take several batches
            return
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self._last = step, now
        if self._began is None:
            self._began = step, now
            return
        steps, elapsed = step - self._began[0], now - self._began[1]
        if steps >= FEWEST and (elapsed >= self.lasting_s or steps >= MOST):
            self.seconds_per_step, trainer.should_stop = elapsed / steps, True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._began is not None and self._last[0] > self._began[0]:
            self.seconds_per_step = (self._last[1] - self._began[1]) / (self._last[0] - self._began[0])
