"""What each process reads at the moment, noted for those that come after one that a file has ended."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ovi.data.files import writing_failed
from ovi.data.index import JOURNAL
from ovi.data.reading.remote import is_remote


class AtWork:
    """One small file per process in a folder, locked for as long as the process lives.

    A note outlives its process, not the machine: writing it costs microseconds. Plain enough to be sent to another
    process.

    Args:
        folder: of the notes; made with the first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path: Path | None = None
        self._file = -1

    def __reduce__(self) -> tuple[Any, ...]:
        return AtWork, (self.folder,)

    @classmethod
    def beside(cls, out: str, *, scratch: str | None = None) -> AtWork:
        """Those of an encoding: in its journal, or on this machine for one that is written behind a URL.

        Args:
            out: absolute path or URL that is written to.
            scratch: folder of this machine; None takes the system's for temporary files.
        """
        if not is_remote(out):
            return cls(Path(out) / JOURNAL / "at-work")
        name = hashlib.sha256(out.encode()).hexdigest()[:16]
        return cls(Path(scratch or tempfile.gettempdir()) / f"ovi-at-work-{os.getuid()}-{name}")

    @contextmanager
    def on(self, key: str) -> Iterator[None]:
        """Note a file or clip for the time of the block.

        Raises:
            OviError: when the note cannot be written.
        """
        self._note(key)
        try:
            yield
        finally:
            os.ftruncate(self._file, 0)

    def left_behind(self) -> set[str]:
        """Keys that processes were at when they ended."""
        return {path.read_text(encoding="utf-8", errors="replace") for path in self._of_the_dead()} - {""}

    def clear(self) -> None:
        """Remove this process's note and those of processes that have ended, and the folder with the last."""
        self.close()
        for path in list(self._of_the_dead()):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # others are at work
            self.folder.rmdir()

    def close(self) -> None:
        """Remove this process's note."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._path, self._file = None, -1

    def _note(self, key: str) -> None:
        try:
            while self._path is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                path = self.folder / f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
                with suppress(FileNotFoundError):  # removed by its last user between both lines
                    self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                    fcntl.flock(self._file, fcntl.LOCK_EX)
                    self._path = path
            os.pwrite(self._file, key.encode(), 0)
        except OSError as error:
            raise writing_failed(self.folder, error) from error

    def _of_the_dead(self) -> Iterator[Path]:
        try:
            paths = sorted(self.folder.iterdir())
        except FileNotFoundError:
            return
        for path in paths:
            # Where a lock belongs to the process, to open and close its own file would give it up.
            if path == self._path:
                continue
            with suppress(FileNotFoundError, BlockingIOError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                yield path


__all__ = ["AtWork"]
