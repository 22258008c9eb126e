"""A sweep whose settings Optuna draws, from what earlier trials gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from ovi.commands.hints import did_you_mean
from ovi.commands.sweeping.folder import Point
from ovi.commands.sweeping.grid import do_all
from ovi.commands.sweeping.plan import Plan
from ovi.commands.sweeping.summary import Console, conclude
from ovi.commands.sweeping.variants import Variant, literal
from ovi.data.claims import Claims
from ovi.errors import OviError
from ovi.runs.run import FAILED, FINISHED, RUNNING

if TYPE_CHECKING:
    import optuna

JOURNAL, TRIALS = "optuna.journal", ".trials"
_RETRY = "retry_of"


@dataclass(frozen=True)
class Reporter:
    """Tells a trial's figure to its study, from whatever process the trial runs in.

    Args:
        journal: the study's file.
        study: its name.
        trial: the trial's number in the study.
        tag: of the figure.
        pruner: by name.
    """

    journal: Path
    study: str
    trial: int
    tag: str
    pruner: str

    def __call__(self, step: int, value: float) -> bool:
        """Report a figure; whether to stop."""
        import optuna

        study = optuna.load_study(study_name=self.study, storage=_storage(self.journal), pruner=_pruner(self.pruner))
        trial = optuna.trial.Trial(study, study.get_trials(deepcopy=False)[self.trial]._trial_id)
        trial.report(value, step)
        return trial.should_prune()


def sweep_search(plan: Plan) -> Any:
    """Draw and run trials until as many as asked for have not failed; returns the table of results.

    The study lies in the sweep's folder. Trials that were interrupted are run again with their settings, and those that
    ended with an error in an earlier call once more, as new trials; several processes may work on one study.

    Raises:
        OviError: before the first trial for what does not fit, afterwards when a run failed.
    """
    try:
        import optuna
    except ImportError as error:
        raise OviError("sweeper=optuna needs optuna, which is not there: pip install 'ovi[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = plan.config.search
    space = distributions(OmegaConf.to_container(plan.config.space, resolve=True))
    count = settings.num_trials
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise OviError(f"search.num_trials is a whole number from 1, got {count!r}")
    if settings.pruner != "none" and len(plan.seeds) > 1:
        raise OviError(
            f"search.pruner={settings.pruner} compares trials of one run each, and these have seeds={plan.seeds}: "
            "give one seed, or search.pruner=none"
        )
    pruner, sampler = _pruner(settings.pruner), partial(_sampler, settings.sampler, settings.seed)
    sampler(0)  # an unknown name shows now
    console = Console()
    with console.status("checking the ends of the search space"):
        plan.points([_ends(space, end) for end in (0, -1)], merge=True)
    plan.folder.define(plan.definition([]))
    journal = plan.folder.path / JOURNAL
    study = optuna.create_study(
        storage=_storage(journal),
        study_name=plan.name,
        direction=plan.objective.direction,  # type: ignore[arg-type]
        pruner=pruner,
        load_if_exists=True,
    )
    claims, points, failed = Claims(plan.folder.path / TRIALS), list[Point](), dict[str, str]()
    try:
        with claims.waiting_for("ask"):
            _try_again(plan, study, space, console)
            # What fails in this call is not drawn anew in it: whatever fails always would never end.
            begun = count + len(study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.FAIL]))
        elsewhere: set[int] = set()
        while batch := _batch(study, sampler, space, begun, plan.how.n_jobs, claims, elsewhere):
            failed |= _run(plan, study, batch, points, console, elsewhere)
            for number in batch:
                claims.give_back(str(number))
    finally:
        claims.close()
    for trial in study.get_trials(deepcopy=False):
        known = {point.variant.label for point in points}
        if trial.state.is_finished() and _label(trial.number) not in known and trial.params.keys() >= space.keys():
            points += plan.points([_variant(trial.number, trial.params)], check=False)
    plan.folder.collect(points)
    done = [t for t in study.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE]
    try:
        return conclude(plan, points, failed, console)
    finally:
        if done:
            best = study.best_trial
            words = " ".join(_variant(best.number, best.params).overrides)
            console.say(f"best of {len(done)} whole trials: {_label(best.number)}, "
                        f"{plan.objective.tag} {best.value:.4g}: {words}")  # fmt: skip


def distributions(space: Any) -> dict[str, Any]:
    """What Optuna draws each setting from.

    Args:
        space: by key, ``{low, high}`` with ``log`` or ``step``, or ``{choices}``.

    Raises:
        OviError: for an empty space, or an entry that makes no sense.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(space, Mapping) or not space:
        raise OviError("there is nothing to search: choose sweep=search, or give space={KEY: {low: 1e-4, high: 1e-2}}")
    found: dict[str, Any] = {}
    for key, given in space.items():
        entry = dict(given) if isinstance(given, Mapping) else {}
        unknown = [name for name in entry if name not in ("low", "high", "log", "step", "choices")]
        if not entry or unknown:
            what = f"no {unknown[0]!r}.{did_you_mean(unknown[0], ('low', 'high', 'log', 'step'))}" if unknown else given
            raise OviError(f"space.{key} is {{low, high}} with log or step, or {{choices: [...]}}; got {what}")
        try:
            if "choices" in entry:
                found[str(key)] = CategoricalDistribution(tuple(entry["choices"]))
            else:
                whole = all(isinstance(entry[end], int) for end in ("low", "high"))
                found[str(key)] = (IntDistribution if whole else FloatDistribution)(**entry)
        except (KeyError, TypeError, ValueError) as error:
            raise OviError(f"space.{key}={dict(entry)}: {type(error).__name__}: {error}") from error
    return found


