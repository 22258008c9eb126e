"""What every launcher agrees on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol

from ovi.data.encode_folder import EncodeFolder
from ovi.registry import Registry

LAUNCHERS = Registry("launcher", group="launcher", doc="what works on the units of an encoding")

LOOK_S = 5.0
"""How often progress counts what others have done: a folder of many units takes long to list."""

Report = Callable[[int, int], None]
"""Called with how many files or clips are done, by whomever, and how many there are."""


class Unit(Protocol):
    """A unit of work: a group of files, or a shard. Its length is how many files or clips it holds."""

    def __len__(self) -> int: ...


class Worker(Protocol):
    """Does units in some process; can be pickled."""

    def to(self, device: str | None) -> None:
        """Compute there; None stays."""

    def __call__(
        self, folder: EncodeFolder, units: Iterable[tuple[str, Any]], on_one: Callable[[], None]
    ) -> Iterator[str]:
        """Do units, write their records, name each when it is done.

        Args:
            folder: that is written to.
            units: (name, unit), taken a little ahead.
            on_one: called after each file or clip.
        """

    def release(self) -> None:
        """Hold on to no file that was fetched, until the next unit."""


class Launcher(ABC):
    """Has units done until all are done by somebody. A context: what it starts ends with the block."""

    def __enter__(self) -> Launcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @abstractmethod
    def __call__(
        self, folder: EncodeFolder, units: Mapping[str, Unit], worker: Worker, begins_at: float, report: Report
    ) -> int:
        """Do the units that have no record yet; wait for those that others hold.

        Args:
            folder: that is written to.
            units: by the name of their record.
            worker: does them.
            begins_at: share of the way in, 0..1, where this process begins: processes then seldom meet.
            report: called as work gets on.

        Returns:
            How many files or clips were done from here.
        """


def claimed(folder: EncodeFolder, units: Mapping[str, Unit], finished: set[str], begins_at: float) -> Iterator[str]:
    """Units that nobody has finished and nobody else holds, claimed; the caller gives them back.

    It never waits: whoever takes units ahead of the work may hold the one that another process waits for.
    """
    names = list(units)
    start = int(begins_at * len(names))
    for name in [*names[start:], *names[:start]]:
        if name in finished or not folder.claims.take(name):
            continue
        if folder.record(name) is not None:  # finished between our look and our claim
            folder.claims.give_back(name)
            continue
        yield name


def num_done(units: Mapping[str, Unit], finished: set[str]) -> int:
    """Files or clips of finished units."""
    return sum(len(unit) for name, unit in units.items() if name in finished)


def num_in_all(units: Mapping[str, Unit]) -> int:
    """Files or clips of all units."""
    return sum(len(unit) for unit in units.values())
