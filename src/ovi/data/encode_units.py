"""Units of work in a folder that any number of processes share: whose each is, and what came of those that are done."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from ovi.data.claims import Claims
from ovi.data.files import json_bytes
from ovi.data.index import JOURNAL
from ovi.data.reading.remote import join
from ovi.data.shares import PATIENCE_S, Shares
from ovi.data.storage import LocalStorage, storage_of
from ovi.data.waiting import pause

_LOCK = "lock"
_AT_A_TIME = 256
"""Records read together: on the way from an object store they then wait for each other but once."""


class Units:
    """The units of a folder.

    A hidden journal holds one small record for each that is finished. Whoever holds the claim on a unit works on it; a
    record says it is done. Behind a URL nothing can be claimed: units are dealt to processes by rank (``Shares``). As a
    context it takes part in that; without, it only reads and writes.

    Args:
        location: the folder, or its URL; made where it is not there.
        rank, world_size: of this process, for a URL.
        patience_s: for a URL: seconds without any progress after which units of other ranks are taken.
        scratch: for a URL: folder of this machine for what is uploaded; None takes the system's for temporary files.

    Raises:
        OviError: when it cannot be written.
    """

    def __init__(
        self,
        location: str | Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        patience_s: float = PATIENCE_S,
        scratch: str | None = None,
    ) -> None:
        self.location, self.rank, self.world_size = str(location), rank, world_size
        self.patience_s, self.scratch = patience_s, scratch
        self.storage = storage_of(location, scratch=scratch)
        self.local = Path(location) if isinstance(self.storage, LocalStorage) else None

    def __enter__(self) -> Self:
        self.storage.make(JOURNAL)
        self.claims: Claims | Shares
        if self.local is not None:
            self.claims = Claims(self.local / JOURNAL / _LOCK)
        else:
            self.claims = Shares(self.rank, self.world_size, patience_s=self.patience_s)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.claims.close()

    def where(self, name: str) -> str:
        """Location of a file, for messages."""
        return join(self.location, name)

    def record(self, unit: str) -> dict[str, Any] | None:
        """What was written when a unit was finished; None before that."""
        return self.records([unit])[0]

    def records(self, units: Sequence[str]) -> list[dict[str, Any] | None]:
        """The records of many units."""
        return [parsed_record(content) for content in self.storage.read_all([record_name(unit) for unit in units])]

    def stream(self, units: Sequence[str]) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """Names and records of many units, never more than some of them in memory."""
        for at in range(0, len(units), _AT_A_TIME):
            names = units[at : at + _AT_A_TIME]
            yield from zip(names, self.records(names))

    def finished(self) -> set[str]:
        """Names of all units that have a record."""
        found = {name.removesuffix(".json") for name in self.storage.names(JOURNAL) if name.endswith(".json")}
        if isinstance(self.claims, Shares):
            self.claims.saw(len(found))
        return found

    def finish(self, unit: str, record: dict[str, Any]) -> None:
        """Write the record of a finished unit."""
        if self.local is not None and record.get("sha256"):
            # As long as this stays, nobody has written to the shard since.
            record = {**record, "mtime_ns": (self.local / unit).stat().st_mtime_ns}
        self.storage.write(record_name(unit), record_bytes(record))

    def forget(self, unit: str) -> None:
        """Have a unit done again."""
        self.storage.remove(record_name(unit))

    def once(self, unit: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of a unit that one process makes while the others wait for it."""
        since = time.monotonic()
        while (record := self.record(unit)) is None:
            if self.claims.take(unit):
                try:
                    if self.record(unit) is None:
                        self.finish(unit, make())
                finally:
                    self.claims.give_back(unit)
            else:
                pause(since, self.storage.poll_s)
                if self.local is None:
                    self.finished()
        return record

    def writing(self, file: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """Open a shard for writing; it appears when the block ends without an error."""
        return self.storage.writing(file)

    def now(self) -> float:
        """The time by the clock that files here are stamped with, which is a server's where machines share a folder."""
        if self.local is None:
            return time.time()
        with tempfile.TemporaryFile(dir=self.local / JOURNAL) as file:
            return os.fstat(file.fileno()).st_mtime


def record_name(unit: str) -> str:
    return f"{JOURNAL}/{unit}.json"


def record_bytes(content: Any) -> bytes:
    return json_bytes(content, indent=1, allow_nan=False) + b"\n"


def parsed_record(content: bytes | None) -> dict[str, Any] | None:
    """A record; half an upload is none."""
    try:
        found: dict[str, Any] | None = None if content is None else json.loads(content)
    except ValueError:
        return None
    return found


__all__ = ["Units", "parsed_record", "record_bytes", "record_name"]
