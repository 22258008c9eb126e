"""Files that are whole or absent: written under another name, moved into place when complete."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ovi.errors import OviError

PARTIAL = ".partial"
"""Suffix of files being written; whatever carries it is rubbish once its writer is gone."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` for writing; it appears under its name only when the block ends without an error.

    Raises:
        OviError: when the disk is full or the file may not be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise writing_failed(path, error) from error


def writing_failed(path: Path, error: OSError) -> OviError:
    """What to tell the user about a failure to write ``path``."""
    if error.errno in _FULL:
        return OviError(
            f"{path}: no space left to write it ({error.strerror}). What is finished is kept: make room or raise the "
            f"quota, then run the same command again to continue"
        )
    return OviError(f"{path}: cannot be written ({error.strerror or error}); check the folder's permissions")


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    with whole_file(path) as file:
        file.write(json_bytes(content, indent=1, allow_nan=False) + b"\n")


def json_bytes(content: Any, **options: Any) -> bytes:
    """JSON as UTF-8; with escapes where a file's name is no valid text, so that it reads back the same."""
    try:
        return json.dumps(content, ensure_ascii=False, **options).encode()
    except UnicodeEncodeError:
        return json.dumps(content, **options).encode()


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
