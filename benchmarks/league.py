"""Every fusion strategy trained on the demo's clips with one budget: whose clips keep sound and picture together?

``python benchmarks/league.py --steps 600 --seeds 0 --jobs 2 --out FILE`` trains, samples 64 held-out prompts and
measures the decoded clips as ``ovi demo`` does; with several jobs each has one thread. A finished run is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import machine
from ovi.commands.components import load_components
from ovi.commands.demo import SIZES, held_out
from ovi.commands.failure import exit_clearly
from ovi.commands.measure import measure
from ovi.commands.record import git_state, without_nan
from ovi.data.files import write_json
from ovi.errors import OviError
from ovi.fusion import FUSIONS

OVI = [sys.executable, "-c", "import sys; from ovi.commands.main import main; main(sys.argv[1:])"]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="league.py", description=__doc__)
    p.add_argument("--fusions", nargs="*", metavar="NAME", help="default: all that are registered")
    p.add_argument("--seeds", nargs="*", type=int, default=[0])
    p.add_argument("--steps", type=int, default=SIZES["full"].steps)
    p.add_argument("--size", choices=list(SIZES), default="full")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time")
    p.add_argument("--runs", type=Path, default=Path("runs/league"), help="where the runs go")
    p.add_argument("--out", type=Path, metavar="FILE", help="write the result there as JSON")
    return p


def ovi(log: Path, threads: int | None, *words: str) -> None:
    """Run an ``ovi`` command with its output in a file.

    Raises:
        OviError: when it fails, with the end of what it said.
    """
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with log.open("a", encoding="utf-8") as file:
        status = subprocess.run([*OVI, *words], stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if status:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-8:])
        raise OviError(f"`ovi {shlex.join(words)}` failed with exit status {status}; {log} ends:\n{tail}")


def one_run(fusion: str, seed: int, args: argparse.Namespace, clip_format: dict[str, Any]) -> dict[str, Any]:
    """Train, sample and measure; what is there already is taken as it is."""
    run = args.runs / f"{fusion}_{seed}_{args.steps}"
    done = run / "league.json"
    if done.is_file():
        return json.loads(done.read_text())  # type: ignore[no-any-return]
    run.mkdir(parents=True, exist_ok=True)
    threads = 1 if args.jobs > 1 else None
    budget = [f"trainer.max_steps={args.steps}", f"trainer.val_check_interval={args.steps}"]
    words = ["experiment=demo", f"model/fusion={fusion}", f"seed={seed}", *SIZES[args.size].train, *budget]
    ovi(run / "log.txt", threads, "train", *words, f"hydra.run.dir={run}")
    sampling = [f"checkpoint={run}", f"prompts={args.runs / 'prompts.jsonl'}", f"out={run / 'clips'}"]
    ovi(run / "log.txt", threads, "sample", "set=demo_sampling", f"generation.seed={seed}", *sampling)
    summary = json.loads((run / "summary.json").read_text())
    found = {
        "fusion": fusion,
        "seed": seed,
        "summary": summary,
        "figures": measure(sorted((run / "clips").glob("*.mp4")), **clip_format),
    }
    write_json(done, without_nan(found))
    return found


def league(args: argparse.Namespace) -> dict[str, Any]:
    """All runs, and a row per strategy."""
    load_components()
    fusions = args.fusions or list(FUSIONS)
    for name in fusions:
        FUSIONS[name]
    size = SIZES[args.size]
    args.runs.mkdir(parents=True, exist_ok=True)
    ovi(args.runs / "log.txt", None, "encode", "set=demo", *size.encode)
    prompts, real, clip_format = held_out(Path(size.data), size.num_clips)
    lines = "".join(json.dumps({"caption": p}) + "\n" for p in prompts)
    (args.runs / "prompts.jsonl").write_text(lines, encoding="utf-8")
    if args.jobs > 1:
        torch.set_num_threads(1)
    began = time.perf_counter()
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(one_run, f, s, args, clip_format) for s in args.seeds for f in fusions]
        runs = [future.result() for future in futures]
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": (git_state() or {}).get("commit"),
        "threads_per_run": 1 if args.jobs > 1 else torch.get_num_threads(),
        "packages": machine.packages(),
        "seconds": time.perf_counter() - began,
        "steps": args.steps,
        "seeds": args.seeds,
        "real": measure(real, **clip_format),
        "rows": sorted((row(f, [r for r in runs if r["fusion"] == f]) for f in fusions), key=rank),
        "runs": runs,
    }


def row(fusion: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds."""

    def mean(*keys: str) -> float | None:
        values: list[Any] = list(runs)
        for key in keys:
            values = [v.get(key) for v in values]
        return None if any(v is None for v in values) else statistics.fmean(values)

    return {
        "fusion": fusion,
        "offset_ms": mean("figures", "impact_offset_ms"),
        "found": mean("figures", "impact_offset_coverage"),
        "matched": mean("figures", "impact_offset_match_rate"),
        "val_loss_video": mean("summary", "metrics", "val/loss_video"),
        "val_loss_audio": mean("summary", "metrics", "val/loss_audio"),
        "parameters": mean("summary", "parameters"),
        "train_s": mean("summary", "seconds"),
        "offsets_ms": [r["figures"].get("impact_offset_ms") for r in runs],
    }


def rank(entry: dict[str, Any]) -> float:
    """Best first; a strategy without a figure last."""
    return float("inf") if entry["offset_ms"] is None else float(entry["offset_ms"])


def show(result: dict[str, Any]) -> None:
    """The table."""
    table = Table(title=f"{result['steps']} steps, seeds {result['seeds']}, 64 clips each, decoded from mp4")
    for title in ("fusion", "|offset| ms", "found in", "matched", "val video", "val audio", "parameters", "train s"):
        table.add_column(title, justify="left" if title == "fusion" else "right")
    real = result["real"]
    table.add_row("real clips", f"{real['impact_offset_ms']:.1f}", f"{real['impact_offset_coverage']:.0%}",
                  f"{real['impact_offset_match_rate']:.0%}")  # fmt: skip
    for r in result["rows"]:
        offset = "none found" if r["offset_ms"] is None else f"{r['offset_ms']:.0f}"
        table.add_row(
            r["fusion"], offset, f"{r['found']:.0%}", f"{r['matched']:.0%}", f"{r['val_loss_video']:.3f}",
            f"{r['val_loss_audio']:.3f}", f"{r['parameters'] / 1e6:.2f} M", f"{r['train_s']:.0f}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the league with the given arguments, those of the process if None."""
    args = parser().parse_args(argv)
    with exit_clearly():
        result = without_nan(league(args))
        if args.out:
            write_json(args.out, result)
        show(result)


if __name__ == "__main__":
    main()
