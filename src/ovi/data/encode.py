"""Clips to latent shards, resumable at any point.

The folder written holds ``train-000000.tar`` and so on, ``val-...``, ``rejected.jsonl`` and, last of all,
``index.json``: without it a set is not whole and will not be read. A hidden journal keeps what an interrupted run has
finished: its settings and codec statistics, and one small record per shard.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from torch import Tensor

from ovi.codecs.bundle import Codecs
from ovi.data.clip_encoder import DTYPES, ClipEncoder, Rejection, encoded
from ovi.data.files import PARTIAL, sha256, whole_file, write_json
from ovi.data.index import FORMAT, INDEX, JOURNAL, REJECTED, SPLITS, VERSION
from ovi.data.plan import ClipJob, ShardPlan, key_fraction, plan_shards, source_digest
from ovi.data.sources import ClipFormat, Source
from ovi.errors import OviError

Progress = Callable[[str, int, int], None]
"""Called with the stage ("fit" or "encode"), clips done and clips in all."""


@dataclass(frozen=True)
class EncodeSummary:
    """What a run of ``encode`` left behind.

    Args:
        index: path of the finished ``index.json``.
        num_samples: samples by split.
        rejected: rejected clips by reason.
        num_files: media files of the source; num_captioned: those with a caption.
        num_new: clips that this run encoded; the others were finished by an earlier one.
        seconds: wall time of this run.
    """

    index: Path
    num_samples: dict[str, int]
    rejected: dict[str, int]
    num_files: int
    num_captioned: int
    num_new: int
    seconds: float


def encode(
    source: Source,
    codecs: Codecs,
    out: str | Path,
    *,
    num_frames: int,
    height: int,
    width: int,
    shard_size: int = 256,
    val_fraction: float = 0.1,
    dtype: str = "float16",
    fit_clips: int = 128,
    clips_per_file: int | None = None,
    variable_frame_rate: str = "reject",
    num_workers: int = 0,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> EncodeSummary:
    """Encode a source's clips into a folder of latent shards; interrupted, the same call continues.

    Bad files are left out, counted by reason in the index and listed in ``rejected.jsonl``.

    Args:
        source: where the clips come from.
        codecs: what encodes them; statistics are taken from the clips where they have none yet.
        out: folder to write to.
        num_frames: pixel frames of a clip; long files give several clips end to end.
        height, width: of a clip in pixels.
        shard_size: clips per shard.
        val_fraction: share of the files that go to the split "val", 0 to below 1.
        dtype: of the stored tensors: float16, bfloat16 or float32.
        fit_clips: how many training clips the statistics are taken from.
        clips_per_file: the most clips taken of one file; None takes all that fit.
        variable_frame_rate: "reject", or "resample" by the file's time stamps.
        num_workers: processes that encode; up to 1 stays in this one.
        overwrite: remove what an earlier run with other settings left in ``out``; files of other kinds stay.
        on_progress: called after every clip.

    Raises:
        OviError: for settings that do not fit, an empty source, a folder begun with other settings or in use, a full
            disk, or when no training clip is left.
    """
    began, out = time.monotonic(), Path(out)
    _check(val_fraction, dtype, shard_size=shard_size, fit_clips=fit_clips, clips_per_file=clips_per_file)
    shapes = codecs.latent_shapes(num_frames, height, width)
    clock = codecs.clock
    form = ClipFormat(clock.fps, num_frames, height, width, clock.sample_rate)
    items = source.items(form, num_workers)
    settings = {
        "codecs": codecs.specs,
        **asdict(form),
        "shard_size": shard_size,
        "val_fraction": val_fraction,
        "dtype": dtype,
        "fit_clips": fit_clips,
        "clips_per_file": clips_per_file,
        "variable_frame_rate": variable_frame_rate,
        "source files and captions": f"{len(items)} files, hash {source_digest(items)}",
    }
    with _Folder(out, overwrite) as folder:
        folder.claim(settings, codecs)
        plans = plan_shards(
            items, form, shard_size=shard_size, val_fraction=val_fraction, clips_per_file=clips_per_file
        )
        encoder = ClipEncoder(codecs, form, dtype, variable_frame_rate)
        if not codecs.fitted:
            _fit(encoder, plans, fit_clips, folder, on_progress)
        folder.begin(settings, codecs)
        records, num_new = _write_shards(folder, plans, encoder, num_workers, on_progress)
        rejected = [rejection for record in records for rejection in record["rejected"]]
        folder.write_rejected(rejected)
        splits = {split: _split(records, plans, split) for split in SPLITS}
        if not splits["train"]["num_samples"]:
            raise _nothing_left(rejected, splits["val"]["num_samples"], out)
        counts = dict(Counter(rejection["reason"] for rejection in rejected))
        num_captioned = sum(bool(item.caption) for item in items)
        write_json(
            out / INDEX,
            {
                "format": FORMAT,
                "version": VERSION,
                "clock": clock.to_dict(),
                "codecs": codecs.to_dict(),
                "num_frames": num_frames,
                "height": height,
                "width": width,
                "latent_shapes": shapes,
                "dtype": dtype,
                "splits": splits,
                "source": {**source.describe(), "num_files": len(items), "num_captioned": num_captioned},
                "rejected": counts,
                "settings": settings,
            },
        )
    num_samples = {split: splits[split]["num_samples"] for split in SPLITS}
    return EncodeSummary(out / INDEX, num_samples, counts, len(items), num_captioned, num_new, time.monotonic() - began)


class _Folder:
    """The folder written to: one writer at a time, its journal, and what may stand in it."""

    def __init__(self, path: Path, overwrite: bool) -> None:
        self.path, self.overwrite = path, overwrite
        self.journal = path / JOURNAL
        self.begun = self.journal / "begun.json"

    def __enter__(self) -> _Folder:
        try:
            self.journal.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.journal / "lock", "w")
        except OSError as error:
            raise OviError(f"{self.path}: cannot write there ({error.strerror}); choose another folder") from error
        try:
            # Released by the system when the process ends, however it ends.
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            raise OviError(
                f"{self.path}: another process is encoding into it; wait, or choose another folder"
            ) from None
        return self

    def __exit__(self, *exc: object) -> None:
        self.lock.close()

    def claim(self, settings: dict[str, Any], codecs: Codecs) -> None:
        """Continue what was begun with the same settings, taking its codec statistics; refuse any other.

        Raises:
            OviError: when the folder holds shards of other settings, or of unknown ones.
        """
        for partial in [*self.path.glob("*" + PARTIAL), *self.journal.glob("*" + PARTIAL)]:
            partial.unlink()
        if self.overwrite and self._differences(settings, codecs) != []:
            for file in [*self._products(), *self.journal.glob("*.json")]:
                file.unlink()
        differences = self._differences(settings, codecs)
        if differences is None:
            found = sorted(file.name for file in self._products())
            if found:
                raise OviError(
                    f"{self.path} holds {found[0]} of an unknown run: choose another folder, or replace it with "
                    f"overwrite=true"
                )
        elif differences:
            raise OviError(
                f"{self.path} was begun with other settings: {'; '.join(differences)}. "
                f"Choose another folder, or replace what is there with overwrite=true"
            )
        else:
            state = json.loads(self.begun.read_text())["state"]
            codecs.video.load_state(state["video"])
            codecs.audio.load_state(state["audio"])

    def begin(self, settings: dict[str, Any], codecs: Codecs) -> None:
        if not self.begun.exists():
            write_json(self.begun, {"settings": settings, "state": codecs.to_dict()["state"]})

    def finished(self, plan: ShardPlan) -> dict[str, Any] | None:
        """The record of a shard that is there and whole."""
        path = self.path / plan.file
        try:
            record = json.loads((self.journal / f"{plan.file}.json").read_text())
        except FileNotFoundError:
            return None
        if record["num_samples"] and not (
            path.is_file() and path.stat().st_size == record["num_bytes"] and sha256(path) == record["sha256"]
        ):
            return None
        return record

    def finish(self, plan: ShardPlan, record: dict[str, Any]) -> None:
        write_json(self.journal / f"{plan.file}.json", record)

    def write_rejected(self, rejected: list[dict[str, Any]]) -> None:
        with whole_file(self.path / REJECTED) as file:
            for rejection in rejected:
                file.write(json.dumps(rejection, ensure_ascii=False).encode() + b"\n")

    def _products(self) -> list[Path]:
        shards = [file for split in SPLITS for file in self.path.glob(f"{split}-[0-9]*.tar")]
        return [*shards, *(self.path / name for name in (INDEX, REJECTED) if (self.path / name).exists())]

    def _differences(self, settings: dict[str, Any], codecs: Codecs) -> list[str] | None:
        """What differs from the run the folder was begun with; None when it was not begun."""
        if not self.begun.exists():
            return None
        begun = json.loads(self.begun.read_text())
        mine = json.loads(json.dumps(settings))
        different = [
            f"{name} was {_short(begun['settings'].get(name))}, now {_short(mine.get(name))}"
            for name in dict.fromkeys([*begun["settings"], *mine])
            if begun["settings"].get(name) != mine.get(name)
        ]
        if codecs.fitted and codecs.to_dict()["state"] != begun["state"]:
            different.append("the codecs carry other statistics")
        return different


def _write_shards(
    folder: _Folder, plans: list[ShardPlan], encoder: ClipEncoder, num_workers: int, on_progress: Progress | None
) -> tuple[list[dict[str, Any]], int]:
    """Records of all shards, and how many clips were encoded for those that were not finished."""
    records = {plan.file: folder.finished(plan) for plan in plans}
    todo = [plan for plan in plans if records[plan.file] is None]
    if todo:
        # From here on the set is not whole, even if it once was.
        (folder.path / INDEX).unlink(missing_ok=True)
    total = sum(len(plan.jobs) for plan in plans)
    num_new = sum(len(plan.jobs) for plan in todo)
    done = total - num_new

    def counted(results: Iterator[tuple[ClipJob, Any]]) -> Iterator[tuple[ClipJob, Any]]:
        nonlocal done
        for result in results:
            done += 1
            if on_progress:
                on_progress("encode", done, total)
            yield result

    if done and on_progress:
        on_progress("encode", done, total)

    with encoded(encoder, [job for plan in todo for job in plan.jobs], num_workers) as results:
        stream = counted(results)
        for plan in todo:
            records[plan.file] = record = _write_shard(folder.path / plan.file, plan, stream)
            folder.finish(plan, record)
    return [record for record in records.values() if record is not None], num_new


def _write_shard(path: Path, plan: ShardPlan, results: Iterator[tuple[ClipJob, Any]]) -> dict[str, Any]:
    num_samples, rejected = 0, []
    with whole_file(path) as file, wds.TarWriter(file, encoder=False, mtime=0) as writer:
        for _ in plan.jobs:
            job, result = next(results)
            if isinstance(result, Rejection):
                rejected.append({"file": job.item.file, "start_s": job.start_s, **asdict(result)})
            else:
                writer.write({"__key__": job.key, **result})
                num_samples += 1
    if not num_samples:
        path.unlink()
    return {
        "file": plan.file,
        "num_samples": num_samples,
        "num_bytes": path.stat().st_size if num_samples else 0,
        "sha256": sha256(path) if num_samples else "",
        "rejected": rejected,
    }


def _fit(
    encoder: ClipEncoder, plans: list[ShardPlan], fit_clips: int, folder: _Folder, on_progress: Progress | None
) -> None:
    """Take the codecs' statistics from the training clips whose keys hash lowest: any order of files gives the same."""
    jobs = sorted(
        (job for plan in plans if plan.split == "train" for job in plan.jobs), key=lambda j: key_fraction(j.key)
    )
    rejected: list[dict[str, Any]] = []

    def clips() -> Iterator[tuple[Tensor, Tensor]]:
        count, total = 0, min(fit_clips, len(jobs))
        for job in jobs:
            clip = encoder.read(job)
            if isinstance(clip, Rejection):
                rejected.append({"file": job.item.file, "start_s": job.start_s, **asdict(clip)})
                continue
            yield torch.from_numpy(clip.frames), torch.from_numpy(clip.waveform)
            count += 1
            if on_progress:
                on_progress("fit", count, total)
            if count == fit_clips:
                return

    stream = clips()
    first = next(stream, None)
    if first is None:
        folder.write_rejected(rejected)
        num_val = sum(len(plan.jobs) for plan in plans if plan.split == "val")
        raise _nothing_left(rejected, num_val, folder.path)
    encoder.codecs.fit(chain([first], stream))


def _split(records: list[dict[str, Any]], plans: list[ShardPlan], split: str) -> dict[str, Any]:
    files = {plan.file for plan in plans if plan.split == split}
    shards = [
        {name: record[name] for name in ("file", "num_samples", "num_bytes", "sha256")}
        for record in records
        if record["file"] in files and record["num_samples"]
    ]
    return {"num_samples": sum(shard["num_samples"] for shard in shards), "shards": shards}


def _nothing_left(rejected: list[dict[str, Any]], num_val: int, out: Path) -> OviError:
    if not rejected:
        return OviError("no clip is left for training: lower val_fraction or add files")
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(r["reason"] for r in rejected).most_common())
    return OviError(
        f"no clip is left for training: {len(rejected)} rejected ({reasons}). The first: {rejected[0]['message']} "
        f"All are listed in {out / REJECTED}."
        + (f" {num_val} went to validation: with so few files set val_fraction=0" if num_val else "")
    )


def _check(val_fraction: float, dtype: str, **counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise OviError(f"{name} must be at least 1, got {count}")
    if not 0 <= val_fraction < 1:
        raise OviError(f"val_fraction must be 0 to below 1, got {val_fraction}")
    if dtype not in DTYPES:
        raise OviError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
