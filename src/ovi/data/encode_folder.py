"""The folder that ``encode`` writes to: what has begun there, what is finished, and who works on what."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ovi.codecs.bundle import Codecs
from ovi.data.claims import Claims
from ovi.data.files import PARTIAL, json_bytes, sha256
from ovi.data.index import INDEX, JOURNAL, REJECTED, SPLITS
from ovi.data.plan import ShardPlan
from ovi.data.reading.remote import join
from ovi.data.shares import Shares
from ovi.data.storage import LocalStorage, storage_of
from ovi.errors import OviError

_LOCK, _ALIVE, _BEGUN = "lock", "alive", "begun"
STATISTICS = "statistics"
"""Unit whose record is the codecs' statistics."""


class EncodeFolder:
    """A folder of shards in the making, shared by any number of processes with the same settings.

    A hidden journal holds the settings (``begun.json``), and one small record for each finished unit of work. Whoever
    holds the claim on a unit works on it; a record says it is done. Behind a URL nothing can be claimed: units are
    dealt to processes by rank (``Shares``). As a context it takes part in that; without, it only reads and writes.

    Args:
        location: the folder, or its URL; made where it is not there.
        rank, world_size: of this process, for a URL.

    Raises:
        OviError: when it cannot be written.
    """

    def __init__(self, location: str | Path, *, rank: int = 0, world_size: int = 1) -> None:
        self.location, self.rank, self.world_size = str(location), rank, world_size
        self.storage = storage_of(location)
        self.local = Path(location) if isinstance(self.storage, LocalStorage) else None

    def __enter__(self) -> EncodeFolder:
        self.storage.make(JOURNAL)
        self.claims: Claims | Shares
        if self.local is not None:
            self.claims = Claims(self.local / JOURNAL / _LOCK)
        else:
            self.claims = Shares(self.rank, self.world_size)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.claims.close()

    def where(self, name: str) -> str:
        """Location of a file, for messages."""
        return join(self.location, name)

    # --- settings -------------------------------------------------------------------------------------------------

    def begin(self, settings: dict[str, Any], codecs: Codecs, *, overwrite: bool) -> None:
        """Join what was begun with the same settings; refuse any other.

        Args:
            settings: JSON-ready; everything that decides the shards.
            codecs: take the statistics that an earlier process has found.
            overwrite: remove what other settings have left here, unless a process still works on it.

        Raises:
            OviError: when the folder holds shards of other settings, or of unknown ones.
        """
        with self.claims.waiting_for("begin"):
            differences = self._differences(settings, codecs)
            if overwrite and differences != []:
                if self.local is None and self.rank:
                    self._wait_for_first(settings, codecs)
                else:
                    self._remove_all()
                differences = self._differences(settings, codecs)
            if differences is None:
                found = sorted(self._products())
                if found:
                    raise OviError(
                        f"{self.location} holds {found[0]} of an unknown run: choose another folder, or replace it "
                        f"with overwrite=true"
                    )
                self.finish(_BEGUN, {"settings": settings})
            elif differences:
                raise OviError(
                    f"{self.location} was begun with other settings: {'; '.join(differences)}. "
                    f"Choose another folder, or replace what is there with overwrite=true"
                )
            self._note_alive()
            if codecs.fitted and self.record(STATISTICS) is None:
                self.finish(STATISTICS, codecs.to_dict()["state"])
        state = self.record(STATISTICS)
        if state is not None:
            load_statistics(codecs, state)

    def _differences(self, settings: dict[str, Any], codecs: Codecs) -> list[str] | None:
        """What differs from the run the folder was begun with; None when it was not begun."""
        record = self.record(_BEGUN)
        if record is None:
            return None
        begun, mine = record["settings"], json.loads(json.dumps(settings))
        different = [
            f"{name} was {_short(begun.get(name))}, now {_short(mine.get(name))}"
            for name in dict.fromkeys([*begun, *mine])
            if begun.get(name) != mine.get(name)
        ]
        kept = self.record(STATISTICS)
        if codecs.fitted and kept is not None and codecs.to_dict()["state"] != kept:
            different.append("the codecs carry other statistics")
        return different

    def _wait_for_first(self, settings: dict[str, Any], codecs: Codecs) -> None:
        """Two that replace what is behind a URL would remove each other's work: the first rank does it."""
        assert isinstance(self.claims, Shares)
        until = time.monotonic() + self.claims.patience_s
        while self._differences(settings, codecs) != []:
            if time.monotonic() > until:
                raise OviError(f"{self.location}: rank 0, which replaces what is there, has not begun; start it too")
            time.sleep(self.storage.poll_s)

    def _note_alive(self) -> None:
        """Hold a claim of this process's own, so that others see that somebody works here."""
        if self.local is not None:
            unit = f"{_ALIVE} {os.uname().nodename} {os.getpid()}"
            self.finish(self._alive, {"unit": unit})
            self.claims.take(unit)

    @property
    def _alive(self) -> str:
        return f"{_ALIVE}-{os.uname().nodename}-{os.getpid()}"

    def leave(self) -> None:
        """Say that this process has stopped working here."""
        if self.local is not None:
            self.forget(self._alive)

    def _remove_all(self) -> None:
        journal = self.storage.names(JOURNAL)
        for note in (name.removesuffix(".json") for name in journal if name.startswith(f"{_ALIVE}-")):
            unit = (self.record(note) or {}).get("unit", "")
            if not self.claims.take(unit):
                raise OviError(
                    f"{self.location}: {unit.removeprefix(_ALIVE).strip()} is encoding into it with other settings: "
                    f"end that process before overwrite=true, or choose another folder"
                )
            self.claims.give_back(unit)
        for name in [*self._products(), *self._partials()]:
            self.storage.remove(name)
        # What says that something was begun goes last: whoever is interrupted here finds it again.
        for name in sorted(journal, key=lambda name: name == f"{_BEGUN}.json"):
            if name.endswith(".json"):
                self.storage.remove(f"{JOURNAL}/{name}")

    # --- units ----------------------------------------------------------------------------------------------------

    def record(self, unit: str) -> dict[str, Any] | None:
        """What was written when a unit was finished; None before that."""
        return self.records([unit])[0]

    def records(self, units: Sequence[str]) -> list[dict[str, Any] | None]:
        """The records of many units."""
        return [_parsed(content) for content in self.storage.read_all([_name(unit) for unit in units])]

    def finished(self) -> set[str]:
        """Names of all units that have a record."""
        found = {name.removesuffix(".json") for name in self.storage.names(JOURNAL) if name.endswith(".json")}
        if isinstance(self.claims, Shares):
            self.claims.saw(len(found))
        return found

    def finish(self, unit: str, record: dict[str, Any]) -> None:
        """Write the record of a finished unit."""
        self.storage.write(_name(unit), _json(record))

    def forget(self, unit: str) -> None:
        """Have a unit done again."""
        self.storage.remove(_name(unit))

    def once(self, unit: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of a unit that one process makes while the others wait for it."""
        while (record := self.record(unit)) is None:
            if self.claims.take(unit):
                try:
                    if self.record(unit) is None:
                        self.finish(unit, make())
                finally:
                    self.claims.give_back(unit)
            else:
                time.sleep(self.storage.poll_s)
                self.finished()
        return record

    def writing(self, file: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """Open a shard for writing; it appears when the block ends without an error."""
        return self.storage.writing(file)

    # --- the result -----------------------------------------------------------------------------------------------

    def damaged(self, plans: Iterable[ShardPlan]) -> list[ShardPlan]:
        """Shards that are not what their record says; behind a URL only their sizes are compared."""
        plans, sizes = list(plans), self.storage.sizes()
        records = self.records([plan.file for plan in plans])
        return [plan for plan, record in zip(plans, records) if not self._whole(plan.file, record, sizes)]

    def _whole(self, file: str, record: dict[str, Any] | None, sizes: dict[str, int]) -> bool:
        if record is None:
            return False
        if not record["num_samples"]:
            return True
        if sizes.get(file) != record["num_bytes"]:
            return False
        return self.local is None or sha256(self.local / file) == record["sha256"]

    def index_since(self, began: float) -> bool:
        """Whether another process has written the index after that time (``time.time``)."""
        if self.local is None:  # the clocks of both sides may differ, and looking again costs little
            return False
        try:
            return (self.local / INDEX).stat().st_mtime >= began
        except FileNotFoundError:
            return False

    def not_whole(self) -> None:
        """Say by the index's absence that the set is not whole."""
        self.storage.remove(INDEX)

    def write_rejected(self, rejected: list[dict[str, Any]]) -> None:
        """List what was left out."""
        with self.storage.writing(REJECTED) as file:
            for rejection in rejected:
                file.write(json_bytes(rejection) + b"\n")

    def write_index(self, content: dict[str, Any]) -> None:
        """The last file: from now on the set is whole."""
        for partial in self._partials():
            self.storage.remove(partial)
        self.storage.write(INDEX, _json(content))

    def index(self) -> dict[str, Any] | None:
        """The index as it is; None where there is none, or it is damaged."""
        return _parsed(self.storage.read(INDEX))

    def _products(self) -> list[str]:
        shard = re.compile(rf"({'|'.join(SPLITS)})-[0-9].*\.tar")
        return [name for name in self.storage.names() if shard.fullmatch(name) or name in (INDEX, REJECTED)]

    def _partials(self) -> list[str]:
        found = [*self.storage.names(), *(f"{JOURNAL}/{name}" for name in self.storage.names(JOURNAL))]
        return [name for name in found if name.endswith(PARTIAL)]


def load_statistics(codecs: Codecs, state: dict[str, Any]) -> None:
    """Give codecs the statistics that another process has found."""
    codecs.load_state(state)


def _name(unit: str) -> str:
    return f"{JOURNAL}/{unit}.json"


def _json(content: Any) -> bytes:
    return json_bytes(content, indent=1, allow_nan=False) + b"\n"


def _parsed(content: bytes | None) -> dict[str, Any] | None:
    """A record; half an upload is none."""
    try:
        found: dict[str, Any] | None = None if content is None else json.loads(content)
    except ValueError:
        return None
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


__all__ = ["STATISTICS", "EncodeFolder", "load_statistics"]
