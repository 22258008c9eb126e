"""What a command line asks for: the settings of a sweep, read and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ovi.commands.hints import did_you_mean
from ovi.commands.sweeping.arguments import Arguments, key_of, merged
from ovi.commands.sweeping.composing import OF_RUNS, Composer, hash_of
from ovi.commands.sweeping.folder import Point, SweepFolder
from ovi.commands.sweeping.launching import Parallel, Runs, parallel
from ovi.commands.sweeping.variants import Variant, variants_of
from ovi.data.reading.mixture import load_mixture
from ovi.errors import OviError
from ovi.registry import REGISTRIES
from ovi.runs.identity import deciding

SWEEPERS = ("grid", "optuna")


@dataclass(frozen=True)
class Objective:
    """What ranks runs.

    Args:
        tag: of a figure.
        direction: minimize or maximize.
    """

    tag: str
    direction: str


@dataclass
class Plan:
    """A sweep, ready to run.

    Args:
        name: of it.
        config: its settings.
        composer: of its runs.
        folder: of it.
        seeds: of every variant.
        objective: what ranks variants.
        how: launcher and its numbers.
        runs: hands them to the launcher.
        searches: whether settings are drawn instead of listed.
        variants: those listed.
    """

    name: str
    config: DictConfig
    composer: Composer
    folder: SweepFolder
    seeds: list[int]
    objective: Objective
    how: Parallel
    runs: Runs
    searches: bool
    variants: list[Variant] = field(default_factory=list)

    @property
    def resumes(self) -> bool:
        """Whether interrupted runs continue from their checkpoints."""
        return bool(self.config.on_stopped == "continue")

    def points(self, variants: list[Variant], *, check: bool = True, merge: bool = False) -> list[Point]:
        """The runs of some variants, composed and checked, variants of one seed together.

        Args:
            variants: of the sweep.
            check: see that each could start.
            merge: leave out variants that another one equals.

        Raises:
            OviError: naming the variant that does not fit, or two that are the same.
        """
        found: list[Point] = []
        of_hash: dict[str, Variant] = {}
        for variant in variants:
            points = []
            folders = {seed: self.folder.path / f"{variant.slug}_seed{seed}" for seed in self.seeds}
            try:
                for seed, composed in self.composer.each(variant.overrides, folders):
                    plain: Any = OmegaConf.to_container(composed)
                    points.append(Point(variant, seed, hash_of(composed), deciding(plain)))
                    if check and seed == self.seeds[0]:
                        self.composer.check(composed)
            except Exception as error:
                from ovi.commands.hydra_app import readable

                message = readable(error)
                if message is None:
                    raise
                raise OviError(f"variant {variant.label!r} cannot be trained: {message}") from error
            other = of_hash.setdefault(points[0].config_hash, variant)
            if other is variant:
                found += points
            elif not merge:
                raise OviError(
                    f"the variants {other.label!r} and {variant.label!r} are the same: their overrides "
                    f"{list(other.overrides)} and {list(variant.overrides)} give one configuration"
                    + (
                        ", for nothing of generation counts without callbacks.joint_eval"
                        if not self.config.retrain
                        else ""
                    )
                )
        return sorted(found, key=lambda point: self.seeds.index(point.seed))

    def definition(self, variants: list[Variant]) -> dict[str, Any]:
        """What ``sweep.yaml`` says."""
        base: Any = OmegaConf.to_container(self.composer([], self.folder.path))
        base = deciding(base)
        base.pop("seed", None)
        if self.searches:
            base["space"] = OmegaConf.to_container(self.config.space)
            base["objective"] = OmegaConf.to_container(self.config.objective)
        base["retrain"] = bool(self.config.retrain)
        return {
            "sweep": self.name,
            "seeds": self.seeds,
            "variants": {v.label: list(v.overrides) for v in variants},
            "overrides": list(self.composer.common),
            "data": _checksums(base["data"]),
            "base": base,
        }


def _checksums(data: Mapping[str, Any]) -> dict[str, str]:
    """Of the sets' indexes, by path: a set encoded anew at its old place is another one."""
    mixture = load_mixture(data.get("path"), data.get("sets"))
    return {
        str(index.folder): hashlib.sha256(json.dumps(index.content, sort_keys=True).encode()).hexdigest()[:16]
        for index in mixture.indexes.values()
    }


