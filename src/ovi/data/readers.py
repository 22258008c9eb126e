"""Files cut, clips looked at and clips read, one by one: in this process, or in several."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial, wraps
from itertools import chain
from types import TracebackType
from typing import Any, TypeVar

from ovi.data.at_work import AtWork
from ovi.data.clip_encoder import ClipEncoder
from ovi.data.local_copies import LocalCopies
from ovi.data.media import MediaError
from ovi.data.plan import ClipJob
from ovi.data.process_pool import Alone, Crash, ProcessPool, SingleProcess
from ovi.data.rejection import Rejection, crashed
from ovi.data.sources import SourceItem
from ovi.data.stages.base import Candidate, Rejected, SetStage, Stage, run_stages
from ovi.data.stages.chosen import ChosenStages
from ovi.data.stopwatch import Stopwatch, step
from ovi.errors import OviError

Task = TypeVar("Task")

_ALONE_S = 5.0
"""A process works this long by itself before it starts others: starting them takes about as long."""


def _with_steps(look: Callable[[Reader, Any], dict[str, Any]]) -> Callable[[Reader, Any], dict[str, Any]]:
    """A method whose result says how long each step of it took."""

    @wraps(look)
    def timed(reader: Reader, task: Any) -> dict[str, Any]:
        with Stopwatch().running() as watch:
            found = look(reader, task)
        return {**found, "steps": watch.to_dict()}

    return timed


class Reader:
    """Does what comes before encoding, for single files and clips. Built anew in another process, without codecs.

    Args:
        encoder: reads clips; its stages are run.
    """

    def __init__(self, encoder: ClipEncoder) -> None:
        self.encoder = encoder
        self._cutting: dict[str, Stage] | None = None
        self._looking: tuple[dict[str, Stage], dict[str, SetStage]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Reader, (self.encoder.only_reading(),)

    @_with_steps
    def cut(self, item: SourceItem) -> dict[str, Any]:
        """Run the stages of level "file" on a file: the clips found, and what was left out."""
        if self._cutting is None:
            self._cutting = self.encoder.stages.of_level("file")
        copies, clips, rejected = self.encoder.copies, [], list[Rejected]()
        with ExitStack() as stack:
            try:
                local = stack.enter_context(copies.of(item))
            except FileNotFoundError:
                rejected.append(_gone(Candidate.of(item), item))
            else:
                try:
                    for found in run_stages(self._cutting, [Candidate.of(local)], rejected.append):
                        clips.append(self._about(found, item))
                except (OviError, MemoryError):
                    raise
                except Exception as error:  # one odd file must not end the work on all others
                    rejected.append(_failed(Candidate.of(local), "cut", error))
        return {"clips": clips, "rejected": [said(one, copies, item) for one in rejected]}

    def _about(self, found: Candidate, item: SourceItem) -> dict[str, Any]:
        about: dict[str, Any] = {"key": found.key, "start_s": found.start_s}
        if found.crop is not None:
            about["crop"] = asdict(found.crop)
        if found.form is not None and found.form != self.encoder.form:
            about["form"] = asdict(found.form)
        if found.caption != item.caption:
            about["caption"] = found.caption
        if found.figures:
            about["figures"] = found.record()["figures"]
        return about

    @_with_steps
    def look(self, job: ClipJob) -> dict[str, Any]:
        """Have the stages of level "set" look at a clip, if those of level "clip" ahead of them let it pass.

        Returns:
            ``signatures`` by stage, of those that it has what they need for, and the ``figures`` that the stages ahead
            have added; or how it was ``rejected``; or nothing for a clip that a stage ahead rejects: that is told when
            its turn to be encoded comes, and a clip is no duplicate of one that will not be there.
        """
        if self._looking is None:
            self._looking = looking(self.encoder.stages)
        before, stages = self._looking
        with ExitStack() as stack:
            candidate = self.encoder.candidate(job)
            try:
                local = stack.enter_context(self.encoder.copies.of(job.item))
            except FileNotFoundError:
                return self._left_out(_gone(candidate, job.item), job.item)
            candidate = replace(candidate, path=local.path)
            try:
                found = next(run_stages(before, [candidate], lambda rejected: None), None)
                if found is None:
                    return {}
                signatures = {}
                for label, stage in stages.items():
                    if stage.needs & found.missing:
                        continue
                    try:
                        found = found.decoded()
                        assert found.clip is not None
                        with step(label):
                            signatures[label] = stage.look(found.clip)
                    except (MediaError, OSError) as error:
                        return self._left_out(stage.unreadable(found, error), job.item)
            except (OviError, MemoryError):
                raise
            except Exception as error:
                return self._left_out(_failed(candidate, "look", error), job.item)
        figures = found.record()["figures"]
        return {
            "signatures": signatures,
            "figures": {name: value for name, value in figures.items() if name not in job.figures},
        }

    def _left_out(self, rejected: Rejected, item: SourceItem) -> dict[str, Any]:
        return {"rejected": [said(rejected, self.encoder.copies, item)]}

    def read(self, job: ClipJob) -> Candidate | Rejection:
        """A clip's frames and sound, if all stages of level "clip" let it pass."""
        return self.encoder.read(job)


