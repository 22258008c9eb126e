"""Files added to a set that was begun: what was there keeps its shards, what is new gets others behind them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ovi.data.plan import item_digest
from ovi.data.sources import SourceItem
from ovi.errors import OviError


def listing(items: Iterable[SourceItem]) -> dict[str, Any]:
    """JSON-ready: files by name, each with a hash of its size and of what was said about it."""
    return {"files": {item.file: item_digest(item) for item in items}}


def added(items: Sequence[SourceItem], listings: Iterable[dict[str, Any]], where: str) -> list[SourceItem]:
    """The files that no listing has.

    Args:
        items: of the source as it is.
        listings: of what was begun with, and of what was added since.
        where: the set, for messages.

    Raises:
        OviError: for files that are listed and gone, or not as they were.
    """
    before: dict[str, str] = {file: digest for listed in listings for file, digest in listed["files"].items()}
    there = {item.file for item in items}
    new = [item for item in items if item.file not in before]
    gone = [file for file in before if file not in there]
    changed = [item.file for item in items if item.file in before and before[item.file] != item_digest(item)]
    for files, what in ((gone, "are there no more"), (changed, "have another size or caption")):
        if files:
            raise OviError(
                f"{where}: {len(files)} files that it was begun with {what}, the first {files[0]}: grow=true only adds "
                f"files. Give them back, or encode all into another folder"
            )
    return new


def written_between(items: Sequence[SourceItem], begin: float, end: float) -> list[str]:
    """Files of this machine that were written to after one time and up to another, whatever was written."""
    return [item.file for item in items if not item.url and begin < _written_at(item.path) <= end]


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # a dangling link
        return -math.inf


def generations(items: Sequence[SourceItem], listings: Sequence[dict[str, Any]]) -> list[list[SourceItem]]:
    """The files that a set was begun with, then those of each time that it grew.

    Args:
        items: all of them.
        listings: one for each time; none for a set that never grew.
    """
    if not listings:
        return [list(items)]
    number = {file: place for place, listed in enumerate(listings) for file in listed["files"]}
    found: list[list[SourceItem]] = [[] for _ in listings]
    for item in items:
        found[number[item.file]].append(item)
    return found


__all__ = ["added", "generations", "listing", "written_between"]
