"""Units of work dealt to processes by their rank, where nothing can be locked: behind URLs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_S = 3600.0
"""Longer than any unit takes: an hour."""


class Shares:
    """Stands in for ``Claims``: unit i belongs to rank ``hash(i) % world_size`` and needs no lock.

    Every rank must come through for the set to become whole. One that does not is made up for by the others, once
    nothing has been finished for ``patience_s``; two may then do the same unit, to the same bytes. A run that was
    ended is continued with any world size.

    Args:
        rank: of this process, 0..world_size - 1.
        world_size: processes.
        patience_s: seconds without progress after which a unit of another rank is taken.
    """

    def __init__(self, rank: int, world_size: int, *, patience_s: float = PATIENCE_S) -> None:
        self.rank, self.world_size, self.patience_s = rank, world_size, patience_s
        self._seen = -1
        self._moved = self._looked = time.monotonic()

    def take(self, unit: str) -> bool:
        """Whether a unit is this process's to do."""
        digest = hashlib.blake2b(unit.encode(), digest_size=8).digest()
        mine = int.from_bytes(digest, "big") % self.world_size == self.rank
        # Not until now: while this process was busy with a long unit of its own, it saw nobody get on.
        return mine or self._looked - self._moved > self.patience_s

    def give_back(self, unit: str) -> None:
        """Nothing was locked."""

    @contextmanager
    def waiting_for(self, unit: str) -> Iterator[None]:
        """Nothing is locked: what the block does must do no harm when several do it."""
        yield

    def saw(self, num_finished: int) -> None:
        """Be told how many units are finished: whether anybody gets on."""
        self._looked = time.monotonic()
        if num_finished != self._seen:
            self._seen, self._moved = num_finished, self._looked

    def close(self) -> None:
        """Nothing was locked."""


__all__ = ["PATIENCE_S", "Shares"]
