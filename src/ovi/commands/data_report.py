"""``ovi data report``: what the stages measured of every clip, kept or rejected."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ovi.commands.data import USAGE, parse
from ovi.data.index import REJECTED, ShardIndex
from ovi.data.reading.remote import is_remote
from ovi.data.report import data_report
from ovi.errors import OviError


def report(words: list[str]) -> None:
    """Draw histograms of a set's figures into one page or picture, and say where it is."""
    folders, settings = parse("data report", words, {"out": Path})
    if len(folders) != 1:
        raise OviError(f"ovi data report takes one folder, got {', '.join(folders) or 'none'}\n{USAGE}")
    if is_remote(folders[0]):
        raise OviError(f"{folders[0]}: ovi data report reads sets on this machine only; copy the set to a folder first")
    folder = Path(folders[0])
    index = ShardIndex.load(folder)
    out = settings.get("out", folder / "report.html")
    rejected = folder / REJECTED
    written = data_report(
        list(kept_records(index)),
        rejected if rejected.is_file() else [],
        out,
        limits=index.content.get("limits", {}),
        steps=index.content.get("throughput", {}).get("steps"),
    )
    print(written)


def kept_records(index: ShardIndex) -> Iterator[dict[str, Any]]:
    """What is known about each sample of a local set: file, place and figures; tensors are skipped over."""
    for split in index.splits:
        for shard in index.splits[split]:
            try:
                with tarfile.open(shard.path) as tar:
                    for member in tar:
                        if member.name.endswith(".json") and (file := tar.extractfile(member)) is not None:
                            about = json.load(file)
                            yield {"key": member.name.removesuffix(".json"), "figures": {}, **about}
            except (OSError, tarfile.TarError, ValueError) as error:
                raise OviError(f"{shard.path}: cannot be read ({error}); `ovi data check {index.folder}`") from error
