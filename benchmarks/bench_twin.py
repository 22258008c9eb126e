"""Speed and memory of our twin beside peers of its width and depth, in one process and in turns.

``python benchmarks/bench_twin.py`` runs the CPU preset and prints tables; ``--out FILE`` keeps the result as JSON.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import machine
import ours
import reference
import tables
from candidate import JOINT, VIDEO, Candidate
from floor import computed_floor
from measure import measured
from ovi.commands.failure import exit_clearly
from ovi.commands.record import git_state
from ovi.data.files import write_json
from ovi.errors import OviError
from peers import PEERS
from setting import PRESETS, Batch, Setting, ffn_like_published

SIZES = ("width", "layers", "heads", "ffn", "batch", "audio_tokens", "text_tokens", "threads")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="bench_twin.py", description=__doc__)
    p.add_argument("--preset", choices=("cpu", "gpu"), default="cpu", help="sizes to start from (default: cpu)")
    p.add_argument("--smoke", action="store_true", help="tiny sizes, one round: does everything run?")
    for name in SIZES:
        p.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    p.add_argument("--head-dim", type=int, metavar="N", help="in place of --heads; 64, or 128 from width 2048 on")
    p.add_argument("--latent", type=int, nargs=3, metavar=("F", "H", "W"), help="video latent frames, rows, columns")
    p.add_argument("--device", help="cpu or cuda")
    p.add_argument("--dtype", help="float32 or bfloat16")
    p.add_argument("--rounds", type=int, metavar="N", help="times taken of each (default: 10)")
    p.add_argument("--warmup", type=int, default=2, metavar="N", help="rounds before those (default: 2)")
    p.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), help="default: all")
    p.add_argument("--reference", type=Path, metavar="PATH", help="a checkout of the original, to run beside ours")
    p.add_argument("--baseline", metavar="NAME", help="whom joint models are compared with (default: the reference)")
    p.add_argument("--compile", action="store_true", help="also our twin with its layers compiled")
    p.add_argument("--out", type=Path, metavar="FILE", help="write the result there as JSON")
    return p


def setting_of(args: argparse.Namespace) -> Setting:
    """The preset with what the command line says instead; heads and feed-forward follow another width."""
    preset = PRESETS["smoke" if args.smoke else args.preset]
    given = {name: getattr(args, name) for name in (*SIZES, "device", "dtype") if getattr(args, name) is not None}
    if args.latent:
        given["latent"] = tuple(args.latent)
    width = given.get("width", preset.width)
    if "heads" not in given and (args.head_dim or width != preset.width):
        given["heads"] = max(1, width // (args.head_dim or (128 if width >= 2048 else 64)))
    if "ffn" not in given and width != preset.width:
        given["ffn"] = ffn_like_published(width)
    return replace(preset, **given)


def candidates_of(args: argparse.Namespace, setting: Setting, batch: Batch) -> dict[str, Candidate]:
    """Ours, the original where there is one, and the peers; the order in which they take turns."""
    model = ours.twin(setting)
    found = {"ovi": ours.joint(model, setting, batch)}
    if args.compile:
        found["ovi_compiled"] = ours.joint(ours.compiled(setting), setting, batch)
    if args.reference:
        found["reference"] = reference.original(setting, batch, args.reference, model)
    found |= {name: PEERS[name](setting, batch) for name in args.peers}
    if any(c.task == VIDEO for c in found.values()):
        found["ovi_video"] = ours.video_alone(model, setting, batch)
    return found


def baselines_of(args: argparse.Namespace, candidates: dict[str, Candidate]) -> dict[str, str]:
    """Whom ratios are taken to, by task: the one asked for, or the original, or the first peer."""
    joint = [name for name, c in candidates.items() if c.task == JOINT]
    if args.baseline and args.baseline not in joint:
        raise OviError(f"--baseline {args.baseline}: the joint models of this run are {', '.join(joint)}")
    peers = [name for name in ("reference", *args.peers) if name in joint]
    found = {JOINT: args.baseline or (peers[0] if peers else "ovi")}
    return found | ({VIDEO: "wan"} if "wan" in candidates else {})


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build, measure, and say all of it in one JSON-ready dictionary."""
    setting = setting_of(args)
    if torch.device(setting.device).type == "cuda" and not torch.cuda.is_available():
        raise OviError("--device cuda: PyTorch sees no GPU here; use --device cpu, or --preset cpu")
    torch.set_num_threads(setting.threads)
    batch = Batch.random(setting)
    candidates = candidates_of(args, setting, batch)
    agreement = {}
    if args.reference:
        agreement = reference.agreement(candidates["ovi"], candidates["reference"], setting.torch_dtype)
    rounds = args.rounds or (1 if args.smoke else 10)
    figures = measured(
        candidates,
        setting,
        baselines=baselines_of(args, candidates),
        rounds=rounds,
        warmup=args.warmup,
        same_work={"ovi_compiled": "ovi"} if args.compile else {},
        peak_sizes=(512,) if args.smoke else None,
    )
    git = git_state() or {}
    return {
        # Where a user keeps the original is nobody's business.
        "command": shlex.join(
            "PATH" if args.reference and w == str(args.reference) else w for w in ["python", *sys.argv]
        ),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git.get("commit"),
        "changed": git.get("changed"),
        "machine": machine.machine(setting),
        "python": sys.version.split()[0],
        "packages": machine.packages(),
        "setting": {**setting.to_dict(), "rounds": rounds, "warmup": args.warmup},
        "agreement": agreement,
        **figures,
        "computed_floor": computed_floor(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with the given arguments, those of the process if None."""
    args = parser().parse_args(argv)
    with exit_clearly():
        result = run(args)
        if args.out:
            write_json(args.out, result)
        tables.show(result, Console(width=None if sys.stdout.isatty() else 110))


if __name__ == "__main__":
    main()
