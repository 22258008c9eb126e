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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovi.codecs.bundle import Codecs
from ovi.data.at_work import AtWork
from ovi.data.clip_encoder import DTYPES, ClipEncoder, Rejection
from ovi.data.cut import CutUnit, GroupWorker, LookUnit, cut_units, jobs_of, join_looked, look_units
from ovi.data.encode_folder import FILES, SET, STATISTICS, EncodeFolder, load_statistics
from ovi.data.forms import Forms, Lengths, shard_shapes
from ovi.data.index import FORMAT, INDEX, REJECTED, SPLITS, VERSION
from ovi.data.launchers import Launcher
from ovi.data.launchers.local import Local
from ovi.data.local_copies import LocalCopies
from ovi.data.plan import ClipJob, ShardPlan, check_keys, key_fraction, plan_shards, source_digest
from ovi.data.quantise import CHANNEL_AXIS, dequantise, quantise
from ovi.data.readers import Reader, Readers, looking
from ovi.data.reading.remote import is_remote
from ovi.data.shard_worker import ShardWorker, rejection_record
from ovi.data.shares import PATIENCE_S
from ovi.data.sources import ClipFormat, Source, SourceItem
from ovi.data.stages import nearest_size, windows  # noqa: F401  (registers stages that are put in here)
from ovi.data.stages.base import limits_of
from ovi.data.stages.chosen import ChosenStages, level_of
from ovi.data.stages.incomplete import KEEPS
from ovi.data.stopwatch import Stopwatch
from ovi.errors import OviError

