"""Memory and time of loading published weights at full size, from files that take no disk.

The files are sparse: a true header over the true shapes, and a hole of the right length for the numbers, which are all
zero. What is measured is therefore the loader, not the disk. Each load is a process of its own, and begins with none of
the files in memory. ``--out FILE`` keeps the result as JSON; ``--smoke`` runs everything small.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from machine import machine, packages
from ovi.checkpoint import from_reference, load_reference, to_reference, without_storage
from ovi.clock import Clock
from ovi.commands.failure import exit_clearly
from ovi.commands.record import git_state
from ovi.data.files import write_json
from ovi.errors import OviError
from ovi.fusion import OviFusion
from ovi.patch import AudioPatch, VideoPatch
from ovi.rope import scale
from ovi.tower import Tower
from ovi.twin import TwinDiT, num_parameters
from setting import PRESETS

FULL = {"dim": 3072, "num_heads": 24, "num_blocks": 30, "ffn_dim": 14336, "text_dim": 4096}
SMALL = {"dim": 128, "num_heads": 1, "num_blocks": 2, "ffn_dim": 256, "text_dim": 64}
"""Sizes of both towers: the published ones, and those of ``--smoke``."""

SPARE_BYTES = 3 * 2**30
"""Memory that must stay free on the machine beside what a load is about to take."""

POLL_S = 0.005
"""Seconds between two looks at a loading process's memory."""

Loader = Callable[[Path, dict[str, int]], TwinDiT]
"""(file, sizes of the towers) -> a twin with its weights."""


def twin(sizes: dict[str, int]) -> TwinDiT:
    """The published architecture in given sizes, on the current default device and type."""
    tower = {k: n for k, n in sizes.items() if k != "text_dim"}
    return TwinDiT(
        Tower(48, sizes["text_dim"], 512, patch=VideoPatch, **tower),  # type: ignore[arg-type]
        Tower(20, sizes["text_dim"], 512, patch=AudioPatch, **tower),  # type: ignore[arg-type]
        Clock(),
        fusion=OviFusion,
        rope_alignment=scale,
    )


