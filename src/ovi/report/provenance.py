"""How runs came about: what was swept, with which data, code and command, and why a run has no result."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def why(run: Run) -> str:
    """Why a run has no result yet, in words; empty for a finished one."""
    if run.status == FINISHED:
        return ""
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