def _run(
    plan: Plan,
    study: optuna.Study,
    batch: dict[int, dict[str, Any]],
    points: list[Point],
    console: Console,
    elsewhere: set[int],
) -> dict[str, str]:
    """Run some trials and tell the study what came out; numbers of those that go on elsewhere are added to it."""
    from optuna.trial import TrialState

    failed: dict[str, str] = {}
    of_trial: dict[int, list[Point]] = {}
    for number, params in batch.items():
        try:
            of_trial[number] = plan.points([_variant(number, params)])
        except OviError as error:  # a combination that does not fit is a trial that failed, not the end of the search
            failed[_label(number)] = str(error)
            study.tell(number, state=TrialState.FAIL)
    runs = [point for found in of_trial.values() for point in found]
    points += runs
    settings, trials = plan.config.search, {}
    if settings.pruner != "none":
        journal = (plan.folder.path / JOURNAL).absolute()
        trials = {
            point.run_id: Reporter(journal, plan.name, number, plan.objective.tag, settings.pruner)
            for number, found in of_trial.items()
            for point in found
        }
    failed |= do_all(plan, runs, console, f"runs of trials {', '.join(map(str, of_trial))}", trials=trials)
    for number, found in of_trial.items():
        made = [plan.folder.run(point) for point in found]
        if any(run is not None and run.status == RUNNING for run in made):
            # Its sweep was ended and it was not: what it gives is told when the sweep is called again.
            console.say(f"{_label(number)}: goes on without the sweep that began it; call again when it has ended")
            elsewhere.add(number)
            continue
        values = [run.metrics.get(plan.objective.tag, math.nan) for run in made if run and run.status == FINISHED]
        if len(values) < len(found) or not all(map(math.isfinite, values)):
            study.tell(number, state=TrialState.FAIL)
            if len(values) == len(found):
                console.say(f"{_label(number)}: {plan.objective.tag} is not finite: it counts as failed")
            if values and plan.objective.tag not in (made[0].metrics if made[0] else {}):
                tags = ", ".join(made[0].metrics) if made[0] else ""
                raise OviError(
                    f"objective.tag={plan.objective.tag}: no run has that figure; they have {tags or 'none'}"
                )
        elif any(run is not None and "pruned" in run.summary for run in made):
            study.tell(number, state=TrialState.PRUNED)
        else:
            study.tell(number, sum(values) / len(values))
    return failed


