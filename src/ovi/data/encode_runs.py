"""Runs of clips to samples, in this process or in several, in the order of the runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

from ovi.data.clip_encoder import ClipEncoder, Read, Sample
from ovi.data.plan import ClipJob
from ovi.data.process_pool import Alone, Crash, ProcessPool
from ovi.data.rejection import Rejection, crashed
from ovi.data.stages.base import Candidate
from ovi.data.stopwatch import Stopwatch

Times = dict[str, list[float]]
"""[seconds, clips] by step."""
Result = tuple[ClipJob, Sample | Rejection, Times]
"""A job, what came of it, and the time since the result before, by step."""


@contextmanager
def encoded(
    encoder: ClipEncoder, runs: Iterable[Sequence[ClipJob]], num_workers: int, read: Read | None = None
) -> Iterator[Iterator[Result]]:
    """The jobs' samples in the jobs' order, made by ``num_workers`` processes; up to 1 stays in this process.

    With codecs on an accelerator the processes read and filter, and this one encodes. A job that ends its process,
    twice, is rejected as "crashed".

    Args:
        encoder: does the work.
        runs: of jobs, as ``ClipEncoder.runs`` gives them; taken a few ahead of what is asked for.
        num_workers: processes beside this one.
        read: reads clips where this process does it alone; None is the encoder's own.

    Raises:
        OviError: from the iterator, when processes cannot start, or are killed again and again.
    """
    if num_workers <= 1:
        yield (one for run in runs for one in _each(run, *_encode_run(encoder, run, read)))
        return
    if encoder.codecs.video.mean.device.type == "cpu":
        with ProcessPool(num_workers, encoder) as pool:
            # A run of batches has as many clips as several processes would have ahead one by one.
            ahead = 4 * num_workers if encoder.batch_size == 1 else num_workers + 1
            results = pool.ordered(runs, _encode_run, ahead=ahead, crashed=_encode_the_others)
            yield (one for run, made in results for one in _each(run, *made))
        return
    with ProcessPool(num_workers, encoder.only_reading()) as pool:
        yield _encoded_here(encoder, pool, runs)


def _encoded_here(encoder: ClipEncoder, pool: ProcessPool, runs: Iterable[Sequence[ClipJob]]) -> Iterator[Result]:
    """Clips read by other processes, encoded in this one."""
    ahead: deque[Sequence[ClipJob]] = deque()

    def jobs() -> Iterator[ClipJob]:
        for run in runs:
            ahead.append(run)
            yield from run

    # A clip that was read is hundreds of times the size of its latents.
    results = pool.ordered(jobs(), _read, ahead=pool.num_workers + 2, crashed=_not_read)
    for first in results:
        run, watch, coming = ahead.popleft(), Stopwatch(), chain([first], results)

        def read(job: ClipJob, coming: Iterator[Any] = coming, watch: Stopwatch = watch) -> Candidate | Rejection:
            found, times = next(coming)[1]
            watch.add(times)
            return cast(Candidate | Rejection, found)

        with watch.running():
            made = encoder.encode_run(run, read)
        yield from _each(run, made, watch.to_dict())


def _each(run: Sequence[ClipJob], made: Sequence[Sample | Rejection], times: Times) -> Iterator[Result]:
    """A run's results one by one; its time goes with the first."""
    for place, (job, result) in enumerate(zip(run, made)):
        yield job, result, {} if place else times


def _encode_run(
    encoder: ClipEncoder, run: Sequence[ClipJob], read: Read | None = None
) -> tuple[list[Sample | Rejection], Times]:
    with Stopwatch().running() as watch:
        made = encoder.encode_run(run, read)
    return made, watch.to_dict()


def _read(encoder: ClipEncoder, job: ClipJob) -> tuple[Candidate | Rejection, Times]:
    with Stopwatch().running() as watch:
        found = encoder.read(job)
    return found, watch.to_dict()


def _only_read(encoder: ClipEncoder, job: ClipJob) -> None:
    encoder.read(job)


def _not_read(job: ClipJob, alone: Alone, error: Crash) -> tuple[Rejection, Times]:
    return crashed(job.item, error), {}


def _encode_the_others(run: Sequence[ClipJob], alone: Alone, error: Crash) -> tuple[list[Sample | Rejection], Times]:
    """The results of a run that ends its process: those at fault are left out, and the others batched without them."""
    if len(run) == 1:
        return [crashed(run[0].item, error)], {}
    left_out: dict[str, Sample | Rejection] = {}
    for job in run:
        try:
            alone(_only_read, job)
        except Crash as found:
            left_out[job.key] = crashed(job.item, found)
    rest = [job for job in run if job.key not in left_out]
    try:
        if not left_out:
            raise error
        made, times = alone(_encode_run, rest)
    except Crash:
        # It is the codecs that some clip ends the process in.
        watch, made = Stopwatch(), []
        for job in rest:
            try:
                one, times = alone(_encode_run, [job])
                watch.add(times)
            except Crash as found:
                one = [crashed(job.item, found)]
            made += one
        times = watch.to_dict()
    results = {**left_out, **{job.key: result for job, result in zip(rest, made)}}
    return [results[job.key] for job in run], times
