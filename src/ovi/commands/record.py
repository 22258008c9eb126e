"""What a run's folder says about how it came to be."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ovi.data.files import write_json

PACKAGES = ("ovi", "torch", "lightning", "torchmetrics", "hydra-core", "diffusers", "transformers", "webdataset", "av")


def write_versions(folder: Path, config: DictConfig) -> None:
    """Write ``config.yaml`` (resolved) and ``versions.json`` (git state, packages, machine, command line)."""
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True), encoding="utf-8")
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


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write ``summary.json``, whole or not at all; peak memory is added."""
    write_json(folder / "summary.json", {**without_nan(summary), "peak_memory_gb": peak_memory_gb()})


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """The same with null for NaN: what a metric says when nothing passed, and JSON has no word for."""
    clean: dict[str, Any] = json.loads(json.dumps(values), parse_constant=lambda _: None)
    return clean


def peak_memory_gb() -> float:
    """Largest resident size of this process so far, in units of 2^30 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


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
