"""``ovi data report``: what the stages measured of every clip, kept or rejected."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ovi.commands.data import USAGE, parse
from ovi.data.index import REJECTED, Shard, ShardIndex
from ovi.data.lines import json_lines
from ovi.data.reading.remote import is_remote, join, read_remote
from ovi.data.remote_files import file_system, reaching
from ovi.data.report import data_report
from ovi.errors import OviError

_BLOCK = 2**16
"""Bytes fetched at a time from shards behind a URL."""


def report(words: list[str]) -> None:
    """Draw histograms of a set's figures into one page or picture, and say where it is."""
    folders, settings = parse("data report", words, {"out": Path})
    if len(folders) != 1:
        raise OviError(f"ovi data report takes one folder, got {', '.join(folders) or 'none'}\n{USAGE}")
    folder = folders[0]
    index = ShardIndex.load(folder)
    # Behind a URL nothing is written: the page is for whoever asks, where they ask.
    out = settings.get("out", Path("report.html") if is_remote(folder) else Path(folder) / "report.html")
    written = data_report(
        list(kept_records(index)),
        rejected_records(folder),
        out,
        limits=index.content.get("limits", {}),
        steps=index.content.get("throughput", {}).get("steps"),
    )
    print(written)


def rejected_records(folder: str) -> list[dict[str, Any]]:
    """Lines of the set's ``rejected.jsonl``; none where there is no such file."""
    where = join(folder, REJECTED)
    try:
        raw = read_remote(where) if is_remote(where) else Path(where).read_bytes()
        return [record for _, record in json_lines(raw.decode("utf-8"), where)]
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise OviError(f"{where}: cannot be read ({error})") from error


@contextmanager
def _opened(shard: Shard) -> Iterator[IO[bytes]]:
    """A shard to seek in: of one behind a URL little more is fetched than what is read."""
    if not is_remote(shard.location):
        with open(shard.location, "rb") as file:
            yield file
        return
    system, path = file_system(shard.location)
    with reaching(shard.location):
        opened = system.open(path, "rb", block_size=_BLOCK)
    with opened as file:
        yield file


def kept_records(index: ShardIndex) -> Iterator[dict[str, Any]]:
    """What is known about each sample of a set: file, place and figures; tensors are skipped over."""
    for split in index.splits:
        for shard in index.splits[split]:
            try:
                with _opened(shard) as content, tarfile.open(fileobj=content) as tar:
                    for member in tar:
                        if member.name.endswith(".json") and (file := tar.extractfile(member)) is not None:
                            about = json.load(file)
                            yield {"key": member.name.removesuffix(".json"), "figures": {}, **about}
            except (OSError, tarfile.TarError, ValueError) as error:
                raise OviError(
                    f"{shard.location}: cannot be read ({error}); `ovi data check {index.folder}`"
                ) from error