def shapes_of(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of a whole checkpoint by published name."""
    with without_storage():
        return {name: tuple(t.shape) for name, t in to_reference(twin(sizes).state_dict()).items()}


def num_bytes(shape: Sequence[int]) -> int:
    """Of a bfloat16 tensor."""
    return 2 * torch.Size(shape).numel()


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16 zeros that takes no more disk than its header."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + num_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(file.tell() + end)


def write_shards(folder: Path, shapes: dict[str, tuple[int, ...]], most: int) -> Path:
    """The same in shards of at most ``most`` bytes; returns their index."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and sum(map(num_bytes, shards[-1].values())) + num_bytes(shape) > most:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_sparse(file, shard)
        weight_map |= dict.fromkeys(shard, file.name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def ours_native(path: Path, sizes: dict[str, int]) -> TwinDiT:
    return load_reference(path)


def ours_float32(path: Path, sizes: dict[str, int]) -> TwinDiT:
    return load_reference(path, dtype=torch.float32)


def naive_float32(path: Path, sizes: dict[str, int]) -> TwinDiT:
    """What one writes without a loader: all tensors, a model with weights drawn for it, a copy into it."""
    from safetensors.torch import load_file

    state = from_reference(load_file(path))
    model = twin(sizes)
    model.load_state_dict(state)
    return model


def naive_native(path: Path, sizes: dict[str, int]) -> TwinDiT:
    torch.set_default_dtype(torch.bfloat16)
    return naive_float32(path, sizes)


def load_here(connection: Connection, loader: Loader, path: Path, sizes: dict[str, int], threads: int) -> None:
    """Load in this process when told to, and say so; the parent watches the memory meanwhile."""
    torch.set_num_threads(threads)
    connection.send("ready")
    connection.recv()
    began = time.perf_counter()
    model = loader(path, sizes)
    seconds = time.perf_counter() - began
    assert not any(p.is_meta for p in model.parameters())
    types = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    connection.send({"seconds": seconds, "parameters": num_parameters(model), "types": types})
    connection.recv()


def load(loader: Loader, path: Path, sizes: dict[str, int], threads: int) -> dict[str, Any]:
    """Load in a process of its own.

    Returns:
        Seconds, and peaks above what the process held before it began: ``anonymous`` bytes, which only swap could free,
        ``file`` bytes, pages of the file that the system drops when it needs the room, and ``resident`` bytes,
        the kernel's own high-water mark of both together.

    Raises:
        OviError: when the process fails.
    """
    # A server that has imported everything once forks a fresh process for each load.
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    child = context.Process(target=load_here, args=(there, loader, path, sizes, threads))
    child.start()
    there.close()
    try:
        here.recv()
        assert child.pid is not None
        # The mark starts anew, so that it is this load's and not the imports'.
        Path(f"/proc/{child.pid}/clear_refs").write_text("5")
        before = _status(child.pid)
        here.send("go")
        peaks = dict(before)
        said = False
        while not said:
            said = here.poll(POLL_S)
            now = _status(child.pid)
            peaks = {key: max(peaks[key], now[key]) for key in peaks}
        result: dict[str, Any] = here.recv()
        here.send("done")
    except (EOFError, OSError, KeyError) as error:  # whichever of its ends is seen first
        child.join()
        raise OviError(
            f"{loader.__name__}: the loading process ended with {child.exitcode}; it said why above"
        ) from error
    child.join()
    grown = {key: peaks[key] - before[key] for key in ("RssAnon", "RssFile")}
    resident = peaks["VmHWM"] - before["VmRSS"]
    return {**result, "anonymous": grown["RssAnon"], "file": grown["RssFile"], "resident": resident}


def _status(pid: int) -> dict[str, int]:
    """Memory of a process in bytes, by the kernel's names."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = dict(re.findall(r"^(VmHWM|VmRSS|RssAnon|RssFile):\s+(\d+) kB", text, re.MULTILINE))
    return {key: 1024 * int(found[key]) for key in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}


def drop_pages(folder: Path) -> None:
    """Have the system forget what it holds of the files, so that every load begins alike."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check_room(needed: int, what: str) -> None:
    """See that the machine has memory to spare for a load; it must neither swap nor kill.

    Raises:
        OviError: when it has not.
    """
    text = Path("/proc/meminfo").read_text()
    available = 1024 * int(re.findall(r"MemAvailable:\s+(\d+)", text)[0])
    if available < needed + SPARE_BYTES:
        raise OviError(
            f"{what} takes {needed / 2**30:.1f} GiB and {available / 2**30:.1f} are available: choose fewer --layers"
        )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make the files, load them in turns, and say all of it in one JSON-ready dictionary."""
    sizes = dict(SMALL if args.smoke else FULL)
    cut = {**sizes, "num_blocks": min(args.layers, sizes["num_blocks"])}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        shapes, cut_shapes = shapes_of(sizes), shapes_of(cut)
        total, cut_total = (sum(map(num_bytes, s.values())) for s in (shapes, cut_shapes))
        write_sparse(folder / "model.safetensors", shapes)
        write_sparse(folder / "cut.safetensors", cut_shapes)
        index = write_shards(folder, shapes, total // 5)
        loads = {
            "whole file": (ours_native, folder / "model.safetensors", sizes, 0),
            "shards": (ours_native, index, sizes, 0),
            "cut, native": (ours_native, folder / "cut.safetensors", cut, 0),
            "cut, native, naive": (naive_native, folder / "cut.safetensors", cut, 2 * cut_total),
            "cut, float32": (ours_float32, folder / "cut.safetensors", cut, 2 * cut_total),
            "cut, float32, naive": (naive_float32, folder / "cut.safetensors", cut, 4 * cut_total),
        }
        on_disk = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
        num_shards = len(list(folder.glob("model-*")))
        taken: dict[str, list[dict[str, Any]]] = {what: [] for what in loads}
        for _ in range(args.rounds):
            for what, (loader, path, of, needed) in loads.items():
                check_room(needed, what)
                drop_pages(folder)
                taken[what].append(load(loader, path, of, args.threads))
    rows = {what: summed(several) for what, several in taken.items()}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "machine": machine(PRESETS["smoke"]),
        "packages": packages(),
        "sizes": sizes,
        "layers_of_cut": cut["num_blocks"],
        "rounds": args.rounds,
        "threads": args.threads,
        "file_bytes": total,
        "cut_file_bytes": cut_total,
        "num_tensors": len(shapes),
        "num_shards": num_shards,
        "disk_bytes_of_all_files": on_disk,
        "notes": [
            "bytes are peaks above those before the load; file bytes are the file's pages, which the system may drop",
            "ours, native maps the file: the first forward pass reads it; the naive load reads and copies",
            "naive: safetensors' load_file, a model with weights drawn for it, load_state_dict",
        ],
        "loads": rows,
        "naive_over_ours": {
            kind: ratios(rows[f"cut, {kind}, naive"], rows[f"cut, {kind}"]) for kind in ("native", "float32")
        },
        "anonymous_bytes_over_file_bytes": {
            "whole file": rows["whole file"]["anonymous"] / total,
            "shards": rows["shards"]["anonymous"] / total,
        },
    }


def summed(several: list[dict[str, Any]]) -> dict[str, Any]:
    """Median of the seconds with their range, and the largest of every peak."""
    seconds = [one["seconds"] for one in several]
    return {
        "parameters": several[0]["parameters"],
        "types": several[0]["types"],
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        **{key: max(one[key] for one in several) for key in ("anonymous", "file", "resident")},
    }


def ratios(other: dict[str, Any], one: dict[str, Any]) -> dict[str, float]:
    """What another loader takes, in units of what ours takes."""
    return {key: other[key] / max(one[key], 1e-9) for key in ("seconds", "anonymous", "resident")}


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title=f"{result['file_bytes'] / 1e9:.1f} GB of bfloat16; cut: {result['layers_of_cut']} layers")
    for title in ("load", "parameters", "seconds", "range", "anonymous MB", "file MB", "resident MB"):
        table.add_column(title, justify="left" if title == "load" else "right")
    for name, row in result["loads"].items():
        low, high = row["seconds_range"]
        sizes = (f"{row[key] / 1e6:,.0f}" for key in ("anonymous", "file", "resident"))
        table.add_row(name, f"{row['parameters']:,}", f"{row['seconds']:.2f}", f"{low:.2f}-{high:.2f}", *sizes)
    console = Console(width=110)
    console.print(table)
    for kind, of in result["naive_over_ours"].items():
        said = ", ".join(f"{key} {value:.2f}x" for key, value in of.items())
        console.print(f"naive over ours, {kind}: {said}", highlight=False)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="bench_load.py", description=__doc__)
    p.add_argument("--layers", type=int, default=4, metavar="N", help="of the cut network, of 30 (default: 4)")
    p.add_argument("--rounds", type=int, default=3, metavar="N", help="times each is loaded, in turns (default: 3)")
    p.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads of PyTorch (default: 2)")
    p.add_argument("--folder", type=Path, metavar="DIR", help="where the sparse files go; it must be able to hold some")
    p.add_argument("--out", type=Path, metavar="FILE", help="write the result there as JSON")
    p.add_argument("--smoke", action="store_true", help="tiny sizes: does everything run?")
    return p


def main() -> None:
    """Run the benchmark."""
    args = parser().parse_args()
    with exit_clearly():
        result = run(args)
        show(result)
        if args.out:
            write_json(args.out, result)


if __name__ == "__main__":
    main()
