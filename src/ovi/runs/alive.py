"""Whether a run's folder is being written: a lock that its process holds for as long as it lives."""

from __future__ import annotations

import fcntl
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ovi.errors import OviError

LOCK = ".alive"

_TRIES, _PAUSE_S = 10, 0.02
_held: set[str] = set()
"""Folders this process holds. POSIX locks belong to a process and end when it closes any handle of the file, so it must
never open the lock file of a folder of its own to look."""


@contextmanager
def alive(folder: str | Path) -> Iterator[None]:
    """Say for the length of the block that a run's folder is being written; the main process of a run alone does.

    The system takes the lock back when the process ends, however it ends. Where the file system knows no locks, that is
    warned of: the run then looks stopped until it has finished.

    Args:
        folder: of the run; made where it is not there.

    Raises:
        OviError: when the folder is already being written, by another process or by this one.
    """
    folder = Path(folder)
    key = os.path.realpath(folder)
    if key in _held:
        raise _taken(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "ab") as file:
        for left in reversed(range(_TRIES)):
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # Whoever looks holds the lock for an instant.
                if not left:
                    raise _taken(folder) from None
                time.sleep(_PAUSE_S)
            except OSError as error:
                warnings.warn(f"{folder}: cannot be locked ({error.strerror}); it will look stopped", stacklevel=3)
                break
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)


def is_alive(folder: str | Path) -> bool:
    """Whether some process writes a run's folder at this moment."""
    if os.path.realpath(folder) in _held:
        return True
    try:
        with open(Path(folder) / LOCK, "rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or no locks there
        return False
    return False


def _taken(folder: Path) -> OviError:
    return OviError(f"{folder}: another run writes there. Wait for it to end, or choose another folder")
