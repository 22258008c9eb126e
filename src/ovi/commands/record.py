"""What a run's folder says about how it came to be."""

from __future__ import annotations

import json
import platform
import resource
import shutil
import subprocess
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ovi.commands.failure import user_message
from ovi.data.files import whole_file, write_json
from ovi.runs.run import CONFIG, FAILURE, IDENTITY, SUMMARY

PACKAGES = ("ovi", "torch", "lightning", "torchmetrics", "hydra-core", "diffusers", "transformers", "webdataset", "av")
WRITTEN = (
    "checkpoints",
    "tensorboard",
    "curves",
    "curves_*",
    "samples",
    "attention",
    "metrics.jsonl",
    "clips.jsonl",
    "config.yaml",
    "versions.json",
    "summary.json",
    "failed.json",
    "run.json",
)
"""What a run writes into its folder, as patterns: taken away when it begins anew."""


def write_versions(folder: Path, config: DictConfig) -> None:
    """Write ``config.yaml`` (resolved) and ``versions.json`` (git state, packages, machine, command line)."""
    with whole_file(folder / CONFIG) as file:
        file.write(OmegaConf.to_yaml(config, resolve=True).encode())
    write_json(
        folder / "versions.json",
        {
            "command": sys.argv,
            "git": git_state(),
            "python": platform.python_version(),
            "machine": platform.platform(),
            "packages": {name: version(name) for name in PACKAGES},
        },
    )


def begin_run(folder: Path, identity: Mapping[str, Any]) -> None:
    """Write ``run.json``: who the run is, and when it began. What an earlier try left of its end is taken away."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (SUMMARY, FAILURE):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / IDENTITY, {**identity, "began": _now()})
    _forget_peak_memory()


def clear_run(folder: Path) -> None:
    """Take away what an earlier run wrote into its folder."""
    for path in [path for name in WRITTEN for path in folder.glob(name)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_failure(folder: Path, error: BaseException) -> None:
    """Write ``failed.json``: what a run ended with."""
    folder.mkdir(parents=True, exist_ok=True)
    text = user_message(error) or f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))
    write_json(folder / FAILURE, {"error": text, "traceback": trace, "when": _now()})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write ``summary.json``, whole or not at all; peak memory is added."""
    write_json(folder / "summary.json", {**without_nan(summary), "peak_memory_gb": peak_memory_gb()})


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """The same with null for NaN: what a metric says when nothing passed, and JSON has no word for."""
    clean: dict[str, Any] = json.loads(json.dumps(values), parse_constant=lambda _: None)
    return clean


def peak_memory_gb() -> float:
    """Largest resident size of this process, in units of 2^30 bytes: since its run began where the system is Linux.

    What earlier runs in the process left to the allocator counts.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _forget_peak_memory() -> None:
    """Runs of a sweep share processes: without this, a small one after a large one would have the large one's peak."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def git_state() -> dict[str, Any] | None:
    """Commit and changed files of the checkout this package runs from; None where it is not one."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain").splitlines()}
    except (OSError, subprocess.SubprocessError):
        return None
