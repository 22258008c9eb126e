"""Clips to latent shards, by any number of processes, resumable at any point.

The folder written holds ``train-000000.tar`` and so on, ``val-...``, ``rejected.jsonl`` and, last of all,
``index.json``: without it a set is not whole and will not be read. A hidden journal keeps what is finished: settings,
codec statistics, and one small record per unit of work. Units are groups of files to cut, and shards; each is claimed
by a process for as long as that lives, so processes may be added, killed and started again at any time.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovi.codecs.bundle import Codecs
from ovi.data.clip_encoder import DTYPES, ClipEncoder, Rejection
from ovi.data.cut import CutUnit, CutWorker, cut_units, jobs_of, run_over_set
from ovi.data.encode_folder import STATISTICS, EncodeFolder, load_statistics
from ovi.data.index import FORMAT, INDEX, REJECTED, SPLITS, VERSION
from ovi.data.launchers import Launcher
from ovi.data.launchers.local import Local
from ovi.data.local_copies import LocalCopies
from ovi.data.plan import ClipJob, ShardPlan, check_keys, key_fraction, plan_shards, source_digest
from ovi.data.quantise import CHANNEL_AXIS, dequantise, quantise
from ovi.data.reading.remote import is_remote
from ovi.data.shard_worker import ShardWorker, rejection_record
from ovi.data.sources import ClipFormat, Source
from ovi.data.stages import windows as _windows  # noqa: F401  (registers the one stage that is always there)
from ovi.data.stages.base import limits_of
from ovi.data.stages.chosen import ChosenStages, level_of
from ovi.errors import OviError

Progress = Callable[[str, int, int], None]
"""Called with the stage ("cut", "fit" or "encode"), files or clips done, and in all."""


@dataclass(frozen=True)
class EncodeSummary:
    """What a run of ``encode`` left behind.

    Args:
        folder: that was written, or its URL.
        index: path or URL of the finished ``index.json``.
        num_samples: samples by split.
        rejected: rejected clips by reason.
        num_files: media files of the source; num_captioned: those with a caption.
        num_new: clips that this process encoded; the others were finished by earlier or other ones.
        seconds: wall time of this process.
    """

    folder: str
    index: Path | str
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
    stages: Mapping[str, Mapping[str, Any] | None] | None = None,
    wiring: Mapping[str, Any] | None = None,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    launcher: Launcher | None = None,
    scratch_dir: str | None = None,
    scratch_gb: float = 16.0,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> EncodeSummary:
    """Encode a source's clips into a folder of latent shards; interrupted, the same call continues.

    Called in several processes at once, they share the work and all return when the set is whole. In a folder whoever
    is free takes what is left; behind a URL units are dealt by rank, and every rank must come through. Bad files are
    left out, counted by reason in the index and listed in ``rejected.jsonl``.

    Args:
        source: where the clips come from.
        codecs: what encodes them; statistics are taken from the clips where they have none yet.
        out: folder to write to, or its fsspec URL; processes on several machines need a folder that they share.
        num_frames: pixel frames of a clip; long files give several clips end to end.
        height, width: of a clip in pixels.
        shard_size: clips per shard.
        val_fraction: share of the files that go to the split "val", 0 to below 1.
        dtype: of the stored tensors: float16, bfloat16, float32, or int8 (latents alone; text is float16 then), whose
            error is measured on the clips that the statistics are taken from.
        fit_clips: how many training clips the statistics are taken from.
        clips_per_file: the most clips taken of one file (of one shot, with a stage that finds shots); None takes all.
        variable_frame_rate: "reject", or "resample" by the file's time stamps.
        stages: registry specs of the stages that candidates must pass, in order, by any label; None is off.
        wiring: what the code gives them, by parameter name: ``estimator`` for ``sync``, ``captioner``.
        num_workers: processes that encode for this one; up to 1 stays in this one.
        rank, world_size: where this process begins among those started together; in a folder any may fail.
        launcher: what does the work: an entry of ``LAUNCHERS``; None is this process.
        scratch_dir: for local copies of a source's files that are elsewhere; None is the system's temporary folder.
        scratch_gb: that they may take, in 10^9 bytes; the largest file must fit.
        overwrite: remove what an earlier run with other settings left in ``out``; files of other kinds stay.
        on_progress: called after every clip.

    Raises:
        OviError: for settings that do not fit, an empty source, a folder begun with other settings, a full disk, or
            when no training clip is left.
    """
    began, began_at = time.monotonic(), time.time()
    _check(val_fraction, dtype, shard_size=shard_size, fit_clips=fit_clips, clips_per_file=clips_per_file)
    if not 0 <= rank < world_size:
        raise OviError(f"rank must be 0 to below world_size, got {rank} of {world_size}")
    shapes = codecs.latent_shapes(num_frames, height, width)
    clock = codecs.clock
    form = ClipFormat(clock.fps, num_frames, height, width, clock.sample_rate)
    chosen, variable_frame_rate = _chosen(
        stages or {}, {**(wiring or {}), "form": form}, clips_per_file, variable_frame_rate
    )
    chosen.of_level("file", "clip", "set")  # what cannot be built shows before anything is written
    items = source.items(form, num_workers)
    check_keys(items)
    settings = {
        "codecs": codecs.specs,
        **asdict(form),
        "shard_size": shard_size,
        "val_fraction": val_fraction,
        "dtype": dtype,
        "fit_clips": fit_clips,
        "clips_per_file": clips_per_file,
        "variable_frame_rate": variable_frame_rate,
        "stages": chosen.describe(),
        "order of stages": list(chosen.describe()),
        "stages are given": chosen.describe_wiring(),
        "source files and captions": f"{len(items)} files, hash {source_digest(items)}",
    }
    copies = LocalCopies(_absolute(out), int(scratch_gb * 1e9), scratch=scratch_dir)
    with (
        closing(copies),
        EncodeFolder(out, rank=rank, world_size=world_size) as folder,
        launcher or Local() as launch,
    ):
        folder.begin(settings, codecs, overwrite=overwrite)
        encoder = ClipEncoder(codecs, form, dtype, variable_frame_rate, chosen, copies)
        work = _Work(folder, launch, encoder, on_progress, rank / world_size)
        cut = work.cut(cut_units(items))
        jobs = list(jobs_of(items, cut))
        over_set = work.over_set(jobs)
        rejected = [rejection for record in (*cut, over_set) for rejection in record["rejected"]]
        left_out = set(over_set["left_out"])
        jobs = [job for job in jobs if job.key not in left_out]
        plans = plan_shards(items, jobs, shard_size=shard_size, val_fraction=val_fraction)
        work.fit(plans, fit_clips, rejected)
        quantisation = work.quantisation(plans, fit_clips) if dtype == "int8" else None
        num_new = 0
        while True:
            num_new += work.encode(plans, num_workers)
            with folder.claims.waiting_for("finish"):
                if not folder.index_since(began_at):
                    damaged = folder.damaged(plans)
                    for plan in damaged:
                        folder.forget(plan.file)
                    if damaged:
                        folder.not_whole()
                        continue
                records = [record or {} for record in folder.records([plan.file for plan in plans])]
                rejected += [rejection for record in records for rejection in record["rejected"]]
                splits = {split: _split(records, plans, split) for split in SPLITS}
                if not splits["train"]["num_samples"]:
                    folder.write_rejected(rejected)
                    raise _nothing_left(rejected, splits["val"]["num_samples"], folder)
                counts = dict(Counter(rejection["reason"] for rejection in rejected))
                num_captioned = sum(bool(item.caption) for item in items)
                content = {
                    "format": FORMAT,
                    "version": VERSION,
                    "clock": clock.to_dict(),
                    "codecs": codecs.to_dict(),
                    "num_frames": num_frames,
                    "height": height,
                    "width": width,
                    "latent_shapes": shapes,
                    "text": {"dim": codecs.text.text_dim, "len": codecs.text.text_len},
                    "dtype": dtype,
                    **({"quantisation": quantisation} if quantisation else {}),
                    "splits": splits,
                    "source": {**source.describe(), "num_files": len(items), "num_captioned": num_captioned},
                    "rejected": counts,
                    "limits": _limits(chosen),
                    "throughput": _throughput(records),
                    "settings": settings,
                }
                if not folder.index_since(began_at) and folder.index() != json.loads(json.dumps(content)):
                    folder.write_rejected(rejected)
                    folder.write_index(content)
                break
        folder.leave()
    num_samples = {split: splits[split]["num_samples"] for split in SPLITS}
    index = folder.where(INDEX) if folder.local is None else folder.local / INDEX
    return EncodeSummary(
        str(out), index, num_samples, counts, len(items), num_captioned, num_new, time.monotonic() - began
    )


class _Work:
    """The steps of an encoding: what each process of it does, or waits for others to have done."""

    def __init__(
        self,
        folder: EncodeFolder,
        launch: Launcher,
        encoder: ClipEncoder,
        on_progress: Progress | None,
        begins_at: float,
    ) -> None:
        self.folder, self.launch, self.encoder, self.begins_at = folder, launch, encoder, begins_at
        self.on_progress: Progress = on_progress or (lambda stage, done, total: None)

    def cut(self, units: Mapping[str, CutUnit]) -> list[dict[str, Any]]:
        """Run the stages of level "file" over all files; returns the groups' records."""
        worker = CutWorker(self.encoder.stages, self.encoder.copies)
        self.launch(self.folder, units, worker, self.begins_at, partial(self.on_progress, "cut"))
        return [record or {} for record in self.folder.records(list(units))]

    def over_set(self, jobs: list[ClipJob]) -> dict[str, Any]:
        """Run the stages of level "set" over all clips, in one process; the others wait."""
        set_stages = self.encoder.stages.of_level("set")
        if not set_stages:
            return {"left_out": [], "rejected": []}
        before = self.encoder.stages.of_level("clip", before="set")
        return self.folder.once("set", lambda: run_over_set(self.encoder, jobs, before, set_stages))

    def fit(self, plans: list[ShardPlan], fit_clips: int, rejected: list[dict[str, Any]]) -> None:
        """Take the codecs' statistics from some clips, or wait for the process that does."""
        if self.encoder.codecs.fitted:
            return
        state = self.folder.once(STATISTICS, lambda: self._statistics(plans, fit_clips, rejected))
        load_statistics(self.encoder.codecs, state)

    def _statistics(self, plans: list[ShardPlan], fit_clips: int, rejected: list[dict[str, Any]]) -> dict[str, Any]:
        left_out = list(rejected)
        clips = self._clips(plans, fit_clips, left_out)
        first = next(clips, None)
        if first is None:
            self.folder.write_rejected(left_out)
            num_val = sum(len(plan) for plan in plans if plan.split == "val")
            raise _nothing_left(left_out, num_val, self.folder)
        self.encoder.codecs.fit(chain([first], clips))
        state: dict[str, Any] = self.encoder.codecs.to_dict()["state"]
        return state

    def quantisation(self, plans: list[ShardPlan], fit_clips: int) -> dict[str, Any]:
        """What 8 bits cost: root mean square error of the latents as a share of theirs, over the same clips."""

        def measure() -> dict[str, Any]:
            squares, errors = {"video": 0.0, "audio": 0.0}, {"video": 0.0, "audio": 0.0}
            for frames, waveform in self._clips(plans, fit_clips, []):
                for name, latents in zip(("video", "audio"), self.encoder.codecs.encode_clip(frames, waveform)):
                    axis, latents = CHANNEL_AXIS[name], latents.cpu().double()
                    read = dequantise(*quantise(latents, axis=axis), axis=axis).double()
                    squares[name] += latents.square().sum().item()
                    errors[name] += (latents - read).square().sum().item()
            return {f"{name}_rel_rms": math.sqrt(errors[name] / squares[name]) for name in squares if squares[name]}

        return self.folder.once("quantisation", measure)

    def _clips(
        self, plans: list[ShardPlan], fit_clips: int, left_out: list[dict[str, Any]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Frames and sound of the training clips whose keys hash lowest: any order of files gives the same."""
        jobs = sorted(
            (job for plan in plans if plan.split == "train" for job in plan.jobs), key=lambda job: key_fraction(job.key)
        )
        count, total = 0, min(fit_clips, len(jobs))
        for job in jobs:
            read = self.encoder.read(job)
            if isinstance(read, Rejection):
                left_out.append(rejection_record(job, read))
                continue
            assert read.clip is not None
            yield torch.from_numpy(read.clip.frames), torch.from_numpy(read.clip.waveform)
            count += 1
            self.on_progress("fit", count, total)
            if count == fit_clips:
                return

    def encode(self, plans: list[ShardPlan], num_workers: int) -> int:
        """Write shards until all are written by somebody; returns how many clips were encoded from here."""
        units = {plan.file: plan for plan in plans}
        worker = ShardWorker(self.encoder, num_workers if sum(map(len, plans)) > 1 else 0)
        return self.launch(self.folder, units, worker, self.begins_at, partial(self.on_progress, "encode"))


def _chosen(
    stages: Mapping[str, Mapping[str, Any] | None],
    wiring: Mapping[str, Any],
    clips_per_file: int | None,
    variable_frame_rate: str,
) -> tuple[ChosenStages, str]:
    """The stages with ``windows`` among them, which makes clips of a form out of files: behind the last of level "file"
    unless the user put it somewhere. Then how variable frame rates are taken, which both may say.

    Raises:
        OviError: when ``windows`` is told otherwise than the encoding.
    """
    specs = {label: dict(spec) for label, spec in stages.items() if spec is not None}
    settings = {"max_clips": clips_per_file, "variable_frame_rate": variable_frame_rate}
    label = next((label for label, spec in specs.items() if spec["name"] == "windows"), None)
    if label is None:
        files = {label: spec for label, spec in specs.items() if level_of(spec["name"]) == "file"}
        others = {label: spec for label, spec in specs.items() if label not in files}
        windows = {"name": "windows", "knobs": settings}
        return ChosenStages({**files, "windows": windows, **others}, wiring), variable_frame_rate
    knobs = dict(specs[label].get("knobs", {}))
    if clips_per_file is not None and knobs.get("max_clips") not in (None, clips_per_file):
        raise OviError(f"clips_per_file={clips_per_file}, but stages.{label}.max_clips={knobs['max_clips']}: set one")
    knobs["max_clips"] = knobs.get("max_clips") if clips_per_file is None else clips_per_file
    if "resample" in (knobs.get("variable_frame_rate"), variable_frame_rate):
        knobs["variable_frame_rate"] = variable_frame_rate = "resample"
    specs[label] = {**specs[label], "knobs": knobs}
    return ChosenStages(specs, wiring), variable_frame_rate


def _limits(stages: ChosenStages) -> dict[str, list[float]]:
    return limits_of(stages.of_level("file", "clip", "set"))


def _throughput(records: list[dict[str, Any]]) -> dict[str, float]:
    """Clips per second of one process's time, over all processes that worked on the set."""
    seconds = sum(record["seconds"] for record in records)
    clips = sum(record["num_samples"] + len(record["rejected"]) for record in records)
    return {"process_seconds": seconds, "clips_per_process_second": clips / seconds if seconds else 0.0}


def _split(records: list[dict[str, Any]], plans: list[ShardPlan], split: str) -> dict[str, Any]:
    files = {plan.file for plan in plans if plan.split == split}
    shards = [
        {name: record[name] for name in ("file", "num_samples", "num_bytes", "sha256")}
        for record in records
        if record["file"] in files and record["num_samples"]
    ]
    return {"num_samples": sum(shard["num_samples"] for shard in shards), "shards": shards}


def _nothing_left(rejected: list[dict[str, Any]], num_val: int, folder: EncodeFolder) -> OviError:
    if not rejected:
        return OviError("no clip is left for training: lower val_fraction or add files")
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(r["reason"] for r in rejected).most_common())
    return OviError(
        f"no clip is left for training: {len(rejected)} rejected ({reasons}). The first: {rejected[0]['message']} "
        f"All are listed in {folder.where(REJECTED)}."
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


def _absolute(location: str | Path) -> str:
    return str(location) if is_remote(location) else str(Path(location).absolute())


__all__ = ["EncodeSummary", "Progress", "encode"]
