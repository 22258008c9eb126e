"""Reading latent shards: samples and bytes a second, the first batch, and memory, beside other readers.

All read the same samples: latents of 5 s clips at about 640x352 (video [48, 31, 22, 40], audio [157, 20], both
float16, with a text embedding of 60 to 140 rows of 4096) in batches of 8, shuffled, out of files that the system holds
in memory, so that readers are measured and not disks. A reader delivers when a batch of stacked tensors is in the
training process. "ovi, first epoch" looks at every number for NaN, which ovi does once in a run. Three bases: "raw tar"
takes every member's bytes out with tarfile in the loading processes of a plain DataLoader and hands them over as they
are in shared memory, eight samples at a time; "read through" takes them out in one process, tar after tar, and throws
them away; "dropped" does so in as many processes as load, which no training can live on: it reads memory and writes
none. Peers that are not installed are left out, and said so. ``--out FILE`` keeps the result; ``--smoke`` is small.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import multiprocessing
import os
import shlex
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load, save
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from machine import machine
from ovi.clock import Clock
from ovi.commands.record import git_state
from ovi.data.files import sha256, write_json
from ovi.data.index import FORMAT, VERSION, ShardIndex
from ovi.data.reading.loader import LatentLoader, RankBatches, warm_up
from ovi.data.reading.order import Stream
from ovi.data.reading.plan import ReadingPlan
from ovi.data.shards import LatentShards
from setting import PRESETS

VIDEO, AUDIO, TEXT_DIM, BATCH = (48, 31, 22, 40), (157, 20), 4096, 8
CLIP_S = 121 / 24
PEERS = {"webdataset": "webdataset", "mosaicml-streaming": "streaming", "litdata": "litdata"}

BASES = ("raw_tar", "read_through", "dropped")

Batches = Callable[[], Iterator[int]]
"""Starts one pass; yields the number of samples of each batch as it arrives."""


def samples(count: int) -> Iterator[tuple[str, dict[str, torch.Tensor], dict[str, Any]]]:
    """(key, tensors, json) of made-up clips; the same every time."""
    draw = torch.Generator().manual_seed(0)
    for n in range(count):
        rows = 60 + int(torch.randint(81, (), generator=draw))
        shapes = {"video": VIDEO, "audio": AUDIO, "text": (rows, TEXT_DIM)}
        tensors = {name: torch.randn(shape, generator=draw).half() for name, shape in shapes.items()}
        yield f"clip-{n:06d}", tensors, {"caption": f"clip number {n}", "file": f"{n}.mp4", "start_s": 0.0}


def write_tars(folder: Path, count: int, per_shard: int) -> None:
    """The set as `ovi encode` lays it out."""
    folder.mkdir()
    shards, coming = [], samples(count)
    for number in range(-(-count // per_shard)):
        path = folder / f"train-{number:06d}.tar"
        size = min(per_shard, count - number * per_shard)
        with tarfile.open(path, "w") as tar:
            for _ in range(size):
                key, tensors, about = next(coming)
                for suffix, content in (("json", json.dumps(about).encode()), ("safetensors", save(tensors))):
                    entry = tarfile.TarInfo(f"{key}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        about = {"file": path.name, "num_samples": size, "num_bytes": path.stat().st_size, "sha256": sha256(path)}
        shards.append(about)
    codecs = {kind: {"name": name} for kind, name in (("video", "wan22"), ("audio", "mmaudio16k"), ("text", "umt5"))}
    index = {"format": FORMAT, "version": VERSION, "clock": Clock().to_dict(), "codecs": codecs, "num_frames": 121}
    index |= {"height": 352, "width": 640, "latent_shapes": {"video": VIDEO, "audio": AUDIO}, "dtype": "float16"}
    write_json(folder / "index.json", {**index, "splits": {"train": {"num_samples": count, "shards": shards}}})


# --- readers: each returns what starts a pass -------------------------------------------------------------------------


def ours(root: Path, workers: int, *, first_epoch: bool = False) -> Batches:
    index = ShardIndex.load(root / "tars")
    shards = index.shards("train")
    stream = Stream(tuple(shard.num_samples for shard in shards), window=256)
    plan = ReadingPlan((stream,), ((0,) * len(shards),), (BATCH,))
    loader = LatentLoader(LatentShards(index, "train"), RankBatches(plan), num_workers=workers)

    def start() -> Iterator[int]:
        if first_epoch:
            loader.latents.look_again()
        return (len(batch) for batch in loader)

    return start


def first_epochs(root: Path, workers: int) -> Batches:
    return ours(root, workers, first_epoch=True)


def webdataset(root: Path, workers: int) -> Batches:
    import webdataset as wds

    urls = sorted(map(str, (root / "tars").glob("*.tar")))
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(urls),
        wds.detshuffle(len(urls)),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(32),
        wds.map(_decoded),
        wds.batched(BATCH, collation_fn=_stacked, partial=True),
    )
    loader = wds.WebLoader(pipeline, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    return lambda: (len(batch["video"]) for batch in loader)


def _decoded(sample: dict[str, Any]) -> dict[str, Any]:
    return {**load(sample["safetensors"]), "about": json.loads(sample["json"])}


def _stacked(rows: list[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {name: torch.stack([row[name] for row in rows]) for name in ("video", "audio")}
    return {**batch, "text": [row["text"] for row in rows], "about": [row["about"] for row in rows]}


def mosaicml(root: Path, workers: int) -> Batches:
    import streaming

    folder = root / "mds"
    if not folder.exists():
        columns = {"video": "ndarray:float16", "audio": "ndarray:float16", "text": "ndarray:float16", "about": "json"}
        with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=2**28) as writer:
            for _, tensors, about in samples(_count(root)):
                writer.write({**{name: tensor.numpy() for name, tensor in tensors.items()}, "about": about})
    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    return _loaded(dataset, workers)


def litdata(root: Path, workers: int) -> Batches:
    import litdata as ld

    folder = root / "lit"
    if not folder.exists():
        ld.optimize(_Rows(root), list(range(_count(root))), str(folder), chunk_bytes="256MB", num_workers=1)
    dataset = ld.StreamingDataset(str(folder), shuffle=True)
    loader = ld.StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=workers, collate_fn=_stacked_arrays, persistent_workers=workers > 0
    )
    return lambda: (len(batch["video"]) for batch in loader)


class _Rows:
    """Sample by number, for litdata's writer, which asks for one after another."""

    def __init__(self, root: Path) -> None:
        self.dataset = LatentShards(ShardIndex.load(root / "tars"), "train")

    def __call__(self, number: int) -> dict[str, Any]:
        one = self.dataset[number]
        return {"video": one.video.clone(), "audio": one.audio.clone(), "text": one.text.clone(), "about": one.about}


