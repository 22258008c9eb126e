"""Hydra's launchers: which there are, how many runs they work on at a time, and what becomes of a run that dies."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from ovi.commands.hints import did_you_mean
from ovi.commands.sweeping.composing import OF_RUNS
from ovi.commands.sweeping.variants import quoted
from ovi.errors import OviError

PACKAGES = {
    "basic": None,
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
    "ray": "hydra-ray-launcher",
}
"""Launchers by their names in Hydra, and the packages they come from."""


@dataclass(frozen=True)
class Parallel:
    """How runs share this machine.

    Args:
        launcher: its name in Hydra.
        n_jobs: runs at a time.
        threads: processors each computes on; None: as many as torch takes.
    """

    launcher: str
    n_jobs: int
    threads: int | None


def parallel(launcher: str, n_jobs: int | None, threads: int | None) -> Parallel:
    """Settle how many runs work at a time, and on how many processors each.

    Args:
        launcher: as the user says it; ``submitit`` is SLURM where there is one, else this machine.
        n_jobs: None: one, with a parallel launcher as many as there are processors.
        threads: None: a run's share of the processors.

    Raises:
        OviError: for an unknown launcher, one that is not installed, or numbers that make no sense.
    """
    name = launcher
    if launcher == "submitit":
        name = "submitit_slurm" if shutil.which("sbatch") else "submitit_local"
    for key, value in (("n_jobs", n_jobs), ("threads", threads)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise OviError(f"{key} is a whole number from 1, got {value!r}")
    found = _launchers()
    if name not in found:
        if name in PACKAGES:
            extra = "sweep-ray" if name == "ray" else "sweep"
            raise OviError(
                f"launcher={launcher} needs {PACKAGES[name]}, which is not there: pip install 'ovi[{extra}]'"
            )
        known = [*PACKAGES, "submitit"]
        raise OviError(
            f"no launcher is called {launcher!r}.{did_you_mean(launcher, known)} There are: {', '.join(known)}"
        )
    if name == "basic":
        if n_jobs not in (None, 1):
            raise OviError(f"launcher=basic works on one run at a time: n_jobs={n_jobs} wants joblib, submitit or ray")
        return Parallel(name, 1, threads)
    cores = len(os.sched_getaffinity(0))
    jobs = n_jobs or max(1, cores // (threads or 1))
    if threads is None and name != "submitit_slurm":
        threads = max(1, cores // jobs)
    return Parallel(name, jobs, threads)


def _launchers() -> list[str]:
    from hydra.core.config_store import ConfigStore

    Plugins.instance()  # finds them
    return [name.removesuffix(".yaml") for name in ConfigStore.instance().list("hydra/launcher")]


class Runs:
    """Hands runs to a launcher of Hydra, and again if the process of one dies.

    Args:
        loader: Hydra's.
        how: the launcher and its numbers.
        folder: of the sweep.
        own: overrides of ``hydra.launcher``.
    """

    def __init__(self, loader: Any, how: Parallel, folder: Path, own: Sequence[str]) -> None:
        self.loader, self.how, self.folder, self.own = loader, how, folder, own
        self._number = 0

    def __call__(
        self,
        job: Any,
        overrides: dict[str, list[str]],
        stopped: Callable[[str], bool],
        died: Callable[[str, Exception], None],
    ) -> list[dict[str, Any]]:
        """Do runs; returns what each answers.

        Args:
            job: the task.
            overrides: of each run, by its id.
            stopped: whether a run has not come to an end.
            died: told of a run whose process ended without an answer twice, the second time alone.
        """
        answers: list[dict[str, Any]] = []
        pending, suspects = list(overrides), list[str]()
        batch = self.how.n_jobs if self.how.launcher == "submitit_local" else len(pending)
        while pending or suspects:
            # After a death nobody knows whose it was, so those that were at work are done one by one.
            ids = [suspects.pop(0)] if suspects else pending[:batch]
            alone = len(ids) == 1
            pending = [run for run in pending if run not in ids]
            try:
                answers += self._launch(job, ids, overrides)
            except Exception as error:
                left = [run for run in ids if stopped(run)]
                if not left:
                    continue
                if alone:
                    died(left[0], error)
                    answers.append({"run": left[0], "status": "failed", "error": f"its process died: {error}"})
                else:
                    suspects += left
        return answers

    def _launch(self, job: Any, ids: list[str], overrides: dict[str, list[str]]) -> list[dict[str, Any]]:
        config = self._config()
        launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(config_loader=self.loader, callbacks=_callbacks(config)),
            task_function=job,
            config=config,
        )
        rows = [[*overrides[run], f"hydra.sweep.subdir={quoted(run)}"] for run in ids]
        with nullcontext() if self.how.launcher == "basic" else _ended_together():
            returned = launcher.launch(rows, initial_job_idx=self._number)
        self._number += len(rows)
        return [answer.return_value for answer in returned]

    def _config(self) -> DictConfig:
        how = self.how
        words = [f"hydra/launcher={how.launcher}", f"hydra.sweep.dir={quoted(str(self.folder))}"]
        words += ["hydra.output_subdir=null", "hydra.mode=MULTIRUN"]
        given = [word.partition("=")[0].lstrip("+") for word in self.own]

        def default(key: str, value: Any) -> None:
            if key not in given:
                words.append(f"++{key}={value}")

        if how.launcher == "joblib":
            default("hydra.launcher.n_jobs", how.n_jobs)
        elif how.launcher == "submitit_slurm":
            default("hydra.launcher.array_parallelism", how.n_jobs)
        elif how.launcher == "ray":
            default("hydra.launcher.ray.init.num_cpus", how.n_jobs * (how.threads or 1))
            default("hydra.launcher.ray.remote.num_cpus", how.threads or 1)
        if how.threads and how.launcher.startswith("submitit"):
            default("hydra.launcher.cpus_per_task", how.threads)
        return self.loader.load_configuration(OF_RUNS, [*words, *self.own], run_mode=RunMode.MULTIRUN)  # type: ignore[no-any-return]


@contextmanager
def _ended_together() -> Iterator[None]:
    """Have SIGTERM raise: left by an exception a launcher ends its processes, killed it leaves them to themselves.

    Not for runs in this process: Lightning ends those after the step that they are at.
    """
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not mine:  # whoever embeds this has a way of its own
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _callbacks(config: DictConfig) -> Any:
    from hydra._internal.callbacks import Callbacks

    return Callbacks(config)


__all__ = ["PACKAGES", "Parallel", "Runs", "parallel"]
