"""Work on groups of files, or of clips, before anything is encoded: each group is a unit with a record of its own.

First files are cut into clips. Then, where stages compare all clips, each is looked at, and what was seen is joined.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, TypeVar

from ovi.data.clip_encoder import ClipEncoder
from ovi.data.encode_folder import EncodeFolder
from ovi.data.media import Crop
from ovi.data.plan import ClipJob
from ovi.data.readers import Reader, Readers, looking, said
from ovi.data.sources import ClipFormat, SourceItem
from ovi.data.stopwatch import Stopwatch

Task = TypeVar("Task")

GROUP = 16
"""Files of one unit of work: finding the shots of a film takes minutes, probing a clip milliseconds."""
LOOK_GROUP = 128
"""Clips of one: looking takes less than a second each, and every unit leaves a small file."""


@dataclass(frozen=True)
class CutUnit:
    """A group of files."""

    items: Sequence[SourceItem]

    work = staticmethod(Reader.cut)

    def __len__(self) -> int:
        return len(self.items)

    @staticmethod
    def record(found: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Clips by the position of their file, and what was left out."""
        clips: list[dict[str, Any]] = []
        rejections: list[dict[str, Any]] = []
        watch = Stopwatch()
        for place, file in enumerate(found):
            clips += [{"item": place, **clip} for clip in file["clips"]]
            rejections += file["rejected"]
            watch.add(file.get("steps", {}))
        return {"clips": clips, "rejected": rejections, "steps": watch.to_dict()}


@dataclass(frozen=True)
class LookUnit:
    """A group of clips."""

    items: Sequence[ClipJob]

    work = staticmethod(Reader.look)

    def __len__(self) -> int:
        return len(self.items)

    @staticmethod
    def record(found: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """What was seen of each clip, and what was left out."""
        looked, watch = list(found), Stopwatch()
        for one in looked:
            watch.add(one.get("steps", {}))
        return {
            "steps": watch.to_dict(),
            "looked": [{name: one[name] for name in ("signatures", "figures") if one.get(name)} for one in looked],
            "rejected": [rejection for one in looked for rejection in one.get("rejected", ())],
        }


class GroupWorker:
    """Does units of files to cut, or of clips to look at. Plain enough to be sent to another process.

    Args:
        readers: do the work.
    """

    def __init__(self, readers: Readers) -> None:
        self.readers = readers

    def to(self, device: str | None) -> None:
        """Stages run where they were built."""

    def __call__(
        self, folder: EncodeFolder, units: Iterable[tuple[str, CutUnit | LookUnit]], on_one: Callable[[], None]
    ) -> Iterator[str]:
        """Do units of one kind and write their records; names each when it is done. The next may be taken before."""
        units = iter(units)
        first = next(units, None)
        if first is None:
            return
        ahead: deque[tuple[str, CutUnit | LookUnit]] = deque()

        def items() -> Iterator[Any]:
            for name, unit in chain([first], units):
                self.readers.here.look_around()
                ahead.append((name, unit))
                yield from unit.items

        def counted(results: Iterator[tuple[Any, Any]]) -> Iterator[Any]:
            for _, result in results:
                on_one()
                yield result

        results = counted(self.readers.ordered(items(), first[1].work, ahead=2))
        for result in results:
            name, unit = ahead.popleft()
            folder.finish(name, unit.record(chain([result], islice(results, len(unit) - 1))))
            yield name

    def release(self) -> None:
        """Hold on to no file that was fetched."""
        self.readers.copies.release()


def cut_units(generations: Iterable[Sequence[SourceItem]]) -> dict[str, CutUnit]:
    """Groups of files by the name of their record; those of files added later have names of their own."""
    return {name: CutUnit(group) for name, group in _groups("cut", generations, GROUP)}


def look_units(generations: Iterable[Sequence[ClipJob]]) -> dict[str, LookUnit]:
    """Groups of clips by the name of their record."""
    return {name: LookUnit(group) for name, group in _groups("look", generations, LOOK_GROUP)}


def _groups(stage: str, generations: Iterable[Sequence[Task]], most: int) -> Iterator[tuple[str, Sequence[Task]]]:
    for generation, tasks in enumerate(generations):
        prefix = f"{stage}-{generation}" if generation else stage
        for number, at in enumerate(range(0, len(tasks), most)):
            yield f"{prefix}-{number:06d}", tasks[at : at + most]


def jobs_of(units: Iterable[CutUnit], records: Iterable[Mapping[str, Any]]) -> Iterator[ClipJob]:
    """The clips of all groups, in the order of the files."""
    forms: dict[tuple[Any, ...], ClipFormat] = {}
    for unit, record in zip(units, records):
        for clip in record["clips"]:
            crop, form = clip.get("crop"), clip.get("form")
            item = unit.items[clip["item"]]
            figures = clip.get("figures", {})
            yield ClipJob(
                clip["key"],
                item,
                clip["start_s"],
                clip.get("caption", item.caption),
                Crop(**crop) if crop else None,
                # A million of them share their names.
                {sys.intern(name): float("nan") if v is None else v for name, v in figures.items()},
                forms.setdefault(tuple(form.values()), ClipFormat(**form)) if form else None,
            )


def join_looked(
    encoder: ClipEncoder, generations: Sequence[Sequence[ClipJob]], records: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Have the stages of level "set" compare what was seen of all clips: a record of the keys left out, and why.

    Args:
        encoder: has the stages.
        generations: all clips; those of files added later stand behind.
        records: of the units that they were looked at in, in order.
    """
    jobs = [job for of in generations for job in of]
    places = [(generation, job.key) for generation, of in enumerate(generations) for job in of]
    copies = encoder.copies
    _, stages = looking(encoder.stages)
    signatures: dict[str, dict[int, Any]] = {label: {} for label in stages}
    figures: dict[int, Mapping[str, Any]] = {}
    rejections: list[dict[str, Any]] = []
    watch = Stopwatch()
    seen = chain.from_iterable(_looked(record, rejections, watch) for record in records)
    for number, one in enumerate(seen):
        for label, signature in one.get("signatures", {}).items():
            signatures[label][number] = signature
        if one.get("figures"):
            figures[number] = one["figures"]
    left_out = [rejection["key"] for rejection in rejections]
    gone: set[int] = set()
    for label, stage in stages.items():
        mine = signatures.pop(label)
        numbers = sorted(mine.keys() - gone, key=places.__getitem__)
        verdicts = stage.join([jobs[number].key for number in numbers], (mine[number] for number in numbers))
        for verdict in verdicts:
            number = numbers[verdict.place]
            job = jobs[number]
            candidate = replace(encoder.candidate(job), path=copies.path(job.item))
            known = {name: float("nan") if v is None else v for name, v in figures.get(number, {}).items()}
            rejected = stage.left_out(candidate.with_figures(known), verdict)
            rejections.append(said(rejected, copies, job.item))
            left_out.append(job.key)
            gone.add(number)
    return {"left_out": left_out, "rejected": rejections, "steps": watch.to_dict()}


def _looked(
    record: Mapping[str, Any], rejections: list[dict[str, Any]], watch: Stopwatch
) -> Sequence[Mapping[str, Any]]:
    rejections += record["rejected"]
    watch.add(record.get("steps", {}))
    looked: Sequence[Mapping[str, Any]] = record["looked"]
    return looked


__all__ = ["CutUnit", "GroupWorker", "LookUnit", "cut_units", "jobs_of", "join_looked", "look_units"]
