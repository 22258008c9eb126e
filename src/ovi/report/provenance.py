"""How runs came about: what was swept, with which data, code and command, and why a run has no result."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ovi.runs.identity import deciding
from ovi.runs.run import FAILED, FINISHED, IDENTITY, RUNNING, Run

VERSIONS = "versions.json"


def swept(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The settings in which variants differ, and their values, in order of appearance."""
    keys = list(dict.fromkeys(key for run in runs for key in run.variant))
    found = {key: list(dict.fromkeys(run.variant.get(key, "-") for run in runs)) for key in keys}
    return {key: values for key, values in found.items() if len(values) > 1}


def provenance(runs: Sequence[Run]) -> dict[str, list[str]]:
    """What the head of a report says, one or more words each: data, steps, seeds, commits, commands, dates, versions.

    Whatever differs between runs is listed; what no run says is left out.
    """
    versions = [_read(run.folder / VERSIONS) for run in runs]
    began = sorted(str(_read(run.folder / IDENTITY).get("began") or "")[:16].replace("T", " ") for run in runs)
    began = [when for when in began if when]
    commands = [shlex.join(_short(word) for word in map(str, v.get("command") or [])) for v in versions]
    facts = {
        "Data": [str(path) for run in runs for path in _data(run.config)],
        "Steps": [str(steps) for run in runs if (steps := _steps(run)) is not None],
        "Seeds": [str(seed) for seed in sorted({run.seed for run in runs})],
        "Sweep": [run.sweep for run in runs if run.sweep],
        "Began": [began[0] if began[0] == began[-1] else f"{began[0]} to {began[-1]}"] if began else [],
        "Commit": [_commit(v["git"]) for v in versions if isinstance(v.get("git"), dict)],
        "Command": commands,
        "Machine": [str(v["machine"]) for v in versions if v.get("machine")],
        "Versions": [_packages(v["packages"]) for v in versions if isinstance(v.get("packages"), dict)],
    }
    return {name: list(dict.fromkeys(word for word in words if word)) for name, words in facts.items() if any(words)}


def mixed(runs: Sequence[Run]) -> list[str]:
    """Variants whose finished runs are not the seeds of one experiment, a sentence each: their means say little."""
    notes = []
    for label in dict.fromkeys(run.label for run in runs):
        mine = [run for run in runs if run.label == label and run.state == FINISHED]
        seeds = [run.seed for run in mine]
        twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if twice:
            notes.append(
                f"{label}: trained more than once with seed {', '.join(map(str, twice))}; each run counts in the means "
                "as if it had a seed of its own"
            )
        settings = [dict(_flat(deciding(run.config))) for run in mine if run.config]
        keys = sorted({key for one in settings for key in one if key.rpartition(".")[2] != "seed"})
        differing = [key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)]
        if differing:
            some = f"{', '.join(differing[:4])}{f' and {len(differing) - 4} more' if len(differing) > 4 else ''}"
            notes.append(f"{label}: its runs differ in more than the seed ({some}), and the means are over all of them")
    return notes


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def why(run: Run) -> str:
    """Why a run has no result, or not the whole one, in words; empty for one that trained to its end."""
    if run.status == FINISHED:
        return f"pruned at step {run.summary['pruned']}" if "pruned" in run.summary else ""
    if run.status == FAILED:
        return str(run.failure.get("error") or "ended with an error")
    rounds = run.rounds()
    reached = f"; last validation at step {rounds[-1].get('step')}" if rounds else ""
    return ("is being written" if run.status == RUNNING else "was interrupted: no result and no error") + reached


def _steps(run: Run) -> Any:
    return run.summary.get("steps", (run.config.get("trainer") or {}).get("max_steps"))


def _data(config: dict[str, Any]) -> list[str]:
    data = config.get("data") or {}
    sets = data.get("sets")
    if isinstance(sets, dict):
        return [str(value.get("path", name) if isinstance(value, dict) else value) for name, value in sets.items()]
    return [str(data["path"])] if data.get("path") else []


def _commit(git: dict[str, Any]) -> str:
    changed = git.get("changed") or []
    return str(git.get("commit", ""))[:10] + (f" with {len(changed)} changed files" if changed else "")


def _packages(packages: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _short(word: str) -> str:
    """A command's own path says nothing to others."""
    return Path(word).name if Path(word).is_absolute() and Path(word).name.startswith("ovi") else word


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not written yet, or without it
        return {}
    return content if isinstance(content, dict) else {}
