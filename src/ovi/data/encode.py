"""Clips to latent shards, by any number of processes, resumable at any point.

The folder written holds ``train-000000.tar`` and so on, ``val-...``, ``rejected.jsonl`` and, last of all,
``index.json``: without it a set is not whole and will not be read. A hidden journal keeps what is finished: settings,
codec statistics, and one small record per unit of work. Units are groups of files to cut, and shards; each is claimed
by a process for as long as that lives, so processes may be added, killed and started again at any time.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ovi.codecs.bundle import Codecs
from ovi.data.at_work import AtWork
from ovi.data.clip_encoder import DTYPES, ClipEncoder
from ovi.data.encode_folder import FILES, EncodeFolder, Overwrite
from ovi.data.encode_index import index_content, splits_of, throughput_of
from ovi.data.encode_stages import chosen_stages, said_once
from ovi.data.encode_work import EncodeWork, Progress, nothing_left
from ovi.data.forms import Forms, Lengths
from ovi.data.index import INDEX, SPLITS
from ovi.data.launchers import Launcher
from ovi.data.launchers.local import Local
from ovi.data.local_copies import LocalCopies
from ovi.data.plan import ShardPlan, check_keys, plan_shards, source_digest
from ovi.data.readers import Readers, looking
from ovi.data.reading.remote import is_remote
from ovi.data.shares import PATIENCE_S
from ovi.data.sources import Source
from ovi.data.stages import nearest_size, windows  # noqa: F401  (registers stages that are put in here)
from ovi.data.stages.incomplete import KEEPS
from ovi.errors import OviError


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
    overwrite: Overwrite = False,
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
        overwrite: remove what an earlier run with other settings left in ``out``; files of other kinds stay. ``all``
            removes what an equal run left too: for files whose content changed, and failures that were passing.
        grow: take in files that have come to the source since ``out`` was begun: clips that are there keep their
            shards, and statistics stay; clips of new files get shards behind them.
        on_progress: called after every clip.

    Raises:
        OviError: for settings that do not fit, an empty source, a folder begun with other settings, a full disk, or
            when no training clip is left.
    """
    began = time.monotonic()
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
    sizes = said_once(stages, "sizes", sizes, None, ("nearest_size", "sizes"))
    lengths = said_once(stages, "lengths", lengths, None, ("windows", "lengths"))
    incomplete = said_once(stages, "incomplete", incomplete, "reject", ("incomplete", "keep"))
    if incomplete not in KEEPS:
        raise OviError(f"incomplete must be one of {', '.join(KEEPS)}, got {incomplete!r}")
    forms = Forms.of(codecs, num_frames, height, width, sizes=sizes, lengths=lengths)
    form = forms.form
    chosen, variable_frame_rate = chosen_stages(
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
        began_at = folder.now()
        generations = folder.begin(settings, codecs, items, overwrite=overwrite, grow=grow)
        work = EncodeWork(folder, launch, encoder, readers, on_progress, rank / world_size)
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
                splits = splits_of(records, plans, codecs)
                if not splits["train"]["num_samples"]:
                    folder.write_rejected(rejected)
                    raise nothing_left(rejected, splits["val"]["num_samples"], folder)
                counts = dict(Counter(rejection["reason"] for rejection in rejected))
                num_captioned = sum(bool(item.caption) for item in items)
                content = index_content(
                    settings,
                    codecs,
                    forms,
                    splits,
                    quantisation=quantisation,
                    source={**source.describe(), "num_files": len(items), "num_captioned": num_captioned},
                    rejected=counts,
                    stages=chosen,
                    throughput=throughput_of(records, work.watch.to_dict()),
                )
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
