"""Clips to shards: the second kind of work, after cutting."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, BinaryIO, cast

import webdataset as wds

from ovi.data.clip_encoder import ClipEncoder
from ovi.data.encode_folder import EncodeFolder
from ovi.data.encode_runs import Result, encoded
from ovi.data.plan import ClipJob, ShardPlan
from ovi.data.readers import CarefulReader, Reader
from ovi.data.rejection import Rejection, rejection_record
from ovi.data.stopwatch import Stopwatch, step


class ShardWorker:
    """Encodes clips and writes them to shards. Plain enough to be sent to another process.

    Args:
        encoder: of single clips.
        num_workers: processes that encode for this one; up to 1 stays in this one.
        reader: reads clips where this process does it alone; None is the encoder.
    """

    def __init__(self, encoder: ClipEncoder, num_workers: int = 0, reader: CarefulReader | None = None) -> None:
        self.encoder, self.num_workers, self.reader = encoder, num_workers, reader

    def to(self, device: str | None) -> None:
        """Encode there; None stays."""
        if device is not None:
            self.encoder.codecs.to(device)

    def __call__(
        self, folder: EncodeFolder, units: Iterable[tuple[str, ShardPlan]], on_one: Callable[[], None]
    ) -> Iterator[str]:
        """Do units and write their records; names each when it is done. The next may be taken before that."""
        ahead: deque[ShardPlan] = deque()

        def runs() -> Iterator[Sequence[ClipJob]]:
            for _, plan in units:
                # From here on the set is not whole, even if it once was.
                folder.not_whole()
                if self.reader is not None:
                    self.reader.look_around()
                ahead.append(plan)
                yield from self.encoder.runs(plan.jobs)

        def counted(results: Iterator[Result]) -> Iterator[Result]:
            for result in results:
                on_one()
                yield result

        read = None if self.reader is None else partial(self.reader, Reader.read)
        with encoded(self.encoder, runs(), self.num_workers, read) as results:
            for first in results:
                plan = ahead.popleft()
                folder.finish(plan.file, write_shard(folder, plan, counted(chain([first], results))))
                yield plan.file

    def release(self) -> None:
        """Hold on to no file that was fetched."""
        self.encoder.copies.release()
        if self.reader is not None:  # in another process it has copies of its own
            self.reader.reader.encoder.copies.release()


def write_shard(folder: EncodeFolder, plan: ShardPlan, results: Iterator[Result]) -> dict[str, Any]:
    """Write one shard of the results that come next; returns its record."""
    num_samples, rejected, began, watch = 0, [], time.monotonic(), Stopwatch()
    with folder.writing(plan.file) as file:
        hashed = _Hashed(file)
        with wds.TarWriter(cast(BinaryIO, hashed), encoder=False, mtime=0) as writer:
            for _ in plan.jobs:
                job, result, times = next(results)
                watch.add(times)
                if isinstance(result, Rejection):
                    rejected.append(rejection_record(job, result))
                else:
                    with watch.running(), step("write"):
                        writer.write({"__key__": job.key, **result})
                    num_samples += 1
    if not num_samples:
        folder.storage.remove(plan.file)
    return {
        "file": plan.file,
        "num_samples": num_samples,
        "num_bytes": hashed.num_bytes if num_samples else 0,
        "sha256": hashed.digest.hexdigest() if num_samples else "",
        "rejected": rejected,
        "seconds": time.monotonic() - began,
        "steps": watch.to_dict(),
    }


class _Hashed:
    """A file that is hashed and counted while it is written, from its start to its end."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.num_bytes += len(content)
        return self.file.write(content)


__all__ = ["ShardWorker", "write_shard"]
