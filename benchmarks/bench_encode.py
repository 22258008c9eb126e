"""Clips per second of ``ovi encode``: of every stage, of reading, each codec and writing alone, and of the whole by
launcher; held against PyAV decoding the same files and doing nothing with them.

Clips are drawn to files first (``source=synthetic``), which is not timed. A stage is timed on what the stages before it
in the list have been given: stages of level "clip" on clips that are read already, so that no figure holds another's
decoding. Reading is that peer's work and more: frames by time, scaled and cut out, sound mixed down and resampled.
``--out FILE`` keeps the result as JSON; ``--smoke`` runs everything small.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import av
import torch
from rich.console import Console
from rich.table import Table

from machine import machine, packages
from ovi.codecs import Codecs
from ovi.commands.failure import exit_clearly
from ovi.commands.record import git_state
from ovi.data.clip_encoder import ClipEncoder
from ovi.data.encode import encode
from ovi.data.files import write_json
from ovi.data.launchers import Launcher
from ovi.data.launchers.ray import Ray
from ovi.data.plan import ClipJob
from ovi.data.shard_worker import write_shard
from ovi.data.sources import ClipFormat, Folder, Synthetic
from ovi.data.stages import (
    borders,
    duplicates,
    loudness,
    motion,
    optical_flow,
    probe,
    shots,
    size,
    stillness,
    windows,
)
from ovi.data.stages.base import STAGES, Candidate, run_stages
from ovi.data.stages.chosen import level_of
from ovi.data.stopwatch import Stopwatch
from ovi.errors import OviError
from setting import PRESETS

SPECS = {"video": {"name": "dct"}, "audio": {"name": "logmel"}, "text": {"name": "hashed"}}
MODULES = (probe, shots, borders, size, windows, stillness, motion, optical_flow, loudness, duplicates)
"""Where the stages that are timed are registered; those that want more than the form of a clip are left out."""


def timed(work: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each round, after one that is not counted."""
    work()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds


def row(count: int, seconds: list[float]) -> dict[str, Any]:
    """Clips per second: median and range over the rounds."""
    rates = sorted(count / one for one in seconds)
    return {
        "count": count,
        "per_second": statistics.median(rates),
        "per_second_range": [rates[0], rates[-1]],
        "ms_each": 1e3 * statistics.median(seconds) / count,
    }


def stage_rows(files: list[Candidate], clips: list[Candidate], form: ClipFormat, rounds: int) -> dict[str, Any]:
    """Rates of every stage alone, in files or clips per second."""
    rows: dict[str, Any] = {}
    modules = {module.__name__ for module in MODULES}
    for name in (name for name in STAGES if STAGES[name].__module__ in modules):
        if set(STAGES.wiring(name)) - {"form"} or any(knob.required for knob in STAGES.knobs(name).values()):
            continue
        stage = STAGES.build({"name": name}, *([form] if STAGES.wiring(name) else []))
        given = files if level_of(name) == "file" else clips

        def pass_through(stage: Any = stage, given: Iterable[Candidate] = given) -> None:
            for _ in run_stages({"one": stage}, given, lambda rejected: None):
                pass

        rows[name] = {"level": level_of(name), **row(len(list(given)), timed(pass_through, rounds))}
    return rows


def plain_decoding(paths: Iterable[Path]) -> None:
    """What nobody who reads a file can do without: every picture as RGB at its own size, every sample of sound."""
    for path in paths:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0, audio=0):
                if isinstance(frame, av.VideoFrame):
                    frame.to_ndarray(format="rgb24")
                else:
                    frame.to_ndarray()