Progress = Callable[[str, int, int], None]
"""Called with the stage ("cut", "look", "fit" or "encode"), files or clips done, and in all."""


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
    sizes: Sequence[Sequence[int]] | None = None,
    lengths: Lengths | None = None,
    incomplete: str = "reject",
    shard_size: int = 256,
    val_fraction: float = 0.1,
    dtype: str = "float16",
    batch_size: int = 1,
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
    patience_s: float = PATIENCE_S,
    overwrite: bool = False,
    grow: bool = False,
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
        sizes: (height, width) pairs, of which each clip takes the one nearest in shape to its picture; None is the one
            above. Shards hold clips of one size and length.
        lengths: pixel frames of a clip, listed or as ``min``, ``max`` and ``step``, of which the longest that fits is
            cut off a file again and again; None is ``num_frames``.
        incomplete: what becomes of files without pictures or without sound: "reject", "audio" keeps those of sound
            alone, "video" those of pictures alone, "both" both kinds.
        shard_size: clips per shard.
        val_fraction: share of the files that go to the split "val", 0 to below 1.
        dtype: of the stored tensors: float16, bfloat16, float32, or int8 (latents alone; text is float16 then), whose
            error is measured on the clips that the statistics are taken from.
        batch_size: clips that the codecs take at a time, of one shard; another number may change last bits.
        fit_clips: how many training clips the statistics are taken from.
        clips_per_file: the most clips taken of one file (of one shot, with a stage that finds shots); None takes all.
        variable_frame_rate: "reject", or "resample" by the file's time stamps.
        stages: registry specs of the stages that candidates must pass, in order, by any label; None is off.
        wiring: what the code gives them, by parameter name: ``estimator`` for ``sync``, ``captioner``.
        num_workers: processes that cut, look, read and encode for this one; up to 1 stays in this one.
        rank, world_size: where this process begins among those started together; in a folder any may fail.
        launcher: what does the work: an entry of ``LAUNCHERS``; None is this process.
        scratch_dir: for local copies of a source's files that are elsewhere, and of a shard that is uploaded; None is
            the system's temporary folder.
        scratch_gb: that the copies may take, in 10^9 bytes; the largest file must fit.
        patience_s: behind a URL: seconds without any progress, of whatever rank, after which the others take the units
            of one that is missing; longer than the longest unit takes.
        overwrite: remove what an earlier run with other settings left in ``out``; files of other kinds stay.
        grow: take in files that have come to the source since ``out`` was begun: clips that are there keep their
            shards, and statistics stay; clips of new files get shards behind them.
        on_progress: called after every clip.

    Raises:
        OviError: for settings that do not fit, an empty source, a folder begun with other settings, a full disk, or
            when no training clip is left.
    """
    began, began_at = time.monotonic(), time.time()
    _check(
        val_fraction,
        dtype,
        shard_size=shard_size,
        fit_clips=fit_clips,
        clips_per_file=clips_per_file,
        batch_size=batch_size,
    )
    if not 0 <= rank < world_size:
        raise OviError(f"rank must be 0 to below world_size, got {rank} of {world_size}")
    stages = stages or {}
    sizes = _said_once(stages, "sizes", sizes, None, ("nearest_size", "sizes"))
    lengths = _said_once(stages, "lengths", lengths, None, ("windows", "lengths"))
    incomplete = _said_once(stages, "incomplete", incomplete, "reject", ("incomplete", "keep"))
    if incomplete not in KEEPS:
        raise OviError(f"incomplete must be one of {', '.join(KEEPS)}, got {incomplete!r}")
    forms = Forms.of(codecs, num_frames, height, width, sizes=sizes, lengths=lengths)
    form, clock = forms.form, codecs.clock
    shapes = shard_shapes(codecs, form)
    chosen, variable_frame_rate = _chosen(
        stages, {**(wiring or {}), "form": form}, clips_per_file, variable_frame_rate, forms, incomplete
    )
    chosen.of_level("file", "clip", "set")  # what cannot be built shows before anything is written
    items = source.items(form, num_workers, **({"sound_alone": True} if "video" in KEEPS[incomplete] else {}))
    check_keys(items)
    settings = {
        "codecs": codecs.specs,
        **asdict(form),
        **forms.settings(),
        **({"batch_size": batch_size} if batch_size > 1 else {}),
        "shard_size": shard_size,
        "val_fraction": val_fraction,
        "dtype": dtype,
        "fit_clips": fit_clips,
        "clips_per_file": clips_per_file,
        "variable_frame_rate": variable_frame_rate,
        "stages": chosen.describe(),
        "order of stages": list(chosen.describe()),
        "stages are given": chosen.describe_wiring(),
        FILES: f"{len(items)} files, hash {source_digest(items)}",
    }
    copies = LocalCopies(_absolute(out), int(scratch_gb * 1e9), scratch=scratch_dir)
    encoder = ClipEncoder(codecs, form, dtype, variable_frame_rate, chosen, copies, batch_size)
    looking(chosen)
    at_work = AtWork.beside(_absolute(out), scratch=scratch_dir)
    with (
        closing(copies),
        Readers(encoder, num_workers, at_work) as readers,
        EncodeFolder(out, rank=rank, world_size=world_size, patience_s=patience_s, scratch=scratch_dir) as folder,
        launcher or Local() as launch,
    ):
        generations = folder.begin(settings, codecs, items, overwrite=overwrite, grow=grow)
        work = _Work(folder, launch, encoder, readers, on_progress, rank / world_size)
        clips, rejected = work.cut(generations)
        over_set = work.over_set(clips)
        work.watch.add(over_set.get("steps", {}))
        rejected += over_set["rejected"]
        left_out = set(over_set["left_out"])
        plans: list[ShardPlan] = []
        first: list[ShardPlan] = []
        for files, of_files in zip(generations, clips):
            jobs = [job for job in of_files if job.key not in left_out]
            plans += plan_shards(files, jobs, shard_size=shard_size, val_fraction=val_fraction, behind=plans)
            if all(plan.split != "train" for plan in first):
                first = list(plans)
        shapes_of = {plan.form: shard_shapes(codecs, plan.form) for plan in plans if plan.form is not None}
        # Those of the files that it was begun with: statistics stay when others come.
        work.fit(first, fit_clips, rejected)
        quantisation = work.quantisation(first, fit_clips) if dtype == "int8" else None
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
                splits = {split: _split(records, plans, split, shapes_of) for split in SPLITS}
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
                    "throughput": _throughput(records, work.watch.to_dict()),
                    "settings": settings,
                }
                if not folder.index_since(began_at) and folder.index() != json.loads(json.dumps(content)):
                    folder.write_rejected(rejected)
                    folder.write_index(content)
                break
        at_work.clear()
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
        readers: Readers,
        on_progress: Progress | None,
        begins_at: float,
    ) -> None:
        self.folder, self.launch, self.encoder, self.begins_at = folder, launch, encoder, begins_at
        self.readers, self.watch = readers, Stopwatch()
        self.on_progress: Progress = on_progress or (lambda stage, done, total: None)

    def cut(self, generations: list[list[SourceItem]]) -> tuple[list[list[ClipJob]], list[dict[str, Any]]]:
        """Run the stages of level "file" over all files; returns the clips by generation, and what was left out."""
        rejected: list[dict[str, Any]] = []

        def told(records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            for record in records:
                rejected.extend(record["rejected"])
                self.watch.add(record.get("steps", {}))
                yield record

        units = cut_units(generations)
        number = {item.key: place for place, items in enumerate(generations) for item in items}
        clips: list[list[ClipJob]] = [[] for _ in generations]
        for job in jobs_of(units.values(), told(self._in_groups("cut", units))):
            clips[number[job.item.key]].append(job)
        return clips, rejected

    def over_set(self, clips: list[list[ClipJob]]) -> dict[str, Any]:
        """Run the stages of level "set" over all clips: what they look at is shared, and joined by one process."""
        if not looking(self.encoder.stages)[1]:
            return {"left_out": [], "rejected": []}
        unit = SET if len(clips) == 1 else f"{SET}-{len(clips) - 1}"
        found = self.folder.record(unit)
        if found is None:
            records = self._in_groups("look", look_units(clips))
            found = self.folder.once(unit, lambda: join_looked(self.encoder, clips, records))
        return found

    def _in_groups(self, stage: str, units: Mapping[str, CutUnit | LookUnit]) -> Iterator[dict[str, Any]]:
        """Have units done; their records are read as they are asked for: all together are large."""
        worker, report = GroupWorker(self.readers), partial(self.on_progress, stage)
        self.launch(self.folder, units, worker, self.begins_at, report)

        def records() -> Iterator[dict[str, Any]]:
            for name, record in self.folder.stream(list(units)):
                while record is None:  # half an upload
                    self.folder.forget(name)
                    self.launch(self.folder, {name: units[name]}, worker, self.begins_at, lambda done, total: None)
                    record = self.folder.record(name)
                yield record

        return records()

    def fit(self, plans: list[ShardPlan], fit_clips: int, rejected: list[dict[str, Any]]) -> None:
        """Take the codecs' statistics from some clips, or wait for the process that does."""
        if self.encoder.codecs.fitted:
            return
        state = self.folder.once(STATISTICS, lambda: self._statistics(plans, fit_clips, rejected))
        load_statistics(self.encoder.codecs, state)

    def _statistics(self, plans: list[ShardPlan], fit_clips: int, rejected: list[dict[str, Any]]) -> dict[str, Any]:
        left_out = list(rejected)
        clips = self._clips_of_all_kinds(plans, fit_clips, left_out)
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
            for frames, waveform in self._clips_of_all_kinds(plans, fit_clips, []):
                made = self.encoder.codecs.encode_clips(frames[None], waveform[None])
                for name, batch in zip(("video", "audio"), made):
                    if batch is None:
                        continue
                    axis, latents = CHANNEL_AXIS[name], batch[0].cpu().double()
                    read = dequantise(*quantise(latents, axis=axis), axis=axis).double()
                    squares[name] += latents.square().sum().item()
                    errors[name] += (latents - read).square().sum().item()
            return {f"{name}_rel_rms": math.sqrt(errors[name] / squares[name]) for name in squares if squares[name]}

        return self.folder.once("quantisation", measure)

    def _clips_of_all_kinds(
        self, plans: list[ShardPlan], fit_clips: int, left_out: list[dict[str, Any]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """So many of each kind: with pictures and sound, of sound alone, of pictures alone."""
        kinds: dict[frozenset[str], list[ShardPlan]] = {}
        for plan in plans:
            kinds.setdefault(plan.form.missing if plan.form else frozenset(), []).append(plan)
        for _, of_kind in sorted(kinds.items(), key=lambda kind: sorted(kind[0])):
            yield from self._clips(of_kind, fit_clips, left_out)

    def _clips(
        self, plans: list[ShardPlan], fit_clips: int, left_out: list[dict[str, Any]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Frames and sound of the training clips whose keys hash lowest: any order of files gives the same."""
        jobs = sorted(
            (job for plan in plans if plan.split == "train" for job in plan.jobs), key=lambda job: key_fraction(job.key)
        )
        count, total = 0, min(fit_clips, len(jobs))
        for job, read in self.readers.ordered(jobs, Reader.read, ahead=1):
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
        self.readers.end_others()
        worker = ShardWorker(self.encoder, num_workers if sum(map(len, plans)) > 1 else 0, self.readers.here)
        return self.launch(self.folder, units, worker, self.begins_at, partial(self.on_progress, "encode"))


def _said_once(
    stages: Mapping[str, Mapping[str, Any] | None], name: str, given: Any, unsaid: Any, stage: tuple[str, str]
) -> Any:
    """A setting of the encoding that a knob of a stage may say in its place.

    Raises:
        OviError: when both say it, and not the same.
    """
    for label, spec in stages.items():
        if spec is None or spec["name"] != stage[0]:
            continue
        value = spec.get("knobs", {}).get(stage[1])
        if value is not None and given not in (unsaid, value):
            raise OviError(f"{name}={given}, but stages.{label}.{stage[1]}={value}: set one")
        return given if value is None else value
    return given


def _chosen(
    stages: Mapping[str, Mapping[str, Any] | None],
    wiring: Mapping[str, Any],
    clips_per_file: int | None,
    variable_frame_rate: str,
    forms: Forms,
    incomplete: str,
) -> tuple[ChosenStages, str]:
    """The stages with ``windows`` among them, which makes clips of a form out of files: behind the last of level "file"
    unless the user put it somewhere; ``incomplete`` ahead of all and ``nearest_size`` behind those of level "file",
    where they are needed. Then how variable frame rates are taken, which both may say.

    Raises:
        OviError: when ``windows`` is told otherwise than the encoding.
    """
    specs = {label: dict(spec) for label, spec in stages.items() if spec is not None}
    said, names = forms.settings(), {spec["name"] for spec in specs.values()}
    if "windows" not in names:
        settings = {"max_clips": clips_per_file, "variable_frame_rate": variable_frame_rate}
        specs = _behind_files(specs, "windows", settings)
    if "sizes" in said and "nearest_size" not in names:
        specs = _behind_files(specs, "nearest_size", {"sizes": said["sizes"]})
    if incomplete != "reject" and "incomplete" not in names:
        specs = {"incomplete": {"name": "incomplete", "knobs": {"keep": incomplete}}, **specs}
    label = next(label for label, spec in specs.items() if spec["name"] == "windows")
    knobs = dict(specs[label].get("knobs", {}))
    if "lengths" in said:
        knobs["lengths"] = said["lengths"]
    if clips_per_file is not None and knobs.get("max_clips") not in (None, clips_per_file):
        raise OviError(f"clips_per_file={clips_per_file}, but stages.{label}.max_clips={knobs['max_clips']}: set one")
    knobs["max_clips"] = knobs.get("max_clips") if clips_per_file is None else clips_per_file
    if "resample" in (knobs.get("variable_frame_rate"), variable_frame_rate):
        knobs["variable_frame_rate"] = variable_frame_rate = "resample"
    specs[label] = {**specs[label], "knobs": knobs}
    return ChosenStages(specs, wiring), variable_frame_rate


def _behind_files(specs: Mapping[str, dict[str, Any]], name: str, knobs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages with one more behind the last of level "file"."""
    files = {label: spec for label, spec in specs.items() if level_of(spec["name"]) == "file"}
    others = {label: spec for label, spec in specs.items() if label not in files}
    return {**files, name: {"name": name, "knobs": knobs}, **others}


def _limits(stages: ChosenStages) -> dict[str, list[float]]:
    return limits_of(stages.of_level("file", "clip", "set"))


def _throughput(records: list[dict[str, Any]], before: Mapping[str, Any]) -> dict[str, Any]:
    """Clips per second of one process's time, over all processes that worked on the set, and where the time went.

    Args:
        records: of the shards.
        before: seconds and clips by step of what came before them.
    """
    seconds = sum(record["seconds"] for record in records)
    clips = sum(record["num_samples"] + len(record["rejected"]) for record in records)
    watch = Stopwatch()
    for times in (before, *(record.get("steps", {}) for record in records)):
        watch.add(times)
    return {
        "process_seconds": seconds,
        "clips_per_process_second": clips / seconds if seconds else 0.0,
        "steps": {name: {"seconds": of[0], "clips": int(of[1])} for name, of in watch.to_dict().items()},
    }


def _split(
    records: list[dict[str, Any]], plans: list[ShardPlan], split: str, shapes: Mapping[ClipFormat, Mapping[str, Any]]
) -> dict[str, Any]:
    """What the index says of a split; shards of the set's own length and size have no shapes of their own."""
    plan_of = {plan.file: plan for plan in plans if plan.split == split}
    shards = []
    for record in records:
        plan = plan_of.get(record["file"])
        if plan is None or not record["num_samples"]:
            continue
        shard = {name: record[name] for name in ("file", "num_samples", "num_bytes", "sha256")}
        if plan.form is not None:
            shard["latent_shapes"] = shapes[plan.form]
        shards.append(shard)
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