def _try_again(plan: Plan, study: optuna.Study, space: Mapping[str, Any], console: Console) -> None:
    """Put settings whose run ended with an error in line once more; what fails twice makes room for others.

    Settings that do not fit together, or whose figure is not finite, would be so again.
    """
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    again = {trial.user_attrs.get(_RETRY) for trial in trials}
    for trial in trials:
        known = trial.params.keys() >= space.keys() and trial.number not in again and _RETRY not in trial.user_attrs
        if trial.state == TrialState.FAIL and known and _ended_with_an_error(plan, trial):
            console.say(f"tried again: {_label(trial.number)}, which failed, as a new trial with its settings")
            study.enqueue_trial(dict(trial.params), user_attrs={_RETRY: trial.number})


def _ended_with_an_error(plan: Plan, trial: optuna.trial.FrozenTrial) -> bool:
    try:
        points = plan.points([_variant(trial.number, trial.params)], check=False)
    except OviError:
        return False
    return any(plan.folder.status(point) == FAILED for point in points)


def _batch(
    study: optuna.Study,
    sampler: Callable[[int], Any],
    space: dict[str, Any],
    count: int,
    most: int,
    claims: Claims,
    elsewhere: Collection[int],
) -> dict[int, dict[str, Any]]:
    """Trials to run next, claimed: those interrupted, then new ones until ``count`` were begun; settings by number.

    Args:
        elsewhere: trials whose runs go on without their sweep; they are left alone.
    """
    from optuna.trial import TrialState

    batch: dict[int, dict[str, Any]] = {}
    # All under one lock: a trial that is being drawn elsewhere looks like one that was left.
    with claims.waiting_for("ask"):
        for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if len(batch) == most or trial.number in elsewhere or not claims.take(str(trial.number)):
                continue
            if study.get_trials(deepcopy=False)[trial.number].state != TrialState.RUNNING:  # told in between
                claims.give_back(str(trial.number))
            elif trial.params.keys() >= space.keys():
                batch[trial.number] = dict(trial.params)
            else:  # its process ended while it was drawn
                study.tell(trial.number, state=TrialState.FAIL)
                claims.give_back(str(trial.number))
        begun = [state for state in TrialState if state != TrialState.WAITING]
        while len(batch) < most and len(study.get_trials(deepcopy=False, states=begun)) < count:
            # Not one sampler for all: begun anew, it would draw what it drew for the first trials.
            study.sampler = sampler(len(study.get_trials(deepcopy=False)))
            trial_ = study.ask(space)
            claims.take(str(trial_.number))
            batch[trial_.number] = dict(trial_.params)
    return batch


def _ends(space: dict[str, Any], end: int) -> Variant:
    """One end of every range, as a variant that must compose."""
    values = {key: d.choices[end] if hasattr(d, "choices") else (d.low, d.high)[end] for key, d in space.items()}
    return Variant("lowest" if end == 0 else "highest", tuple(f"{k}={literal(v)}" for k, v in values.items()))


def _label(number: int) -> str:
    return f"trial_{number:03d}"


def _variant(number: int, params: Mapping[str, Any]) -> Variant:
    return Variant(_label(number), tuple(f"{key}={literal(value)}" for key, value in params.items()))


def _storage(journal: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(journal)))


def _pruner(name: str) -> Any:
    from optuna.pruners import MedianPruner, NopPruner

    if name not in ("median", "none"):
        raise OviError(f"search.pruner is median or none, got {name!r}")
    return MedianPruner() if name == "median" else NopPruner()


def _sampler(name: str, seed: int, trial: int) -> Any:
    from optuna.samplers import RandomSampler, TPESampler

    if name not in ("tpe", "random"):
        raise OviError(f"search.sampler is tpe or random, got {name!r}")
    state = (seed * 1_000_003 + trial) % 2**32
    return TPESampler(seed=state, constant_liar=True) if name == "tpe" else RandomSampler(seed=state)
