"""Units of work shared by processes that know nothing of each other: each unit has one holder, for as long as it lives.

A claim is a lock on one byte of a file. The system gives it back when its holder ends, however it ends: a killed
process leaves nothing behind that would have to expire. It works between processes of one machine, and between
machines on a shared file system that carries POSIX locks (NFS, Lustre with flock, GPFS, CephFS).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ovi.errors import OviError


class Claims:
    """Claims on named units, kept in one lock file.

    POSIX locks belong to a process, not to a handle: two instances in one process do not see each other's claims, and
    closing one gives up those of the other on the same file.

    Args:
        path: of the lock file; made where it is not there.

    Raises:
        OviError: when it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OviError(f"{path}: cannot write there ({error.strerror}); choose another folder") from error
        self.path = path

    def take(self, unit: str) -> bool:
        """Claim a unit unless another process holds it; False if one does."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(unit))
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._cannot(error) from error
        return True

    def _cannot(self, error: OSError) -> OviError:
        return OviError(
            f"{self.path}: this file system cannot lock ({error.strerror}): several processes cannot share the "
            f"folder. Encode into a local one"
        )

    def give_back(self, unit: str) -> None:
        """Let others have a unit."""
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _place(unit))

    @contextmanager
    def waiting_for(self, unit: str) -> Iterator[None]:
        """Hold a unit for the time of the block, waiting for it first."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _place(unit))
        except OSError as error:
            raise self._cannot(error) from error
        try:
            yield
        finally:
            self.give_back(unit)

    def close(self) -> None:
        """Give up everything."""
        os.close(self._file)


def _place(unit: str) -> int:
    # Two units at one place would merely be worked on one after the other.
    return int.from_bytes(hashlib.blake2b(unit.encode(), digest_size=7).digest(), "big")
