"""Whether two sets of runs may be held against each other pair by pair, and which belong together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ovi.errors import OviError
from ovi.runs.identity import deciding
from ovi.runs.run import FINISHED, Run

ALLOWED = ("data", "generator", "steps")
"""What may be let differ by name; prompts and the generator's seed never may, for they make the pairs."""

_NOT_THE_CLIPS = ("batch_size", "passes_at_once")


def pairs_by_seed(
    a: Sequence[Run], b: Sequence[Run], *, names: tuple[str, str] = ("a", "b"), allow: Collection[str] = ()
) -> list[tuple[Run, Run]]:
    """The runs of both sides with the same seed, in the order of seeds.

    Args:
        a, b: runs of either side, one a seed.
        names: of the sides, for messages.
        allow: of ``ALLOWED``, what may differ between them. What a sweep varied on purpose may anyway.

    Raises:
        OviError: when a side is empty or has two runs of a seed, no seed is on both sides, a run has not finished, or
            data, generator or steps differ.
    """
    unknown = sorted(set(allow) - set(ALLOWED))
    if unknown:
        raise OviError(f"allow={','.join(unknown)}: what may be let differ is {', '.join(ALLOWED)}")
    by_seed = [_by_seed(runs, name) for runs, name in zip((a, b), names)]
    both = sorted(by_seed[0].keys() & by_seed[1].keys())
    if not both:
        has = [f"{name} has {', '.join(map(str, sorted(side)))}" for name, side in zip(names, by_seed)]
        raise OviError(f"no seed was trained on both sides, and runs are paired by seed: {'; '.join(has)}")
    found = [(by_seed[0][seed], by_seed[1][seed]) for seed in both]
    first = found[0][0]
    for pair in found:
        for run in pair:
            _check_alike(first, run, allow)
    return found


def _by_seed(runs: Sequence[Run], name: str) -> dict[int, Run]:
    if not runs:
        raise OviError(f"{name}: no runs")
    found: dict[int, Run] = {}
    for run in runs:
        if run.state != FINISHED:
            raise OviError(f"{run.folder}: this run of {name} is {run.state}: only finished runs can be compared")
        if run.seed in found:
            raise OviError(
                f"{name} has two runs of seed {run.seed}, {found[run.seed].folder} and {run.folder}: name one of them"
            )
        found[run.seed] = run
    return found


def _check_alike(first: Run, other: Run, allow: Collection[str]) -> None:
    for what, (mine, theirs) in _sides(first, other).items():
        varied = {name for run in (first, other) for name in _varied(run)}
        if what in allow:
            continue
        for key in sorted({*mine, *theirs}):
            if mine.get(key) == theirs.get(key) or any(_within(f"{what}.{key}", name) for name in varied):
                continue
            where = f"{key}: {mine.get(key)!r} in {first.folder}, {theirs.get(key)!r} in {other.folder}"
            if what == "generator" and key == "seed":
                raise OviError(f"the clips were generated from other noise ({where}): clip by clip they are no pairs")
            raise OviError(f"these runs differ in {what} ({where}). allow={what} compares them all the same")


def _sides(first: Run, other: Run) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    return {
        "data": (_data(first), _data(other)),
        "generator": (_generator(first), _generator(other)),
        "steps": (_length(first), _length(other)),
    }


def same_length(first: Run, other: Run) -> bool:
    """Whether both trained as long as each other: in steps, or in the operations or seconds that both were given."""
    return _length(first) == _length(other)


def _length(run: Run) -> dict[str, Any]:
    # A budget of operations or seconds is kept by taking other numbers of steps.
    budget = run.config.get("budget") or {}
    given = {name: budget[name] for name in ("flops", "seconds") if budget.get(name) is not None}
    return given or {"steps": run.summary.get("steps")}


def _data(run: Run) -> dict[str, Any]:
    # The seed is the training's, and the same within a pair.
    return {key: value for key, value in _flat(deciding(run.config).get("data") or {}).items() if key != "seed"}


def _generator(run: Run) -> dict[str, Any]:
    joint_eval = (run.config.get("callbacks") or {}).get("joint_eval") or {}
    generator = joint_eval.get("generator") or run.config.get("generation") or {}
    return {key: value for key, value in _flat(generator).items() if key not in _NOT_THE_CLIPS}


def _varied(run: Run) -> list[str]:
    """Settings that the run's sweep set apart on purpose, as ``data...`` or ``generator...``."""
    names = [key.lstrip("+~").split("@")[-1].replace("/", ".") for key in run.variant]
    return [
        "generator" + name.removeprefix(prefix)
        for name in names
        for prefix in ("callbacks.joint_eval.generator", "generation")
        if _within(name, prefix)
    ] + [name for name in names if _within(name, "data")]


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
