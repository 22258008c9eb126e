"""One run of a sweep, in whatever process a launcher calls it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from ovi.commands.kernel import in_notebook
from ovi.commands.record import clear_run
from ovi.commands.sweeping.folder import Point, SweepFolder

CLAIMS = ".claims"
ELSEWHERE = "running elsewhere"


def _may_go_on(config: DictConfig, checkpoint: Path) -> bool:
    """Whether an interrupted run can be continued and still be measured at its end."""
    from ovi.commands.budget import read_budget
    from ovi.commands.restore import read_checkpoint

    budget = read_budget(config)
    # A run of so many seconds measures how many steps that is: to go on it would have to measure the same.
    if budget is not None and budget.kind != "steps":
        return budget.kind == "flops"
    # At its last step the checkpoint is written before the validation, which nothing would make up for.
    steps = config.trainer.max_steps if budget is None else int(budget.amount)
    return not 0 < steps <= int(read_checkpoint(checkpoint)["global_step"])


@dataclass
class Job:
    """The task that launchers call with a run's configuration; it can be pickled.

    Args:
        path: the sweep's folder.
        sweep: its name.
        points: by run id.
        total: runs of the sweep.
        threads: processors a run computes on; None leaves it as it is.
        alone: whether runs have the terminal for themselves, and may show their progress there.
        resume: continue a run that was interrupted from its last checkpoint.
        checkpoints: of runs that are measured instead of trained: run id -> folder of the training.
        trials: of a search: run id -> what its ``Reporter`` wants.
        variants: whether the runs are what is compared, and have their rows in the table.
    """

    path: Path
    sweep: str
    points: Mapping[str, Point]
    total: int
    threads: int | None = None
    alone: bool = True
    resume: bool = False
    checkpoints: Mapping[str, Path] = field(default_factory=dict)
    trials: Mapping[str, Any] = field(default_factory=dict)
    variants: bool = True

    __name__ = "sweep"

    def __call__(self, config: DictConfig) -> dict[str, Any]:
        """Run and record it; whatever goes wrong is told in the answer, so that the other runs go on."""
        from ovi.commands.components import load_components
        from ovi.data.claims import Claims

        load_components()
        run_id = Path(HydraConfig.get().runtime.output_dir).name
        self._prepare(config)
        claims = Claims(self.path / CLAIMS)
        try:
            if not claims.take(run_id):
                return {"run": run_id, "status": ELSEWHERE}
            return self._claimed(config, run_id)
        finally:
            claims.close()

    def _claimed(self, config: DictConfig, run_id: str) -> dict[str, Any]:
        from ovi.commands.failure import user_message
        from ovi.commands.record import write_failure
        from ovi.runs.run import FAILURE, FINISHED, RUNNING, SUMMARY, load_run
        from ovi.runs.table import append_row, row_of

        folder = SweepFolder(self.path)
        point, began = self.points[run_id], time.perf_counter()
        there = folder.of(point)
        try:
            status = folder.status(point)
            if status == FINISHED:  # by another sweep in this folder, meanwhile
                return {"run": run_id, "status": FINISHED}
            if status == RUNNING:
                return {"run": run_id, "status": ELSEWHERE}
            checkpoint = there / "checkpoints" / "last.ckpt"
            if self.resume and checkpoint.is_file() and status != "failed" and _may_go_on(config, checkpoint):
                config.resume = str(checkpoint)
            else:
                clear_run(there)
            self._say(f"{point}: begins")
            self._work(config, point, there)
            run = load_run(there)
            if self.variants:
                append_row(self.path, row_of(run))
        except Exception as error:
            message = user_message(error) or f"{type(error).__name__}: {error}"
            # A run that has finished stays so, whatever keeps its row from the table.
            if not any((there / name).is_file() for name in (FAILURE, SUMMARY)):
                from ovi.commands.record import begin_run

                begin_run(there, self._identity(point) | {"seed": point.seed, "config_hash": point.config_hash})
                write_failure(there, error)
            self._say(f"{point}: failed: {message.splitlines()[0]}")
            return {"run": run_id, "status": "failed", "error": message}
        how = f"pruned at step {run.summary['pruned']}" if "pruned" in run.summary else "finished"
        self._say(f"{point}: {how} in {time.perf_counter() - began:.0f} s")
        return {"run": run_id, "status": FINISHED}

    def _work(self, config: DictConfig, point: Point, folder: Path) -> None:
        from ovi.commands.train import fit

        if point.run_id in self.checkpoints:
            from ovi.commands.sweeping.measuring import measure_run

            measure_run(config, folder, self.checkpoints[point.run_id], self._identity(point))
            return
        callbacks = []
        if point.run_id in self.trials:
            from ovi.training.callbacks.pruning import Pruning

            reporter = self.trials[point.run_id]
            callbacks.append(Pruning(reporter, reporter.tag))
        fit(config, folder, identity=self._identity(point), callbacks=callbacks)

    def _identity(self, point: Point) -> dict[str, Any]:
        return {"label": point.variant.label, "variant": point.variant.settings, "sweep": self.sweep}

    def _prepare(self, config: DictConfig) -> None:
        if self.threads:
            import torch

            os.environ["OMP_NUM_THREADS"] = str(self.threads)  # of processes that load data
            torch.set_num_threads(self.threads)
        if not self.alone or in_notebook():
            with open_dict(config):
                config.trainer.enable_progress_bar = False
                if config.callbacks.get("progress") is not None:
                    config.callbacks.progress = None

    def _say(self, sentence: str) -> None:
        # What stands on standard error looks like an error in a notebook.
        print(sentence, file=sys.stdout if in_notebook() else sys.stderr, flush=True)
