"""Media files that are elsewhere, as local files for as long as they are read."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from ovi.data.files import PARTIAL, whole_file, writing_failed
from ovi.data.remote_files import UnreachableError, file_system, reaching
from ovi.data.sources import SourceItem
from ovi.errors import OviError

_ALIVE = ".alive"
_CHUNK = 2**22


class LocalCopies:
    """A folder of local copies, shared by the processes of one machine that work on one encoding.

    Copies are fetched when first asked for. Those used longest ago make room for new ones, except while somebody reads
        them: they may go beyond the limit then, by one file for each process that reads. The last process to ``close``
    removes the folder; after a kill, the next run of the same encoding takes it up. Plain enough to be sent to another
    process.

    Args:
        purpose: names the folder; the same in all processes that share it.
        max_bytes: that copies may take; one that is larger alone is fetched nevertheless.
        scratch: folder that the copies' folder is made in; None takes the system's for temporary files.
        attempts: tries before a file counts as out of reach.
    """

    def __init__(
        self, purpose: str, max_bytes: int = 16 * 2**30, *, scratch: str | None = None, attempts: int = 3
    ) -> None:
        self.purpose, self.max_bytes, self.scratch, self.attempts = purpose, max_bytes, scratch, attempts
        self._alive: IO[bytes] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.purpose, self.max_bytes, self.scratch, self.attempts)

    @property
    def folder(self) -> Path:
        """Where the copies lie."""
        name = hashlib.sha256(self.purpose.encode()).hexdigest()[:16]
        return Path(self.scratch or tempfile.gettempdir()) / f"ovi-media-{os.getuid()}-{name}"

    @contextmanager
    def of(self, item: SourceItem) -> Iterator[SourceItem]:
        """The item with the path of a local copy, which stays for the time of the block.

        Raises:
            FileNotFoundError: when it is not where the source said.
            OviError: when it cannot be fetched, or not be written.
        """
        if not item.url:
            yield item
            return
        self._open()
        path = self._path(item)
        while True:
            with open(path.with_suffix(".lock"), "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH)
                if path.exists():
                    os.utime(path)
                    yield replace(item, path=path)
                    return
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    self._fetch(item, path)
            self._make_room(path)

    def path(self, item: SourceItem) -> Path:
        """Where a file of this machine is, or the copy of one that is elsewhere, once it was fetched."""
        return self._path(item) if item.url else item.path

    def said(self, text: str, item: SourceItem) -> str:
        """A message about a copy, as one about the file it is of."""
        return text.replace(str(self._path(item)), item.url) if item.url else text

    def close(self) -> None:
        """Done with; the last process removes the copies."""
        if self._alive is None and not self.folder.exists():
            return
        self._open()  # copies may be those of our workers alone
        assert self._alive is not None
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Hold on to none: they stay until whoever closes removes them, or are asked for again."""
        if self._alive is not None:
            self._alive.close()
            self._alive = None

    def _open(self) -> None:
        if self._alive is not None:
            return
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                alive = open(self.folder / _ALIVE, "ab")  # noqa: SIM115 (held until close)
            except FileNotFoundError:  # removed by its last user between both lines
                continue
            except OSError as error:
                raise writing_failed(self.folder, error) from error
            fcntl.flock(alive, fcntl.LOCK_SH)
            if (self.folder / _ALIVE).exists():
                self._alive = alive
                return
            alive.close()

    def _path(self, item: SourceItem) -> Path:
        # Suffix and all but the name are ours: whatever the source calls its files, this machine can hold them.
        name = hashlib.sha256(f"{item.url} {item.num_bytes}".encode("utf-8", "surrogateescape")).hexdigest()[:24]
        return self.folder / (name + Path(item.file).suffix.lower())

    def _fetch(self, item: SourceItem, path: Path) -> None:
        for attempt in range(self.attempts):
            try:
                self._download(item.url, path, item.num_bytes)
                return
            except UnreachableError as error:
                if attempt + 1 == self.attempts:
                    raise OviError(
                        f"{error} What is finished is kept: run the same command again to continue"
                    ) from error
                time.sleep(0.1 * 2**attempt)

    def _download(self, url: str, path: Path, num_bytes: int) -> None:
        system, remote = file_system(url)
        with ExitStack() as stack:
            with reaching(url):
                source = stack.enter_context(system.open(remote, "rb"))
            target = stack.enter_context(whole_file(path))
            count = 0
            while True:
                with reaching(url):
                    chunk = source.read(_CHUNK)
                if not chunk:
                    break
                target.write(chunk)
                count += len(chunk)
            if num_bytes > 0 and count != num_bytes:
                raise UnreachableError(f"{url}: {count} bytes of {num_bytes} arrived.")

    def _make_room(self, newest: Path) -> None:
        found = []
        for path in self.folder.iterdir():
            if path.suffix in (".lock", PARTIAL) or path.name == _ALIVE:
                continue
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.max_bytes:
                return
            if path == newest:
                continue
            with open(path.with_suffix(".lock"), "ab") as lock, contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while somebody reads it
                path.unlink(missing_ok=True)
                total -= size


def _again(purpose: str, max_bytes: int, scratch: str | None, attempts: int) -> LocalCopies:
    return LocalCopies(purpose, max_bytes, scratch=scratch, attempts=attempts)


__all__ = ["LocalCopies"]