def codec_rows(encoder: ClipEncoder, jobs: list[ClipJob], clips: list[Candidate], rounds: int) -> dict[str, Any]:
    """Rates of each codec on clips that are read already, by the encoder's own stopwatch."""
    read = {job.key: clip for job, clip in zip(jobs, clips)}
    seconds: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        encoder._texts.clear()  # captions that were embedded in the round before would cost nothing
        watch = Stopwatch()
        with watch.running():
            encoder.encode_run(jobs, lambda job: read[job.key])
        for name, one in watch.seconds.items():
            seconds.setdefault(name, []).extend([one] if number else [])
    return {f"{name}, {encoder.batch_size} at a time": row(len(jobs), of) for name, of in seconds.items()}


class PlainFolder:
    """Where ``write_shard`` writes to: a file, with none of an encoding's claims and records."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        with open(self.folder / name, "wb") as file:
            yield file


def whole_rows(source: Folder, form: ClipFormat, folder: Path, rounds: int, count: int, ray: bool) -> dict[str, Any]:
    """Rates of whole encodings, and of their last three quarters: no process starts, and no statistics are taken then.

    Clips that the processes had ahead when those begin are a few of them.
    """
    launchers: dict[str, tuple[int, Launcher | None]] = {"1 process": (0, None), "num_workers=2": (2, None)}
    if ray:
        launchers["launcher=ray, 2 actors"] = (0, Ray(num_actors=2))
    rows, number, going = {}, 0, list[float]()

    def run(num_workers: int, launcher: Launcher | None) -> None:
        nonlocal number
        number += 1
        seen: list[tuple[int, float]] = []

        def progress(stage: str, done: int, total: int) -> None:
            if stage == "encode" and 4 * done >= total:
                seen.append((done, time.perf_counter()))

        out = folder / f"out-{number}"
        sizes = {name: value for name, value in asdict(form).items() if name in ("num_frames", "height", "width")}
        summary = encode(
            source, Codecs.build(SPECS, fps=form.fps), out, **sizes, shard_size=16, fit_clips=16,
            num_workers=num_workers, launcher=launcher, on_progress=progress,
        )  # fmt: skip
        (first, began), (last, ended) = seen[0], seen[-1]
        if last > first:
            going.append((ended - began) * count / (last - first))
        if sum(summary.num_samples.values()) != count:
            raise OviError(f"{summary.num_samples} samples of {count} clips: {summary.rejected}")
        shutil.rmtree(out)

    for name, (num_workers, launcher) in launchers.items():
        going.clear()
        rows[name] = row(count, timed(lambda w=num_workers, by=launcher: run(w, by), rounds))  # type: ignore[misc]
        if len(going) > 1:
            rows[f"{name}, once it runs"] = row(count, going[1:])
    return rows


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Draw clips, time everything, and say all of it in one JSON-ready dictionary."""
    torch.set_num_threads(args.threads)
    count, side, num_frames = (8, 16, 8) if args.smoke else (args.clips, args.side, args.frames)
    form = ClipFormat(args.fps, num_frames, side, side, 16000)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        source: Any = Synthetic(path=str(folder / "clips"), num_clips=count, seed=0)
        items = source.items(form)
        files = [Candidate.of(item) for item in items]
        jobs = [ClipJob(item.key, item, 0.0, item.caption) for item in items]
        codecs = Codecs.build(SPECS, fps=args.fps)
        encoder = ClipEncoder(codecs, form, "float16", "reject")
        clips = [encoder.candidate(job).decoded() for job in jobs]
        codecs.fit(
            (torch.from_numpy(one.clip.frames), torch.from_numpy(one.clip.waveform)) for one in clips if one.clip
        )
        samples = [(job, encoder.encode_read(job, one), {}) for job, one in zip(jobs, clips)]
        shard: Any = SimpleNamespace(file="shard.tar", jobs=jobs)
        steps = {
            "peer: PyAV decodes the files": lambda: plain_decoding(item.path for item in items),
            "read (decode, resample)": lambda: [encoder.candidate(job).decoded() for job in jobs],
            "codecs (encode a read clip)": lambda: [encoder.encode_read(job, one) for job, one in zip(jobs, clips)],
            "write (tar, sha256)": lambda: write_shard(PlainFolder(folder), shard, iter(samples)),  # type: ignore[arg-type]
            "read and codecs": lambda: [encoder.encode(job) for job in jobs],
        }
        bytes_of_clip = [replace(one).clip.frames.nbytes for one in clips if one.clip]
        step_rows = {what: row(count, timed(work, args.rounds)) for what, work in steps.items()}
        for batch_size in dict.fromkeys((1, args.codec_batch)):
            several = ClipEncoder(codecs, form, "float16", "reject", batch_size=batch_size)
            step_rows |= codec_rows(several, jobs, clips, args.rounds)
        return {
            "command": shlex.join(["python", *sys.argv]),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "git": git_state(),
            "machine": machine(PRESETS["smoke"]),
            "packages": packages(),
            "clip": {**asdict(form), "seconds": form.duration_s, "bytes_of_frames": max(bytes_of_clip)},
            "codecs": SPECS,
            "rounds": args.rounds,
            "threads": args.threads,
            "notes": [
                "per_second is the median over rounds, after one that is not counted",
                "a whole encoding starts its processes, cuts, takes statistics of 16 clips and writes; with few clips "
                "starting processes is most of it; once it runs: from a quarter of the clips on, starting left out",
                "files of one clip each: a stage of level file is in files per second",
            ],
            "stages": stage_rows(files, clips, form, args.rounds),
            "steps": step_rows,
            "reading_against_plain_decoding": step_rows["read (decode, resample)"]["per_second"]
            / step_rows["peer: PyAV decodes the files"]["per_second"],
            "whole": whole_rows(Folder(path=str(folder / "clips")), form, folder, args.rounds, count, args.ray),
        }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    clip = result["clip"]
    table = Table(
        title=f"clips of {clip['num_frames']} frames, {clip['height']}x{clip['width']}, {clip['seconds']:g} s"
    )
    for title in ("what", "per second", "range", "ms each"):
        table.add_column(title, justify="left" if title == "what" else "right")
    for kind in ("stages", "steps", "whole"):
        for name, one in result[kind].items():
            low, high = one["per_second_range"]
            level = f" ({one['level']})" if "level" in one else ""
            cells = (f"{one['per_second']:,.1f}", f"{low:,.1f}-{high:,.1f}", f"{one['ms_each']:.2f}")
            table.add_row(f"{kind}: {name}{level}", *cells)
        table.add_section()
    console = Console(width=110)
    console.print(table)
    console.print(
        f"reading at {result['reading_against_plain_decoding']:.2f} of PyAV's plain decoding of the same files"
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="bench_encode.py", description=__doc__)
    p.add_argument("--clips", type=int, default=64, metavar="N", help="how many (default: 64)")
    p.add_argument("--side", type=int, default=256, metavar="N", help="height and width in pixels (default: 256)")
    p.add_argument("--frames", type=int, default=48, metavar="N", help="of a clip (default: 48)")
    p.add_argument("--fps", type=float, default=24, metavar="HZ", help="frame rate (default: 24)")
    p.add_argument("--rounds", type=int, default=3, metavar="N", help="times each is done (default: 3)")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of PyTorch (default: 1)")
    p.add_argument("--codec-batch", type=int, default=8, metavar="N", help="clips per pass of a codec (default: 8)")
    p.add_argument("--ray", action="store_true", help="whole encodings with launcher=ray too")
    p.add_argument("--folder", type=Path, metavar="DIR", help="where clips and shards go (default: temporary files)")
    p.add_argument("--out", type=Path, metavar="FILE", help="write the result there as JSON")
    p.add_argument("--smoke", action="store_true", help="tiny sizes: does everything run?")
    return p


def main() -> None:
    """Run the benchmark."""
    args = parser().parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with exit_clearly():
        result = run(args)
        show(result)
        if args.out:
            write_json(args.out, result)


if __name__ == "__main__":
    main()
