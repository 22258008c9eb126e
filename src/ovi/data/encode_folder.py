"""The folder that ``encode`` writes to: what has begun there, what is finished, and who works on what."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal
from warnings import warn

from ovi.codecs.bundle import Codecs
from ovi.data.encode_units import Units, parsed_record, record_bytes, record_name
from ovi.data.files import PARTIAL, json_bytes, sha256
from ovi.data.growth import added, generations, listing, written_between
from ovi.data.index import INDEX, JOURNAL, REJECTED, SPLITS
from ovi.data.plan import ShardPlan
from ovi.data.shares import Shares
from ovi.data.sources import SourceItem
from ovi.errors import OviError

_ALIVE, _BEGUN, _TRIES, _FILES = "alive", "begun", "tries-", "files-"
_OTHERS = " with other settings"
Overwrite = bool | Literal["all"]
"""Whether to remove what other settings have left, or whatever is there."""
FILES = "source files and captions"
"""The setting that says which files there are."""
STATISTICS = "statistics"
"""Unit whose record is the codecs' statistics."""
SET = "set"
"""Unit whose record is what the stages of level "set" left out."""


class EncodeFolder(Units):
    """A folder of shards in the making, shared by any number of processes with the same settings.

    Beside the records of what is done its journal holds the settings (``begun.json``) and who is at work.
    """

    # --- settings -------------------------------------------------------------------------------------------------

    def begin(
        self,
        settings: dict[str, Any],
        codecs: Codecs,
        items: Sequence[SourceItem],
        *,
        overwrite: Overwrite = False,
        grow: bool = False,
    ) -> list[list[SourceItem]]:
        """Join what was begun with the same settings; refuse any other.

        Args:
            settings: JSON-ready; everything that decides the shards.
            codecs: take the statistics that an earlier process has found.
            items: all media files.
            overwrite: remove what other settings have left here, or ``all`` that is here, unless a process still works
                on it.
            grow: take in files that were not there when it was begun.

        Returns:
            The files that it was begun with, then those of each time that it grew.

        Raises:
            OviError: when the folder holds shards of other settings, or of unknown ones.
        """
        if overwrite not in (False, True, "all"):
            raise OviError(f"overwrite is false, true or all, got {overwrite!r}")
        if overwrite == "all" and self.world_size > 1:
            raise OviError(
                f"{self.location}: overwrite=all is for one process: of {self.world_size} each would remove what the "
                f"others make. Remove the folder, then start them without it"
            )
        with self.claims.waiting_for("begin"):
            differences = self._differences(settings, codecs)
            if grow and differences and len(differences) == 1 and differences[0].startswith(FILES):
                self._grow(settings, items)
                differences = self._differences(settings, codecs)
            if overwrite and (overwrite == "all" or differences != []):
                if self.local is None and self.rank:
                    self._wait_for_first(settings, codecs)
                else:
                    self._remove_all(overwrite)
                differences = self._differences(settings, codecs)
            if differences is None:
                found = sorted(self._products())
                if found:
                    raise OviError(
                        f"{self.location} holds {found[0]} of an unknown run: choose another folder, or replace it "
                        f"with overwrite=true"
                    )
                self.finish(f"{_FILES}0", listing(items))
                self.finish(_BEGUN, {"settings": settings, "generations": 1, "at": self.now()})
            elif differences:
                raise OviError(
                    f"{self.location} was begun with other settings: {'; '.join(differences)}. Choose another folder, "
                    f"{self._or_grow(differences, items)}or replace what is there with overwrite=true"
                )
            else:
                self._warn_of_changed(items)
            self._note_alive()
            if codecs.fitted and self.record(STATISTICS) is None:
                self.finish(STATISTICS, codecs.to_dict()["state"])
        state = self.record(STATISTICS)
        if state is not None:
            load_statistics(codecs, state)
        number = (self.record(_BEGUN) or {}).get("generations", 1)
        return generations(items, self._listings(number) if number > 1 else [])

    def _grow(self, settings: dict[str, Any], items: Sequence[SourceItem]) -> None:
        """Take in files that were not there; the set is whole again when theirs are done too."""
        self._nobody_works(_OTHERS, "end that process before grow=true")
        number = (self.record(_BEGUN) or {}).get("generations", 0)
        new = added(items, self._listings(number), self.location)
        if not new:  # behind a URL another rank has taken them in meanwhile
            return
        added_now = {item.file for item in new}
        self._warn_of_changed([item for item in items if item.file not in added_now])
        self.not_whole()
        self.finish(f"{_FILES}{number}", listing(new))
        self.finish(_BEGUN, {"settings": settings, "generations": number + 1, "at": self.now()})

    def _listings(self, number: int) -> list[dict[str, Any]]:
        found = self.records([f"{_FILES}{n}" for n in range(number)])
        listings = [one for one in found if one is not None]
        if not listings or len(listings) < len(found):
            raise OviError(
                f"{self.location} has no list of the files that it was begun with: encode the new ones alone, into "
                f"another folder with codecs_of={self.location}, and train on both (data=mixture)"
            )
        return listings

    def _or_grow(self, differences: list[str], items: Sequence[SourceItem]) -> str:
        if len(differences) == 1 and differences[0].startswith(FILES):
            with contextlib.suppress(OviError):  # where files changed or are gone
                added(items, self._listings((self.record(_BEGUN) or {}).get("generations", 0)), self.location)
                return "take in new files with grow=true, "
        return ""

    def _warn_of_changed(self, items: Sequence[SourceItem]) -> None:
        """Tell of files that were written to since they were listed, and have the size that they had."""
        changed = written_between(items, (self.record(_BEGUN) or {}).get("at", math.inf), self.now())
        if changed:
            warn(
                f"{len(changed)} files were written to since {self.location} was begun, the first {changed[0]}, though "
                f"their sizes are what they were: what is encoded of them stays; overwrite=all encodes all anew",
                stacklevel=2,
            )

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
        if kept is not None and _other_statistics(codecs, kept):
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
            self.claims.take(unit)
            self.finish(self._alive, {"unit": unit})

    @property
    def _alive(self) -> str:
        return f"{_ALIVE}-{os.uname().nodename}-{os.getpid()}"

    def leave(self) -> None:
        """Say that this process has stopped working here."""
        if self.local is not None:
            self.forget(self._alive)

    def _nobody_works(self, how: str, until: str) -> None:
        for note in (name.removesuffix(".json") for name in self.storage.names(JOURNAL)):
            if not note.startswith(f"{_ALIVE}-"):
                continue
            unit = (self.record(note) or {}).get("unit", "")
            if not self.claims.take(unit):
                raise OviError(
                    f"{self.location}: {unit.removeprefix(_ALIVE).strip()} is encoding into it{how}: "
                    f"{until}, or choose another folder"
                )
            self.claims.give_back(unit)

    def _remove_all(self, overwrite: Overwrite) -> None:
        if overwrite == "all":
            self._nobody_works("", "end that process before overwrite=all, or leave that out to work beside it")
        else:
            self._nobody_works(_OTHERS, "end that process before overwrite=true")
        journal = self.storage.names(JOURNAL)
        for name in [*self._products(), *self._partials()]:
            self.storage.remove(name)
        # What says that something was begun goes last: whoever is interrupted here finds it again.
        for name in sorted(journal, key=lambda name: name == f"{_BEGUN}.json"):
            if name.endswith(".json"):
                self.storage.remove(f"{JOURNAL}/{name}")

    # --- the result -----------------------------------------------------------------------------------------------

    def damaged(self, plans: Iterable[ShardPlan]) -> list[ShardPlan]:
        """Shards that are not what their record says.

        Those that nobody has written to since are as they were: only the others are read and hashed. Behind a URL only
        sizes are compared.
        """
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
        if self.local is None:
            return True
        # Taken first: what is written while we read is looked at again next time.
        mtime_ns = (self.local / file).stat().st_mtime_ns
        if mtime_ns == record.get("mtime_ns"):
            return True
        if sha256(self.local / file) != record["sha256"]:
            return False
        self.storage.write(record_name(file), record_bytes({**record, "mtime_ns": mtime_ns}))
        return True

    def index_since(self, began: float) -> bool:
        """Whether another process has written the index after that time, as ``now`` tells it."""
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
            self._remove_rest(partial)
        self.storage.write(INDEX, record_bytes(content))

    def index(self) -> dict[str, Any] | None:
        """The index as it is; None where there is none, or it is damaged."""
        return parsed_record(self.storage.read(INDEX))

    def _products(self) -> list[str]:
        shard = re.compile(rf"({'|'.join(SPLITS)})-[0-9].*\.tar")
        return [name for name in self.storage.names() if shard.fullmatch(name) or name in (INDEX, REJECTED)]

    def _remove_rest(self, partial: str) -> None:
        """Remove what somebody was writing, unless that one lives: a claim is held for as long as its holder does."""
        name = Path(partial).name.removesuffix(PARTIAL).removesuffix(".json")
        unit = name.removeprefix(_TRIES)
        if name == _BEGUN or name.startswith(_FILES):
            unit = "begin"
        elif name.startswith(f"{_ALIVE}-"):
            unit = " ".join([_ALIVE, *name.removeprefix(f"{_ALIVE}-").rsplit("-", 1)])
        if name in (INDEX.removesuffix(".json"), REJECTED):  # of this very process, which alone finishes
            self.storage.remove(partial)
        elif self.claims.take(unit):
            self.storage.remove(partial)
            self.claims.give_back(unit)

    def _partials(self) -> list[str]:
        found = [*self.storage.names(), *(f"{JOURNAL}/{name}" for name in self.storage.names(JOURNAL))]
        return [name for name in found if name.endswith(PARTIAL)]


def _other_statistics(codecs: Codecs, kept: dict[str, Any]) -> bool:
    """Whether codecs have statistics, or weights, that are not those kept; what has none yet will take them."""
    mine = codecs.state()
    unfitted = {kind for kind in ("video", "audio") if not getattr(codecs, kind).fitted}
    return any(mine[kind] != kept.get(kind) for kind in mine.keys() - unfitted)


def load_statistics(codecs: Codecs, state: dict[str, Any]) -> None:
    """Give codecs the statistics that another process has found."""
    codecs.load_state(state)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


__all__ = ["FILES", "SET", "STATISTICS", "EncodeFolder", "Overwrite", "load_statistics"]