def plan_sweep(config: DictConfig, arguments: Arguments, loader: Any, chosen: str | None) -> Plan:
    """Read what is asked for.

    Args:
        config: composed from ``conf/sweep.yaml``.
        arguments: the command line.
        loader: Hydra's.
        chosen: the entry of the group ``sweep``, if any.

    Raises:
        OviError: for settings that make no sense, names that do not exist, or variants that cannot be told apart.
    """
    seeds = _seeds(config.seeds)
    if config.sweeper not in SWEEPERS:
        raise OviError(f"sweeper is {' or '.join(SWEEPERS)}, got {config.sweeper!r}")
    if config.on_stopped not in ("restart", "continue"):
        raise OviError(f"on_stopped is restart or continue, got {config.on_stopped!r}")
    if config.objective.direction not in ("minimize", "maximize"):
        raise OviError(f"objective.direction is minimize or maximize, got {config.objective.direction!r}")
    how = parallel(arguments.launcher or str(config.launcher), config.n_jobs, config.threads)
    axes: Any = OmegaConf.to_container(config.axes, resolve=True) if config.axes is not None else {}
    if not isinstance(axes, Mapping):
        raise OviError(f"axes is {{NAME: VALUES, ...}}, got {axes!r}")
    searches = config.sweeper == "optuna"
    if searches and axes:
        raise OviError(
            f"sweeper=optuna draws from space, and axes ({', '.join(map(str, axes))}) are for sweeper=grid: write them "
            "as space={KEY: {choices: [...]}}"
        )
    if not searches and not axes:
        names = loader.get_group_options("sweep", config_name="sweep")
        given = f"sweep={chosen} has no axes: " if chosen else ""
        raise OviError(f"{given}say what to sweep: sweep={'|'.join(names)}, or axes={{...}} (`ovi sweep --help`)")

    def options(group: str) -> list[str]:
        return list(loader.get_group_options(group, config_name=OF_RUNS))

    groups = [registry.group for registry in REGISTRIES.values()]
    variants = [] if searches else variants_of(axes, options, groups, crossed=bool(config.crossed))
    _check_untouched(variants, arguments)
    if not config.retrain:
        _check_generation_alone(variants)
    composer = Composer(loader, merged(list(config.base), arguments.of_runs))
    base = _base(composer)
    composer.common = (*composer.common, *_budget(base, variants), *_one_process(base))
    name = str(config.name or f"{chosen or 'sweep'}_{base.name}")
    folder = SweepFolder(Path("runs") / name)
    runs = Runs(loader, how, folder.path, arguments.of_launcher)
    objective = Objective(str(config.objective.tag), str(config.objective.direction))
    return Plan(name, config, composer, folder, seeds, objective, how, runs, searches, variants)


def _seeds(given: Any) -> list[int]:
    seeds = OmegaConf.to_container(given) if OmegaConf.is_config(given) else given
    fine = isinstance(seeds, list) and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds)
    if not fine or not seeds or len(set(seeds)) < len(seeds):
        raise OviError(f"seeds is a list of different whole numbers, such as seeds=[0,1,2]; got {seeds!r}")
    return list(seeds)


def _check_untouched(variants: list[Variant], arguments: Arguments) -> None:
    varied = {key for variant in variants for key in variant.settings}
    both = [word for word in arguments.of_runs if key_of(word) in varied]
    if both:
        raise OviError(f"{both[0]}: the sweep varies {key_of(both[0])}; leave one of the two out")


def _check_generation_alone(variants: list[Variant]) -> None:
    for variant in variants:
        other = [key for key in variant.settings if not key.startswith("generation")]
        if other:
            raise OviError(
                f"retrain=false trains once and varies generation alone, and {variant.label!r} sets {other[0]}: "
                "set retrain=true"
            )


def _base(composer: Composer) -> DictConfig:
    """What all runs have in common, composed."""
    from ovi.commands.sweeping.arguments import OWN

    try:
        base: DictConfig = composer.loader.load_configuration(OF_RUNS, list(composer.common), run_mode=RunMode.RUN)
    except Exception as error:
        from ovi.commands.hydra_app import readable

        message = readable(error)
        if message is None:
            raise
        words = [key_of(word) for word in composer.common]
        hints = [hint for word in words if (hint := did_you_mean(word, [*OWN, "launcher"])) and word not in OWN]
        raise OviError(message + (f" (a setting of the sweep?{hints[0]})" if hints else "")) from error
    return base


def _one_process(base: DictConfig) -> list[str]:
    """Overrides by which a run is one process: Lightning would start further ones by repeating the whole sweep.

    Raises:
        OviError: when several are asked for.
    """
    trainer = base.trainer
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes") or 1
    if any(how in str(trainer.get("strategy")) for how in ("spawn", "fork", "notebook")):
        return []
    one = devices in (1, "1") or (not isinstance(devices, str | int) and devices is not None and len(devices) == 1)
    if nodes == 1 and devices in (None, "auto"):
        return ["++trainer.devices=1"]
    if nodes != 1 or not one:
        raise OviError(
            f"trainer.devices={devices}, trainer.num_nodes={nodes}: a run of a sweep is one process on one device. "
            "Leave both out; to use several devices, start the same sweep once for each, with CUDA_VISIBLE_DEVICES=0, "
            "then 1, ...: they share the runs"
        )
    return []


def _budget(base: DictConfig, variants: list[Variant]) -> list[str]:
    """Overrides by which every run has the same budget, validating at its end."""
    from ovi.commands.budget import read_budget

    varied = {key for variant in variants for key in variant.settings}
    if any(key.split(".")[0] == "budget" or key == "trainer.max_steps" for key in varied):
        return []
    steps = base.trainer.max_steps
    return [f"budget.steps={steps}"] if read_budget(base) is None and steps > 0 else []