class CarefulReader:
    """A reader in this process, which another tries what some process was at when it ended. A context.

    A file that ends its process is thus left out when the same encoding is continued, instead of ending that too.

    Args:
        reader: does the work.
        at_work: what processes are at; None keeps no note, and tries nothing.
    """

    def __init__(self, reader: Reader, at_work: AtWork | None = None) -> None:
        self.reader, self.at_work = reader, at_work
        self._suspects: set[str] | None = None
        self._other: SingleProcess | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return CarefulReader, (self.reader, self.at_work)

    def __enter__(self) -> CarefulReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._other is not None:
            self._other.__exit__(kind, error, trace)
            self._other = None
        if self.at_work is not None:
            self.at_work.close()

    def look_around(self) -> None:
        """See what processes that have ended were at: with the first task, and asked for with every unit taken."""
        if self.at_work is not None:
            self._suspects = self.at_work.left_behind()

    def __call__(self, work: Callable[[Reader, Task], Any], task: Task) -> Any:
        """The result of a method of ``Reader`` on a file or clip."""
        if self.at_work is None:
            return work(self.reader, task)
        if self._suspects is None:
            self.look_around()
        key: str = task.key  # type: ignore[attr-defined]
        if key not in (self._suspects or ()):
            with self.at_work.on(key):
                return work(self.reader, task)
        self._other = self._other or SingleProcess(pickle.dumps(self.reader))
        try:
            return self._other(work, task)
        except Crash as error:
            assert isinstance(task, SourceItem | ClipJob)
            return _left(work, task, self._other, error)


class Readers:
    """A reader in this process and, once there is much to do, in several beside it. A context: they end with the block.

    Sent to another process it is a single reader there.

    Args:
        encoder: reads clips.
        num_workers: processes beside this one; up to 1 are none.
        at_work: what processes are at, so that a file which ends one is known to the next.
    """

    def __init__(self, encoder: ClipEncoder, num_workers: int = 0, at_work: AtWork | None = None) -> None:
        self.here, self.num_workers = CarefulReader(Reader(encoder), at_work), num_workers
        self._pool: ProcessPool | None = None
        self._alone_s = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        return Readers, (self.here.reader.encoder.only_reading(), 0, self.here.at_work)

    def __enter__(self) -> Readers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_others()
        self.here.__exit__(kind, error, trace)

    def end_others(self) -> None:
        """End the processes beside this one; more work starts them again."""
        if self._pool is not None:
            self._pool.__exit__(None, None, None)
            self._pool = None

    @property
    def copies(self) -> LocalCopies:
        """Of files that are elsewhere."""
        return self.here.reader.encoder.copies

    def ordered(
        self, tasks: Iterable[Task], work: Callable[[Reader, Task], Any], *, ahead: int
    ) -> Iterator[tuple[Task, Any]]:
        """Tasks and their results, in order whoever does them.

        Args:
            tasks: taken a few ahead of what is asked for.
            work: a method of ``Reader``.
            ahead: tasks given out to each process at a time.
        """
        waiting = iter(tasks)
        if self._pool is None:
            for task in waiting:
                if self.num_workers > 1 and self._alone_s >= _ALONE_S:
                    self._pool = ProcessPool(self.num_workers, self.here.reader)
                    waiting = chain([task], waiting)
                    break
                began = time.monotonic()
                result = self.here(work, task)
                self._alone_s += time.monotonic() - began
                yield task, result
        if self._pool is not None:
            yield from self._pool.ordered(waiting, work, ahead=ahead * self.num_workers, crashed=partial(_left, work))


def _left(work: Callable[[Reader, Any], Any], task: SourceItem | ClipJob, alone: Alone, error: Crash) -> Any:
    """The result of a file or clip that ended the process it was worked on in."""
    item, candidate = task, None
    if isinstance(task, ClipJob):
        item, candidate = task.item, Candidate(task.item.path, task.key, task.item.file, start_s=task.start_s)
    assert isinstance(item, SourceItem)
    rejection = crashed(item, error)
    if work is Reader.read:
        return rejection
    stage = "cut" if candidate is None else "look"
    record = Rejected(candidate or Candidate.of(item), stage, rejection.reason, rejection.message).record()
    return {"clips": [], "rejected": [record]}


def looking(stages: ChosenStages) -> tuple[dict[str, Stage], dict[str, SetStage]]:
    """The stages of level "clip" ahead of the first of level "set", and those of level "set".

    Raises:
        OviError: for a stage of level "set" that cannot be run in parts.
    """
    found: dict[str, SetStage] = {}
    for label, stage in stages.of_level("set").items():
        if not isinstance(stage, SetStage):
            raise OviError(f"stage {label}: {type(stage).__name__} is of level 'set' and must derive from SetStage")
        found[label] = stage
    return stages.of_level("clip", before="set"), found


def said(rejected: Rejected, copies: LocalCopies, item: SourceItem) -> dict[str, Any]:
    """A rejection's record that names the file, not its local copy."""
    record = rejected.record()
    return {**record, "message": copies.said(record["message"], item)}


def _gone(candidate: Candidate, item: SourceItem) -> Rejected:
    return Rejected(candidate, "fetch", "unreadable", f"{item.url or item.path}: is not there any more")


def _failed(candidate: Candidate, stage: str, error: Exception) -> Rejected:
    return Rejected(candidate, stage, "failed", f"{candidate.path}: a stage failed ({type(error).__name__}: {error})")


__all__ = ["CarefulReader", "Reader", "Readers", "looking", "said"]
