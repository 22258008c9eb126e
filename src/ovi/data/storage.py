"""Where an encoding is written: a folder of this machine, or an fsspec URL. Files are whole or absent in both."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from ovi.data.files import whole_file
from ovi.data.reading.remote import is_remote, join
from ovi.data.remote_files import ATTEMPTS, file_system, reaching, trying
from ovi.errors import OviError


class Storage(ABC):
    """Files by name, which may lie in one folder below: ``index.json``, ``.encode/begun.json``.

    Attributes:
        poll_s: how often to look whether others have written something.
    """

    poll_s: ClassVar[float]

    @abstractmethod
    def make(self, folder: str) -> None:
        """Make a folder below, and what it lies in.

        Raises:
            OviError: when it cannot be written.
        """

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """A whole file; None when it is not there."""

    @abstractmethod
    def read_all(self, names: Sequence[str]) -> list[bytes | None]:
        """Many small files."""

    @abstractmethod
    def writing(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """Open a file for writing; it appears when the block ends without an error.

        Raises:
            OviError: when the disk is full or the file may not be written.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of the files in a folder, by their name in it; hidden folders are not looked into."""

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """Names of what is in a folder."""

    def write(self, name: str, content: bytes) -> None:
        """Write a whole small file."""
        with self.writing(name) as file:
            file.write(content)


class LocalStorage(Storage):
    """A folder of this machine, or one that machines share."""

    poll_s = 0.2

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self, folder: str) -> None:
        try:
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OviError(f"{self.folder}: cannot write there ({error.strerror}); choose another folder") from error

    def read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def read_all(self, names: Sequence[str]) -> list[bytes | None]:
        return [self.read(name) for name in names]

    def writing(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        return whole_file(self.folder / name)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def names(self, folder: str = "") -> list[str]:
        return os.listdir(self.folder / folder)

    def sizes(self, folder: str = "") -> dict[str, int]:
        found = {}
        for path in (self.folder / folder).iterdir():
            with contextlib.suppress(FileNotFoundError):  # others work here
                if path.is_file():
                    found[path.name] = path.stat().st_size
        return found


class RemoteStorage(Storage):
    """A folder behind a URL. What is written lies in a temporary local file first and is uploaded whole.

    Args:
        url: of the folder.
        scratch: folder for the temporary files; None takes the system's. The largest shard must fit.
    """

    poll_s = 5.0

    def __init__(self, url: str, *, scratch: str | None = None) -> None:
        self.url, self.scratch = url.rstrip("/"), scratch
        self.system, self.root = file_system(self.url)

    def make(self, folder: str) -> None:
        trying(self.url, lambda: self.system.makedirs(self._path(folder), exist_ok=True))

    def read(self, name: str) -> bytes | None:
        try:
            content: bytes = trying(join(self.url, name), lambda: self.system.cat_file(self._path(name)))
        except FileNotFoundError:
            return None
        return content

    def read_all(self, names: Sequence[str]) -> list[bytes | None]:
        found: dict[str, bytes | None] = {}
        for attempt in range(ATTEMPTS - 1):
            left = {name: self._path(name) for name in names if name not in found}
            if not left:
                break
            if attempt:
                time.sleep(0.5 * 2**attempt)
            paths = list(left.values())
            # Not ``cat``, which takes brackets in a path for a pattern.
            read = partial(self.system.cat_ranges, paths, [None] * len(paths), [None] * len(paths), on_error="return")
            for name, answer in zip(left, trying(self.url, read)):
                if isinstance(answer, FileNotFoundError):
                    found[name] = None
                elif not isinstance(answer, Exception):
                    found[name] = answer
        # What is still without an answer says why one by one.
        return [found[name] if name in found else self.read(name) for name in names]

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        if self.scratch is not None:
            LocalStorage(Path(self.scratch)).make("")
        with tempfile.TemporaryDirectory(prefix="ovi-upload-", dir=self.scratch) as folder:
            local = Path(folder) / Path(name).name
            with whole_file(local) as file:
                yield file
            trying(join(self.url, name), lambda: self.system.put_file(str(local), self._path(name)))

    def remove(self, name: str) -> None:
        with reaching(join(self.url, name)), contextlib.suppress(FileNotFoundError):
            self.system.rm_file(self._path(name))

    def sizes(self, folder: str = "") -> dict[str, int]:
        path = self._path(folder)

        def listing() -> list[dict[str, Any]]:
            self.system.invalidate_cache(path)
            listed: list[dict[str, Any]] = self.system.ls(path, detail=True)
            return listed

        try:
            listed = trying(join(self.url, folder), listing)
        except FileNotFoundError:
            return {}
        return {Path(about["name"]).name: int(about["size"] or 0) for about in listed if about["type"] == "file"}

    def names(self, folder: str = "") -> list[str]:
        return list(self.sizes(folder))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")


def storage_of(location: str | Path, *, scratch: str | None = None) -> Storage:
    """The storage that a path or URL names.

    Args:
        location: of the folder.
        scratch: folder of this machine for what is uploaded; None takes the system's for temporary files.

    Raises:
        OviError: for a URL of an unknown protocol.
    """
    return RemoteStorage(str(location), scratch=scratch) if is_remote(location) else LocalStorage(Path(location))


__all__ = ["LocalStorage", "RemoteStorage", "Storage", "storage_of"]
