"""One clip to the bytes of its sample, in this process or in several."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from safetensors.torch import save

from ovi.codecs.bundle import Codecs
from ovi.data.media import Clip, MediaError, VariableFrameRate, read_clip
from ovi.data.plan import ClipJob
from ovi.data.sources import ClipFormat
from ovi.errors import OviError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Rejection:
    """Why a clip was left out: a short code to count by, and the message."""

    reason: str
    message: str


class ClipEncoder:
    """Reads and encodes single clips.

    Args:
        codecs: what encodes them.
        form: length, size and rates of a clip.
        dtype: name of the type that tensors are stored in.
        variable_frame_rate: "reject" or "resample".
    """

    def __init__(self, codecs: Codecs, form: ClipFormat, dtype: str, variable_frame_rate: str) -> None:
        self.codecs, self.form, self.dtype, self.variable_frame_rate = codecs, form, dtype, variable_frame_rate

    def read(self, job: ClipJob) -> Clip | Rejection:
        """The job's frames and sound."""
        try:
            return read_clip(
                job.item.path,
                start_s=job.start_s,
                variable_frame_rate=cast(VariableFrameRate, self.variable_frame_rate),
                **asdict(self.form),
            )
        except MediaError as error:
            return Rejection(error.reason, str(error))
        except OSError as error:
            return Rejection("unreadable", f"{job.item.path}: {error.strerror or error}")

    def encode(self, job: ClipJob) -> dict[str, bytes] | Rejection:
        """The job's sample: a safetensors file of its latents and text, and a json file of what is known about it."""
        clip = self.read(job)
        if isinstance(clip, Rejection):
            return clip
        video, audio = self.codecs.encode_clip(torch.from_numpy(clip.frames), torch.from_numpy(clip.waveform))
        text = self.codecs.text.encode([job.item.caption])[0]
        tensors = {
            name: tensor.to("cpu", DTYPES[self.dtype]).contiguous()
            for name, tensor in (("video", video), ("audio", audio), ("text", text))
        }
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if broken:
            return Rejection(
                "not_finite",
                f"{job.item.path}: {', '.join(broken)} latents exceed {self.dtype}: raise fit_clips or dtype",
            )
        about = {
            **job.item.extra,
            "caption": job.item.caption,
            "file": job.item.file,
            "start_s": job.start_s,
            "duration_s": self.form.duration_s,
        }
        return {"safetensors": save(tensors), "json": json.dumps(about, ensure_ascii=False).encode()}


Result = tuple[ClipJob, dict[str, bytes] | Rejection]


@contextmanager
def encoded(encoder: ClipEncoder, jobs: Sequence[ClipJob], num_workers: int) -> Iterator[Iterator[Result]]:
    """The jobs' samples in the jobs' order, made by ``num_workers`` processes; up to 1 stays in this process.

    Raises:
        OviError: from the iterator, when a process is killed.
    """
    if num_workers <= 1 or len(jobs) <= 1:
        yield ((job, encoder.encode(job)) for job in jobs)
        return
    pool = ProcessPoolExecutor(
        num_workers,
        # Never fork: torch and FFmpeg have threads by now, and a lock held by one of them stays locked in the child.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(encoder.codecs.to_dict(), encoder.form, encoder.dtype, encoder.variable_frame_rate),
    )
    try:
        yield _ordered(pool, jobs, ahead=4 * num_workers)
    finally:
        pool.shutdown(cancel_futures=True)


def _ordered(pool: ProcessPoolExecutor, jobs: Sequence[ClipJob], ahead: int) -> Iterator[Result]:
    """Results in order, never more than ``ahead`` waiting: memory does not grow with the set."""
    waiting: deque[tuple[ClipJob, Future[Any]]] = deque()
    coming = iter(jobs)
    try:
        for job in coming:
            waiting.append((job, pool.submit(_encode_in_worker, job)))
            if len(waiting) >= ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise OviError(
            "an encoding process was killed, most likely for want of memory: lower num_workers, then run the same "
            "command again to continue"
        ) from error


_encoder: ClipEncoder | None = None
"""The one encoder of a worker process."""


def _start_worker(codecs: dict[str, Any], form: ClipFormat, dtype: str, variable_frame_rate: str) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us; a traceback from each would bury its message
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _encoder = ClipEncoder(Codecs.from_dict(codecs), form, dtype, variable_frame_rate)


def _end_with_parent() -> None:
    """A pool's workers outlive a parent that is killed: they hold both ends of the pipe they wait at."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(job: ClipJob) -> dict[str, bytes] | Rejection:
    assert _encoder is not None
    return _encoder.encode(job)
