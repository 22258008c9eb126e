"""Validation's share of training time at the default settings: losses, generated clips, metrics, attention maps.

    python benchmarks/bench_validation.py --data data/demo/latents [--experiment demo] [--out FILE.json]

Runs `ovi train` for two validation rounds, closer together than they would be, and reads its TensorBoard log: the time
of a step, and the share of time spent in validation after each round. Every later round takes what the second does; the
first also measures the real clips, once per data set. From these follows the share over an hour with as many steps
between rounds as the settings have.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from machine import machine, packages
from ovi.commands.record import git_state
from setting import PRESETS

RUN = "import sys; from ovi.commands.main import main; main(sys.argv[1:])"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/demo/latents", help="folder of latent shards")
    parser.add_argument("--experiment", default=None, help="experiment whose settings to take; none: the defaults")
    parser.add_argument("--steps", type=int, default=150, help="between the two rounds of this run")
    parser.add_argument("--out", default=None, help="result file")
    given = parser.parse_args()
    result = measure(given.data, given.experiment, given.steps)
    Console().print_json(json.dumps(result["figures"]))
    if given.out:
        Path(given.out).write_text(json.dumps(result, indent=1) + "\n")


def measure(data: str, experiment: str | None, steps: int) -> dict[str, Any]:
    """Run two rounds and work out the share."""
    chosen = ["callbacks.progress=null", "callbacks.joint_eval.cache_dir=null"]
    chosen += [f"experiment={experiment}"] if experiment else []
    words = [f"data.path={Path(data).resolve()}", *chosen]
    settings = _settings(words)
    interval, batch_size = int(settings["trainer"]["val_check_interval"]), int(settings["data"]["batch_size"])
    words += [f"trainer.max_steps={2 * steps}", f"trainer.val_check_interval={steps}"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", RUN, "train", f"hydra.run.dir={folder}/run", *words], check=True)
        shares = _scalars(Path(folder, "run"), "train/validation_share")
        speeds = _scalars(Path(folder, "run"), "train/samples_per_s")
    step_s = batch_size / statistics.median(value for _, value in speeds)

    def validated(at: tuple[int, float]) -> float:
        step, share = at
        return share / (1 - share) * step_s * step

    first, both = (validated(point) for point in shares[:2])
    later = both - first
    figures = {
        "step_ms": 1000 * step_s,
        "first_round_s": first,
        "later_round_s": later,
        "steps_between_rounds": interval,
        "share_of_later_rounds": later / (later + interval * step_s),
        "share_of_an_hour": _share(3600.0, interval * step_s, first, later),
    }
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "machine": machine(PRESETS["smoke"]),
        "packages": packages(),
        "settings": ["data.path=DATA", *chosen],
        "figures": figures,
    }


def _share(total: float, training: float, first: float, later: float) -> float:
    """Share of validation in the first ``total`` seconds: a round after each stretch of ``training`` seconds."""
    spent, validated = 0.0, 0.0
    while spent < total:
        cost = later if validated else first
        spent, validated = spent + training + cost, validated + cost
    return validated / spent


def _settings(words: list[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    command = [sys.executable, "-c", RUN, "train", *words, "--cfg", "job"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(printed), resolve=False)  # type: ignore[assignment]
    return settings


def _scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(folder.rglob("events.out.*")).parent))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


if __name__ == "__main__":
    main()
