"""Fetching remote shards before they are needed."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence

from ovi.data.index import Shard
from ovi.data.reading.remote import ShardCache, is_remote
from ovi.errors import OviError


class FetchAhead:
    """A thread that copies the shards of coming batches into the cache, some batches ahead of those asked for.

    Errors are left to whoever reads the shard: the thread is never needed, it saves waiting alone.

    Args:
        cache: takes the copies.
        batches: the shards of each batch, in order; elements of shards on this machine are passed over.
        ahead: batches that it looks ahead; it fetches nothing that would fill more than half the cache.
    """

    def __init__(self, cache: ShardCache, batches: Iterator[Sequence[Shard]], *, ahead: int = 64) -> None:
        self._cache, self._batches, self._ahead = cache, batches, ahead
        self._room = threading.Semaphore(ahead)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """One batch was handed out: look one further."""
        self._room.release()

    def stop(self) -> None:
        """End the thread, after the shard it is at."""
        self._stopped = True
        self._room.release()

    def _run(self) -> None:
        recent: dict[str, tuple[int, int]] = {}
        for number, shards in enumerate(self._batches):
            self._room.acquire()
            if self._stopped:
                return
            for shard in shards:
                known = shard.location in recent
                recent[shard.location] = number, shard.num_bytes
                if known or not is_remote(shard.location):
                    continue
                recent = {name: seen for name, seen in recent.items() if number - seen[0] <= self._ahead}
                if 2 * sum(num_bytes for _, num_bytes in recent.values()) > self._cache.max_bytes:
                    continue
                with contextlib.suppress(OSError, OviError):
                    os.close(self._cache.open(shard.location, shard.num_bytes, shard.sha256))
