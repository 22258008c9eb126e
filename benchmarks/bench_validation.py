"""Validation's share of training time at the default settings: losses, generated clips and all default metrics.

    python benchmarks/bench_validation.py --data data/demo/latents [--experiment demo] [--out FILE.json]

Runs `ovi train` for two validation rounds and reads its TensorBoard log: the time between rounds is training, the
second round is what every later one takes (the first also measures the real clips, once per data set). The share over
an hour follows from both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine
from setting import PRESETS

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/demo/latents", help="folder of latent shards")
    parser.add_argument("--experiment", default=None, help="experiment whose settings to take; none: the defaults")
    parser.add_argument("--steps", type=int, default=None, help="between rounds; the settings' own where not given")
    parser.add_argument("--out", default=None, help="result file")
    given = parser.parse_args()
    result = measure(given.data, given.experiment, given.steps)
    print(json.dumps(result["figures"], indent=1))
    if given.out:
        Path(given.out).write_text(json.dumps(result, indent=1) + "\n")


def measure(data: str, experiment: str | None, steps: int | None) -> dict[str, Any]:
    """Run two rounds and work out the share."""
    words = [f"data.path={Path(data).resolve()}", "callbacks.progress=null", "callbacks.joint_eval.cache_dir=null"]
    words += [f"experiment={experiment}"] if experiment else []
    interval = steps or int(_setting(words, "trainer.val_check_interval"))
    words += [f"trainer.max_steps={2 * interval}", f"trainer.val_check_interval={interval}"]
    with tempfile.TemporaryDirectory() as folder:
        code = "import sys; from ovi.commands.main import main; main(sys.argv[1:])"
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, "train", f"hydra.run.dir={folder}/run", *words], check=True)
        wall = time.perf_counter() - began
        rounds = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
        share = _last_scalar(Path(folder, "run"), "train/validation_share")
    # What is logged last stands for the time up to the second round: one round within `interval` to 2 `interval` steps.
    first, second = rounds[0]["seconds"], rounds[1]["seconds"]
    training = summary["seconds"] - first - second
    per_round = training / 2
    figures = {
        "steps_between_rounds": interval,
        "training_s_between_rounds": per_round,
        "first_round_s": first,
        "later_round_s": second,
        "share_of_an_hour": _share(3600.0, per_round, first, second),
        "share_logged_before_the_second_round": share,
        "wall_s": wall,
    }
    return {"machine": machine(PRESETS["smoke"]), "settings": words[1:], "figures": figures}


def _share(total: float, training: float, first: float, later: float) -> float:
    """Of ``total`` seconds that begin with training: how much goes into generating and measuring."""
    spent, validated, number = 0.0, 0.0, 0
    while spent < total:
        spent += training
        cost = first if number == 0 else later
        spent, validated, number = spent + cost, validated + cost, number + 1
    return validated / spent


def _setting(words: list[str], key: str) -> str:
    code = "import sys; from ovi.commands.main import main; main(sys.argv[1:])"
    printed = subprocess.run(
        [sys.executable, "-c", code, "train", *words, "--cfg", "job"], check=True, capture_output=True, text=True
    ).stdout
    from omegaconf import OmegaConf

    return str(OmegaConf.select(OmegaConf.create(printed), key))


def _last_scalar(folder: Path, tag: str) -> float | None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for file in sorted(folder.rglob("events.out.*")):
        events = EventAccumulator(str(file.parent))
        events.Reload()
        if tag in events.Tags()["scalars"]:
            return float(events.Scalars(tag)[-1].value)
    return None


if __name__ == "__main__":
    main()
