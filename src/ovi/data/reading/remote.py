"""Shards and indexes that are elsewhere: fsspec URLs, and a local cache of shards."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ovi.data.files import PARTIAL, writing_failed
from ovi.errors import OviError

_CHUNK = 2**22


def is_remote(location: str | Path) -> bool:
    """Whether a location is a URL (``s3://``, ``memory://``, ``file://``, ``http://``...)."""
    return "://" in str(location)


def join(folder: str | Path, name: str) -> str:
    """A file's location in a folder, which may be a URL."""
    return f"{str(folder).rstrip('/')}/{name}" if is_remote(folder) else str(Path(folder) / name)


def read_remote(url: str) -> bytes:
    """A whole small file.

    Raises:
        FileNotFoundError: when it is not there.
        OviError: when it cannot be reached, or its protocol needs a package that is not installed.
    """
    with _opened(url) as file:
        content: bytes = file.read()
        return content


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            yield file
    except (FileNotFoundError, OviError):
        raise
    except (ImportError, ValueError) as error:  # fsspec's words for a protocol without its package, or unknown
        raise OviError(f"{url}: cannot be opened ({error})") from error
    except Exception as error:  # every file system raises its own kinds
        raise OviError(f"{url}: cannot be read ({type(error).__name__}: {error})") from error


def default_cache() -> Path:
    """Where copies of shards are kept unless another place is named."""
    return Path.home() / ".cache" / "ovi" / "shards"


class ShardCache:
    """Copies of remote shards in a local folder, fetched when first asked for.

    A copy appears under its name only when it is whole and is what its index says. Any number of processes may share
    the folder. The copies used longest ago make room for new ones. One that is open then stays on the disk, unseen,
    until whoever reads it is done: with the files that each process holds open the disk may carry more than the limit.

    Args:
        folder: where the copies are; made when missing.
        max_bytes: that all copies may take; one that is larger alone is kept while it is the newest.
        attempts: tries before a shard counts as unreadable.
        bad_for_s: seconds for which a process remembers that: not every sample of the shard has it fetched again.
    """

    def __init__(self, folder: str | Path, max_bytes: int, *, attempts: int = 3, bad_for_s: float = 300.0) -> None:
        self.folder, self.max_bytes, self.attempts = Path(folder), max_bytes, attempts
        self.bad_for_s = bad_for_s
        self._bad: dict[Path, tuple[float, str]] = {}

    def open(self, url: str, num_bytes: int, sha256: str) -> int:
        """Descriptor of a shard's local copy, open for reading.

        Args:
            url: of the shard.
            num_bytes, sha256: what its index says; an empty or unknown hash is not compared.

        Raises:
            OviError: when the copy cannot be written.
            OSError: when the shard cannot be had, or is not what its index says.
        """
        name = hashlib.sha256(f"{url} {num_bytes} {sha256}".encode()).hexdigest()[:24] + ".tar"
        path = self.folder / name
        while True:
            try:
                file = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self._fetch(url, path, num_bytes, sha256)
                continue
            except OSError as error:
                raise writing_failed(path, error) from error
            with contextlib.suppress(OSError):  # removed meanwhile, which does not matter to who has it open
                os.utime(path)
            return file

    def _fetch(self, url: str, path: Path, num_bytes: int, sha256: str) -> None:
        since, why = self._bad.get(path, (-math.inf, ""))
        if time.monotonic() - since < self.bad_for_s:
            raise OSError(why)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(path.with_suffix(".lock"), "wb")  # noqa: SIM115
        except OSError as error:
            raise writing_failed(path, error) from error
        with lock:
            # Whoever comes second waits here, and then finds the file.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return
            for attempt in range(self.attempts):
                try:
                    self._download(url, path, num_bytes, sha256)
                    break
                except CacheFull:
                    raise
                except (OviError, FileNotFoundError, ValueError) as error:
                    if attempt + 1 == self.attempts or isinstance(error, FileNotFoundError):
                        self._bad[path] = time.monotonic(), str(error)
                        raise OSError(str(error)) from error
                    time.sleep(0.1 * 2**attempt)
        self._make_room(path)

    def _download(self, url: str, path: Path, num_bytes: int, sha256: str) -> None:
        partial, digest, count = path.with_name(path.name + PARTIAL), hashlib.sha256(), 0
        try:
            with _opened(url) as source, _written(partial) as write:
                while chunk := source.read(_CHUNK):
                    write(chunk)
                    digest.update(chunk)
                    count += len(chunk)
            if count != num_bytes:
                raise ValueError(f"{url}: has {count} bytes, the index says {num_bytes}")
            if len(sha256) == 64 and digest.hexdigest() != sha256:
                raise ValueError(f"{url}: is not the shard that the index names: its sha256 differs")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, newest: Path) -> None:
        with open(self.folder / ".room", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = []
            for path in self.folder.glob("*.tar"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
            total = sum(size for _, size, _ in found)
            for _, size, path in sorted(found):
                if total <= self.max_bytes:
                    return
                if path != newest:
                    path.unlink(missing_ok=True)
                    total -= size


@contextmanager
def _written(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A file to write to, whose troubles are told from those of the source."""
    try:
        file = open(path, "wb")  # noqa: SIM115
    except OSError as error:
        raise CacheFull(str(writing_failed(path, error))) from error

    def write(chunk: bytes) -> None:
        try:
            file.write(chunk)
        except OSError as error:
            raise CacheFull(str(writing_failed(path, error))) from error

    try:
        yield write
    except BaseException:
        with contextlib.suppress(OSError):  # what could not be written is tried again
            file.close()
        raise
    try:
        file.close()
    except OSError as error:
        raise CacheFull(str(writing_failed(path, error))) from error


class CacheFull(OviError):
    """A copy could not be written: the user's to mend, no damage of the shard."""
