"""``ovi demo``: the whole loop on synthetic clips, each phase a command that a user would type."""

from __future__ import annotations

import json
import math
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ovi.commands.failure import exit_clearly
from ovi.commands.hints import did_you_mean
from ovi.errors import OviError

USAGE = """ovi demo [KEY=VALUE ...]

  size=full|smoke   full: as the README shows; smoke: a minute, proves only that everything runs
  ablation=true     three variants with the same seed and budget: aligned, unaligned, no fusion
  out=runs/demo     where the runs go
  seed=0
  steps=N           training steps instead of the size's
"""

VARIANTS = {
    "aligned": [],
    "unaligned": ["model/rope_alignment=none"],
    "no fusion": ["model/fusion=none"],
}
"""What each variant changes against ``experiment=demo``."""


@dataclass(frozen=True)
class Size:
    """What a size changes: overrides of ``ovi encode set=demo`` and ``ovi train experiment=demo``, steps, clips."""

    encode: list[str] = field(default_factory=list)
    train: list[str] = field(default_factory=list)
    steps: int = 1100
    num_clips: int = 64
    data: str = "data/demo"


SIZES = {
    "full": Size(),
    "smoke": Size(
        encode=["source.num_clips=96", "source.path=data/demo_smoke/clips", "out=data/demo_smoke/latents"],
        train=["data.path=data/demo_smoke/latents", "callbacks.joint_eval.num_clips=2"],
        steps=30,
        num_clips=4,
        data="data/demo_smoke",
    ),
}


@dataclass
class Phases:
    """Commands run one after another, timed."""

    seconds: dict[str, float] = field(default_factory=dict)

    def ovi(self, phase: str, *words: str) -> None:
        """Run an ``ovi`` command as a process of its own.

        Raises:
            OviError: when it fails; it has said why.
        """
        print(f"\n$ ovi {shlex.join(words)}", flush=True)
        began = time.perf_counter()
        # -c, not a script on PATH: the demo must run from whatever environment this interpreter is of.
        code = "import sys; from ovi.commands.main import main; main(sys.argv[1:])"
        status = subprocess.run([sys.executable, "-c", code, *words]).returncode
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began
        if status:
            raise OviError(f"the demo stopped: `ovi {words[0]}` failed with exit status {status}")


def main(argv: list[str]) -> None:
    """Run the demo, or its ablation."""
    with exit_clearly():
        if set(argv) & {"-h", "--help"}:
            print(USAGE, end="")
            return
        demo(**parse(argv))


