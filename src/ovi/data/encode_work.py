"""The steps of an encoding: cutting, looking, statistics and shards, each done here or waited for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ovi.data.clip_encoder import ClipEncoder
from ovi.data.cut import CutUnit, GroupWorker, LookUnit, cut_units, jobs_of, join_looked, look_units
from ovi.data.encode_folder import SET, STATISTICS, EncodeFolder, load_statistics
from ovi.data.index import REJECTED
from ovi.data.launchers import Launcher
from ovi.data.plan import ClipJob, ShardPlan, key_fraction
from ovi.data.quantise import CHANNEL_AXIS, dequantise, quantise
from ovi.data.readers import Reader, Readers, looking
from ovi.data.rejection import Rejection, rejection_record
from ovi.data.shard_worker import ShardWorker
from ovi.data.sources import SourceItem
from ovi.data.stopwatch import Stopwatch
from ovi.errors import OviError

Progress = Callable[[str, int, int], None]
"""Called with the stage ("cut", "look", "fit" or "encode"), files or clips done, and in all."""


class EncodeWork:
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
            raise nothing_left(left_out, num_val, self.folder)
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


def nothing_left(rejected: list[dict[str, Any]], num_val: int, folder: EncodeFolder) -> OviError:
    """The error when no training clip is left, with the reasons and what may help.

    Args:
        rejected: what was left out, as the list of it has it.
        num_val: clips that went to validation.
        folder: where that list lies.
    """
    if not rejected:
        return OviError("no clip is left for training: lower val_fraction or add files")
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(r["reason"] for r in rejected).most_common())
    return OviError(
        f"no clip is left for training: {len(rejected)} rejected ({reasons}). The first: {rejected[0]['message']} "
        f"All are listed in {folder.where(REJECTED)}."
        + (f" {num_val} went to validation: with so few files set val_fraction=0" if num_val else "")
    )