class _RawTars(IterableDataset[list[torch.Tensor]]):
    """Every member's bytes as a tensor, which a DataLoader hands over in shared memory, eight samples at a time.

    Each loading process has its part of the tars.
    """

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        worker, taken = get_worker_info(), list[torch.Tensor]()
        for path in self.paths[worker.id :: worker.num_workers] if worker else self.paths:
            for member in _members(path):
                content = bytearray(member.size)
                member.file.readinto(content)  # type: ignore[attr-defined]
                taken.append(torch.frombuffer(content, dtype=torch.uint8))
                if len(taken) == 2 * BATCH:
                    yield taken
                    taken = []
        if taken:
            yield taken


def raw_tars(root: Path, workers: int) -> Batches:
    paths = sorted(map(str, (root / "tars").glob("*.tar")))
    loader = DataLoader(_RawTars(paths), batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    return lambda: (len(taken) // 2 for taken in loader)


class _Member(NamedTuple):
    file: IO[bytes]
    size: int


def _members(path: str) -> Iterator[_Member]:
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file:
                yield _Member(file, member.size)


def _loaded(dataset: Any, workers: int) -> Batches:
    loader = DataLoader(
        dataset,
        batch_size=BATCH,
        num_workers=workers,
        collate_fn=_stacked_arrays,
        persistent_workers=workers > 0,
    )
    return lambda: (len(batch["video"]) for batch in loader)


def _stacked_arrays(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("video", "audio", "text")
    return _stacked([{**row, **{name: torch.as_tensor(np.asarray(row[name])) for name in names}} for row in rows])


def _count(root: Path) -> int:
    return ShardIndex.load(root / "tars").num_samples("train")


READERS = {
    "ovi": ours,
    "ovi, first epoch": first_epochs,
    "webdataset": webdataset,
    "mosaicml-streaming": mosaicml,
    "litdata": litdata,
}


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(name: str, root: str, workers: int, passes: int, answer: Any) -> None:
    """One reader in a process of its own: seconds to the first batch, then samples a second of each pass.

    Each of its passes follows one of every base, so that all have the machine in the same state.
    """
    torch.set_num_threads(1)
    try:
        if workers and name.startswith("ovi"):
            warm_up()  # as the data module does when it is made, while the model is built
            time.sleep(8)
        READERS[name](Path(root), workers)  # what it writes or imports is not what is measured
        began = time.perf_counter()
        start, raw = READERS[name](Path(root), workers), raw_tars(Path(root), workers)
        first, rates = 0.0, defaultdict[str, list[float]](list)
        paths = sorted(map(str, (Path(root) / "tars").glob("*.tar")))
        parts = [paths[n :: max(1, workers)] for n in range(max(1, workers))]
        with multiprocessing.get_context("spawn").Pool(len(parts)) as pool:
            for number in range(passes + 2):
                if number:  # the first pass starts what loads
                    rates["read_through"].append(_rate(lambda: sum(pool.map(_take_out, [paths])) // 2))
                    rates["dropped"].append(_rate(lambda: sum(pool.map(_take_out, parts, chunksize=1)) // 2))
                    rates["raw_tar"].append(_rate(lambda: sum(raw())))
                opened, count = time.perf_counter(), 0
                for size in start():
                    first = first or time.perf_counter() - began
                    count += size
                rates["own"].append(count / (time.perf_counter() - opened))
        kept = {"samples_per_s": rates["own"][2:], **{f"{base}_samples_per_s": rates[base][1:] for base in BASES}}
        answer.send({"first_batch_s": first, **kept, "samples": count})
    except Exception as error:
        answer.send({"error": f"{type(error).__name__}: {error}"[:500]})


def _rate(read: Callable[[], int]) -> float:
    """Samples a second of what says how many it has read."""
    began = time.perf_counter()
    return read() / (time.perf_counter() - began)


def _take_out(paths: list[str]) -> int:
    return sum(bool(member.file.read()) for path in paths for member in _members(path))


def memory(root: str, workers: int, seconds: float, answer: Any) -> None:
    """Memory of the reading process and its children, what they share included, while it reads for a time, in MiB."""
    torch.set_num_threads(1)
    start, count, levels = ours(Path(root), workers), 0, []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for size in start():
            count += size
        levels.append(_resident())
    answer.send({"samples": count, "hours_of_clips": count * CLIP_S / 3600, "mib": levels})


def _resident() -> float:
    """Memory of this process and its children, files left out, what several share counted once, in MiB."""
    children = [int(p) for p in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    total = 0
    for pid in [os.getpid(), *children, *(g for c in children for g in _children(c))]:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon", "Pss_Shmem")):  # each process's share
                total += int(line.split()[1])
    return total / 1024


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def apart(function: Callable[..., None], *arguments: Any) -> dict[str, Any]:
    """What a function says from a fresh process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=function, args=(*arguments, there))
    child.start()
    there.close()
    try:
        result: dict[str, Any] = here.recv()
    except EOFError:
        child.join()
        result = {"error": f"ended with {child.exitcode}"}
    child.join(30)
    if child.is_alive():
        child.kill()
    return result


def missing() -> dict[str, str]:
    """Peers that cannot be imported, and why."""
    found = {}
    for name, module in PEERS.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # a peer may fail to import in many ways
            found[name] = f"{type(error).__name__}: {error}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=960)
    parser.add_argument("--per-shard", type=int, default=40)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--memory-s", type=float, default=60, help="how long memory is watched")
    parser.add_argument("--smoke", action="store_true", help="small and quick")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.samples, arguments.per_shard, arguments.passes, arguments.memory_s = 16, 8, 1, 1.0
    console = Console(width=110)
    absent = missing()
    for name, why in absent.items():
        console.print(f"{name} is left out: {why}")
    root = Path(tempfile.mkdtemp(prefix="bench_data_"))
    try:
        write_tars(root / "tars", arguments.samples, arguments.per_shard)
        num_bytes = sum(path.stat().st_size for path in (root / "tars").glob("*.tar"))
        rows: dict[str, Any] = {}
        for workers in (0, 2):
            for name in (n for n in READERS if n not in absent):
                rows[f"{name}, {workers}"] = apart(measure, name, str(root), workers, arguments.passes)
        watched = {workers: apart(memory, str(root), workers, arguments.memory_s) for workers in (0, 2)}
    finally:
        shutil.rmtree(root, ignore_errors=True)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "git": git_state(),
        "machine": machine(PRESETS["smoke"]),
        "setting": {"samples": arguments.samples, "bytes": num_bytes, "batch_size": BATCH, "passes": arguments.passes},
        "cpus": os.cpu_count(),
        "versions": {name: _version(name) for name in ("torch", *PEERS)},
        "left_out": absent,
        "readers": rows,
        "memory": {f"{workers} workers": found for workers, found in watched.items()},
    }
    show(console, result)
    if arguments.out:
        write_json(arguments.out, result)
    if any("error" in row for name, row in rows.items() if name.startswith("ovi")):
        sys.exit(1)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def show(console: Console, result: dict[str, Any]) -> None:
    """Print the table."""
    each = result["setting"]["bytes"] / result["setting"]["samples"] / 1e6
    table = Table(title=f"{result['setting']['samples']} samples of {each:.2f} MB, median of passes (least, most)")
    for title in ("reader, workers", "samples/s", "MB/s", "of raw tar", "of read through", "of dropped", "first s"):
        table.add_column(title, justify="left" if title.startswith("reader") else "right")
    for name, row in result["readers"].items():
        if "error" in row:
            table.add_row(name, row["error"][:60])
            continue
        rates = row["samples_per_s"]
        shares = [
            statistics.median(mine / theirs for mine, theirs in zip(rates, row[f"{base}_samples_per_s"]))
            for base in BASES
        ]
        table.add_row(
            name,
            f"{statistics.median(rates):.0f} ({min(rates):.0f}, {max(rates):.0f})",
            f"{statistics.median(rates) * each:.0f}",
            *(f"{share:.2f}" for share in shares),
            f"{row['first_batch_s']:.2f}",
        )
    console.print(table)
    for name, row in result["memory"].items():
        if "error" in row:
            console.print(f"memory, {name}: {row['error']}")
            continue
        levels = row["mib"]
        some = ", ".join(f"{levels[n]:.0f}" for n in np.linspace(0, len(levels) - 1, 6).astype(int))
        console.print(
            f"memory, {name}: {some} MiB over {row['samples']} samples ({row['hours_of_clips']:.1f} h of clips)"
        )


if __name__ == "__main__":
    main()
