"""Names of files matched with other names: by path, or by the bare name where that says which is meant."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath

from ovi.errors import OviError

_LEVELS: tuple[tuple[Callable[[PurePosixPath], str], tuple[Callable[[PurePosixPath], str], ...]], ...] = (
    (str, (str,)),
    (lambda file: str(file.with_suffix("")), (str, lambda name: str(name.with_suffix("")))),
    (lambda file: file.stem, (lambda name: name.name, lambda name: name.stem)),
)
"""How a file is called and how a name may call it, from the surest on."""


def paired(files: Iterable[str], names: Iterable[str], *, of: str, to: str) -> dict[str, str]:
    """The name that belongs to each file: its path, else its path without suffix, else its name without either.

    A name that is one file's path is no other file's.

    Args:
        files: posix paths inside their folder.
        names: distinct, as paths or bare, with or without suffix.
        of, to: what holds the files and what the names, for messages.

    Returns:
        By file; those that no name belongs to are absent.

    Raises:
        OviError: when two names fit a file equally well, or one name two files.
    """
    left = {file: PurePosixPath(file) for file in files}
    free = {name: PurePosixPath(name) for name in names if PurePosixPath(name).name}
    found: dict[str, str] = {}
    for called, calls in _LEVELS:
        by_call: defaultdict[str, set[str]] = defaultdict(set)
        for name, path in free.items():
            for call in calls:
                by_call[call(path)].add(name)
        taken: dict[str, str] = {}
        for file, path in left.items():
            fits = sorted(by_call.get(called(path), ()))
            if len(fits) > 1:
                raise OviError(f"{to}: {fits[0]!r} and {fits[1]!r} both fit {file!r} of {of}: give paths inside {of}")
            if fits and fits[0] in taken:
                raise OviError(
                    f"{to}: {fits[0]!r} fits {taken[fits[0]]!r} and {file!r} of {of}: give paths inside {of}"
                )
            if fits:
                found[file], taken[fits[0]] = fits[0], file
        left = {file: path for file, path in left.items() if file not in found}
        free = {name: path for name, path in free.items() if name not in taken}
    return found
