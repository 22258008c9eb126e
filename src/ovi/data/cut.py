"""Files to clips, in groups of files that one process works on: the stages that look at whole files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from ovi.data.clip_encoder import ClipEncoder
from ovi.data.encode_folder import EncodeFolder
from ovi.data.local_copies import LocalCopies
from ovi.data.media import Crop
from ovi.data.plan import ClipJob
from ovi.data.sources import SourceItem
from ovi.data.stages.base import Candidate, Rejected, Stage, run_stages
from ovi.data.stages.chosen import ChosenStages
from ovi.errors import OviError

GROUP = 16
"""Files of one unit of work: finding the shots of a film takes minutes, probing a clip milliseconds."""


@dataclass(frozen=True)
class CutUnit:
    """A group of files."""

    items: Sequence[SourceItem]

    def __len__(self) -> int:
        return len(self.items)

    def run(self, stages: Mapping[str, Stage], copies: LocalCopies, on_one: Callable[[], None]) -> dict[str, Any]:
        """The group's record: clips by the position of their file, and what was left out.

        Args:
            stages: those of level "file".
            copies: of files that are elsewhere.
            on_one: called after each file.
        """
        clips: list[dict[str, Any]] = []
        rejections: list[dict[str, Any]] = []
        began = time.monotonic()
        for place, item in enumerate(self.items):
            rejected: list[Rejected] = []
            with ExitStack() as stack:
                try:
                    local = stack.enter_context(copies.of(item))
                except FileNotFoundError:
                    rejected.append(gone(Candidate.of(item), item))
                else:
                    try:
                        for found in run_stages(stages, [Candidate.of(local)], rejected.append):
                            clips.append({"item": place, **_to_json(found, item)})
                    except (OviError, MemoryError):
                        raise
                    except Exception as error:  # one odd file must not end the work on all others
                        message = f"{local.path}: a stage failed ({type(error).__name__}: {error})"
                        rejected.append(Rejected(Candidate.of(local), "cut", "failed", message))
            rejections += [said(one.record(), copies, item) for one in rejected]
            on_one()
        return {"clips": clips, "rejected": rejections, "seconds": time.monotonic() - began}


class CutWorker:
    """Runs the stages of level "file" over groups of files. Plain enough to be sent to another process.

    Args:
        stages: as chosen.
        copies: of files that are elsewhere.
    """

    def __init__(self, stages: ChosenStages, copies: LocalCopies) -> None:
        self.stages, self.copies = stages, copies
        self._built: dict[str, Stage] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return CutWorker, (self.stages, self.copies)

    def to(self, device: str | None) -> None:
        """Stages run where they were built."""

    def __call__(
        self, folder: EncodeFolder, units: Iterable[tuple[str, CutUnit]], on_one: Callable[[], None]
    ) -> Iterator[str]:
        """Do units and write their records; names each when it is done."""
        for name, unit in units:
            if self._built is None:
                self._built = self.stages.of_level("file")
            folder.finish(name, unit.run(self._built, self.copies, on_one))
            yield name

    def close(self) -> None:
        """Remove what was fetched."""
        self.copies.close()


def cut_units(items: Sequence[SourceItem]) -> dict[str, CutUnit]:
    """Groups of files by the name of their record."""
    return {f"cut-{n:06d}": CutUnit(items[at : at + GROUP]) for n, at in enumerate(range(0, len(items), GROUP))}


def jobs_of(items: Sequence[SourceItem], records: Iterable[Mapping[str, Any]]) -> Iterator[ClipJob]:
    """The clips of all groups, in the order of the files."""
    for number, record in enumerate(records):
        for clip in record["clips"]:
            crop = clip.get("crop")
            item = items[number * GROUP + clip["item"]]
            yield ClipJob(
                clip["key"],
                item,
                clip["start_s"],
                clip.get("caption", item.caption),
                Crop(**crop) if crop else None,
                {k: float("nan") if v is None else v for k, v in clip.get("figures", {}).items()},
            )


def run_over_set(
    encoder: ClipEncoder, jobs: Sequence[ClipJob], before: Mapping[str, Stage], stages: Mapping[str, Stage]
) -> dict[str, Any]:
    """Run stages of level "set" over all clips: a record of the keys left out, and why.

    Clips that the stages of level "clip" ahead of them reject are passed over, and told when their turn to be encoded
    comes: a clip is no duplicate of one that will not be there.

    A file that is elsewhere is there from when its candidate is taken until the next one is.
    """
    rejected: list[Rejected] = []
    items = {job.key: job.item for job in jobs}

    def candidates() -> Iterator[Candidate]:
        for job in jobs:
            with ExitStack() as stack:
                try:
                    local = stack.enter_context(encoder.copies.of(job.item))
                except FileNotFoundError:
                    rejected.append(gone(encoder.candidate(job), job.item))
                    continue
                candidate = replace(encoder.candidate(job), path=local.path)
                yield from run_stages(before, [candidate], lambda rejected: None)

    for _ in run_stages(stages, candidates(), rejected.append):
        pass
    return {
        "left_out": [one.candidate.key for one in rejected],
        "rejected": [said(one.record(), encoder.copies, items[one.candidate.key]) for one in rejected],
    }


def gone(candidate: Candidate, item: SourceItem) -> Rejected:
    """The rejection of a file that is no longer where it was listed."""
    return Rejected(candidate, "fetch", "unreadable", f"{item.url or item.path}: is not there any more")


def said(record: dict[str, Any], copies: LocalCopies, item: SourceItem) -> dict[str, Any]:
    """A rejection's record that names the file, not its local copy."""
    return {**record, "message": copies.said(record["message"], item)}


def _to_json(found: Candidate, item: SourceItem) -> dict[str, Any]:
    about: dict[str, Any] = {"key": found.key, "start_s": found.start_s}
    if found.crop is not None:
        about["crop"] = asdict(found.crop)
    if found.caption != item.caption:
        about["caption"] = found.caption
    if found.figures:
        about["figures"] = found.record()["figures"]
    return about