def parse(argv: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` words to keywords of ``demo``.

    Raises:
        OviError: for an unknown key or a value that it does not take.
    """
    keywords: dict[str, Any] = {}
    readers: dict[str, Callable[[str], Any]] = {"size": str, "ablation": _flag, "out": Path, "seed": int, "steps": int}
    for word in argv:
        key, equals, value = word.partition("=")
        if key not in readers or not equals:
            raise OviError(f"ovi demo does not take {word!r}.{did_you_mean(key, readers)}\n{USAGE}")
        try:
            keywords[key] = readers[key](value)
        except ValueError:
            raise OviError(f"ovi demo: {key} cannot be {value!r}\n{USAGE}") from None
    if keywords.get("size", "full") not in SIZES:
        raise OviError(f"ovi demo: size is {' or '.join(SIZES)}, not {keywords['size']!r}")
    return keywords


def demo(
    *,
    size: str = "full",
    ablation: bool = False,
    out: Path = Path("runs/demo"),
    seed: int = 0,
    steps: int | None = None,
) -> dict[str, Any]:
    """Encode, train, sample and measure; prints a table and writes it to ``demo.json``.

    Args:
        size: a name of ``SIZES``.
        ablation: train all ``VARIANTS`` instead of the first alone.
        out: where the runs go, in a folder named after the time.
        seed: of training and sampling.
        steps: training steps; None takes the size's.
    """
    chosen, phases = SIZES[size], Phases()
    folder = out / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    phases.ovi("encode", "encode", "set=demo", *chosen.encode)
    prompts, real, clip_format = held_out(Path(chosen.data), chosen.num_clips)
    folder.mkdir(parents=True)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"caption": p}) + "\n" for p in prompts), encoding="utf-8")

    from ovi.commands.record import without_nan
    from ovi.data.files import write_json

    steps = steps or chosen.steps
    budget = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={max(1, steps // 2)}"]
    rows: dict[str, dict[str, Any]] = {"real clips": {"figures": _measured(phases, real, clip_format)}}
    for name, overrides in VARIANTS.items() if ablation else [("generated", [])]:
        run = folder / name.replace(" ", "_")
        words = ["experiment=demo", f"seed={seed}", *chosen.train, *overrides, *budget, f"hydra.run.dir={run}"]
        phases.ovi("train", "train", *words)
        sampling = [f"checkpoint={run}", f"prompts={folder / 'prompts.jsonl'}", f"out={run / 'clips'}"]
        phases.ovi("sample", "sample", "set=demo_sampling", f"generation.seed={seed}", *sampling)
        clips = sorted((run / "clips").glob("*.mp4"))
        summary = json.loads((run / "summary.json").read_text())
        rows[name] = {"figures": _measured(phases, clips, clip_format), "summary": summary, "clips": str(run / "clips")}
    result = {"rows": rows, "seconds": phases.seconds, "peak_memory_gb": peak_memory_gb()}
    write_json(folder / "demo.json", without_nan(result))
    show(result, folder)
    return result


def held_out(data: Path, count: int) -> tuple[list[str], list[Path], dict[str, Any]]:
    """Captions and files of the first validation clips, and the clips' format."""
    from ovi.data.shards import LatentShards, ShardIndex

    index = ShardIndex.load(data / "latents")
    samples = [s for s, _ in zip(LatentShards(index, "val"), range(count))]
    form = {"fps": index.clock.fps, "num_frames": index.num_frames, "height": index.height, "width": index.width}
    return [s.about["caption"] for s in samples], [data / "clips" / s.about["file"] for s in samples], form


def _measured(phases: Phases, files: list[Path], clip_format: dict[str, Any]) -> dict[str, float]:
    from ovi.commands.measure import measure

    began = time.perf_counter()
    figures = measure(files, **clip_format)
    phases.seconds["measure"] = phases.seconds.get("measure", 0.0) + time.perf_counter() - began
    return figures


def show(result: dict[str, Any], folder: Path) -> None:
    """Print the table and where to look."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="audio-visual offset of clips, decoded from mp4")
    for title in (
        "",
        "impact |offset|",
        "found in",
        "matched",
        "estimated |offset|",
        "found in",
        "val loss",
        "video",
        "audio",
    ):
        table.add_column(title, justify="left" if not title else "right")
    for name, row in result["rows"].items():
        f, metrics = row["figures"], row.get("summary", {}).get("metrics", {})
        losses = [metrics.get(f"val/{key}") for key in ("loss", "loss_video", "loss_audio")]
        table.add_row(
            name,
            _ms(f["impact_offset_ms"]),
            f"{f['impact_offset_coverage']:.0%} of {f['impact_offset_n']:.0f}",
            f"{f['impact_offset_match_rate']:.0%}",
            _ms(f["av_offset_xcorr_ms"]),
            f"{f['av_offset_xcorr_coverage']:.0%} of {f['av_offset_xcorr_n']:.0f}",
            *("" if loss is None else f"{loss:.3f}" for loss in losses),
        )
    console = Console(width=max(100, min(140, os.get_terminal_size().columns)) if sys.stdout.isatty() else 120)
    console.print()
    console.print(table)
    times = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in result["seconds"].items())
    console.print(f"time: {times}; peak memory of a phase {result['peak_memory_gb']:.1f} GB", highlight=False)
    for name, row in result["rows"].items():
        if "clips" in row:
            console.print(f"{name}: {row['clips']}/*.mp4", highlight=False)
    console.print(f"run folder: {folder}", highlight=False)
    console.print(f"tensorboard --logdir {folder}", highlight=False)


def peak_memory_gb() -> float:
    """Largest resident size of any single process so far, this one or a command's, in units of 2^30 bytes."""
    usages = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(usages) / 2**20


def _ms(value: float) -> str:
    return "none found" if math.isnan(value) else f"{value:.0f} ms"


def _flag(value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ValueError(value)
    return value.lower() == "true"
