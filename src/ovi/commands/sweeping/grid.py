"""A sweep over listed variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ovi.commands.sweeping.folder import ABSENT, Point
from ovi.commands.sweeping.job import ELSEWHERE, Job
from ovi.commands.sweeping.plan import Plan
from ovi.commands.sweeping.summary import Console, announce, conclude
from ovi.commands.sweeping.variants import Variant
from ovi.errors import OviError
from ovi.runs.run import FAILED, FINISHED, RUNNING

TRAINING = Variant("training", ())
"""What is trained once a seed where generation alone varies."""


def sweep_grid(plan: Plan) -> Any:
    """Do what is not done yet of every variant and seed; returns the table of results.

    Raises:
        OviError: before the first run for what does not fit, afterwards when a run failed.
    """
    console = Console()
    with console.status(f"checking {len(plan.variants)} variants"):
        points = plan.points(plan.variants, merge=not plan.config.crossed)
        trainings = [] if plan.config.retrain else plan.points([TRAINING], check=False)
    plan.folder.define(plan.definition(plan.variants))
    failed: dict[str, str] = {}
    if trainings:
        failed |= do_all(plan, trainings, console, "trainings", variants=False)
    checkpoints = {}
    by_seed = {point.seed: point for point in trainings}
    for point in points if trainings else []:
        training = by_seed[point.seed]
        if plan.folder.status(training) == FINISHED:
            checkpoints[point.run_id] = plan.folder.of(training)
    ready = [point for point in points if not trainings or point.run_id in checkpoints]
    failed |= do_all(plan, ready, console, "runs", checkpoints=checkpoints)
    plan.folder.collect(points)
    return conclude(plan, points, failed, console)


def do_all(
    plan: Plan,
    points: list[Point],
    console: Console,
    what: str,
    *,
    checkpoints: dict[str, Path] | None = None,
    trials: dict[str, Any] | None = None,
    variants: bool = True,
) -> dict[str, str]:
    """Do those of some runs that are not done and that nobody is at; returns what failed, by run id.

    Args:
        plan: of the sweep.
        points: its runs.
        console: to say what is done.
        what: the runs are called.
        checkpoints: of runs that are measured instead of trained.
        trials: reporters of runs that may be pruned.
        variants: whether these are what is compared; trainings that others measure are not, and have no rows.
    """
    statuses = {point.run_id: plan.folder.status(point) for point in points}
    announce(plan, points, statuses, console, what)
    todo = [point for point in points if statuses[point.run_id] not in (FINISHED, RUNNING)]
    failed: dict[str, str] = {}
    if not todo:
        return failed
    of_id = {point.run_id: point for point in todo}
    job = Job(
        plan.folder.path.absolute(),
        plan.name,
        of_id,
        len(points),
        threads=plan.how.threads,
        alone=plan.how.n_jobs == 1,
        resume=plan.resumes,
        checkpoints={run: path.absolute() for run, path in (checkpoints or {}).items()},
        trials=trials or {},
        variants=variants,
    )

    def stopped(run: str) -> bool:
        return plan.folder.status(of_id[run]) in (ABSENT, "stopped")

    def died(run: str, error: Exception) -> None:
        from ovi.commands.record import write_failure

        if (plan.folder.of(of_id[run]) / "run.json").is_file():
            write_failure(plan.folder.of(of_id[run]), OviError(f"its process died: {error}"))

    overrides = {p.run_id: plan.composer.overrides(p.variant.overrides, p.seed) for p in todo}
    for answer in plan.runs(job, overrides, stopped, died):
        if answer["status"] == "failed":
            failed[answer["run"]] = answer["error"]
        elif answer["status"] == ELSEWHERE:
            console.say(f"{of_id[answer['run']]}: another process is at it")
    for point in todo:  # a run's answer is lost when the process of another one dies beside it
        run = plan.folder.run(point)
        if run is not None and run.status == FAILED and point.run_id not in failed:
            failed[point.run_id] = str(run.failure.get("error") or "unknown")
    return failed
