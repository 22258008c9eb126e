"""Clips of many runs by prompt, each file once, within a size that a page can carry."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from ovi.errors import OviError
from ovi.runs.jsonl import read_lines
from ovi.runs.run import CLIPS, Run

T = TypeVar("T")

EMBED, LINK, NONE = MEDIA = ("embed", "link", "none")


@dataclass
class Prompt:
    """One prompt and the clips made of it.

    Attributes:
        number: of the clip in validation.
        caption: the prompt; empty where the run did not keep it.
        clips: number of a medium by run.
        real: numbers of the media that show the real clip; one unless runs saw different data.
    """

    number: int
    caption: str
    clips: dict[int, int] = field(default_factory=dict)
    real: list[int] = field(default_factory=list)


@dataclass
class Samples:
    """Prompts, the files they need, and what could not be shown."""

    prompts: list[Prompt] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(_read(file, lambda file: file.stat().st_size) for file in self.files)


def samples_of(runs: Sequence[Run], *, most_prompts: int | None) -> Samples:
    """Clips of the last round of each run, by prompt; equal files (the real ones, mostly) are taken once.

    Clips of one number whose captions differ are of different prompts: they are never put side by side. Where a run
    kept no captions, its real clip says which prompt it was.

    Args:
        runs: in the order of the page.
        most_prompts: only the first so many; None for all.
    """
    found = Samples()
    media: dict[str, int] = {}
    wanted: dict[tuple[int, str, str], list[tuple[int, Path, Path | None]]] = {}
    for place, run in enumerate(runs):
        captions = {line.get("number"): str(line.get("caption") or "") for line in read_lines(run.folder / CLIPS)}
        real = run.real_samples()
        for number, file in run.samples().items():
            caption, original = captions.get(number, ""), real.get(number)
            same = (_digest(original, found.notes) or "") if original is not None and not caption else ""
            wanted.setdefault((number, caption, same), []).append((place, file, original))
    shared_first = sorted(wanted.items(), key=lambda item: (item[0][0], -len(item[1]), item[0][1:]))
    if most_prompts is not None and len(wanted) > most_prompts:
        found.notes.append(f"{len(wanted) - most_prompts} more prompts are left out: prompts=N shows more")
    for (number, caption, _), clips in shared_first[:most_prompts]:
        prompt = Prompt(number, caption)
        for place, file, original in clips:
            for source in (file, original):
                digest = None if source is None else _digest(source, found.notes)
                if source is None or digest is None:
                    continue
                if digest not in media:
                    media[digest] = len(found.files)
                    found.files.append(source)
                if source is file:
                    prompt.clips[place] = media[digest]
                elif media[digest] not in prompt.real:
                    prompt.real.append(media[digest])
        found.prompts.append(prompt)
    found.notes = list(dict.fromkeys(found.notes))
    return found


def _digest(file: Path, notes: list[str]) -> str | None:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:  # a run that goes on may have moved it
        notes.append(f"{file}: cannot be read ({error.strerror})")
        return None


def check_size(samples: Samples, max_mb: float) -> None:
    """Refuse samples that make too large a page.

    Raises:
        OviError: naming the size and the knobs that make it smaller.
    """
    size = samples.num_bytes * 4 / 3 / 1e6  # base64 has four letters for three bytes
    if size > max_mb:
        raise OviError(
            f"{len(samples.files)} clips take {size:.1f} MB in the page, more than max_mb={max_mb:g}. Raise max_mb, "
            f"show fewer prompts (prompts={max(1, len(samples.prompts) // 2)}), or leave the files where they are with "
            "media=link"
        )


def data_uri_body(file: Path) -> str:
    """A file in base64.

    Raises:
        OviError: when it has gone since it was found.
    """
    return base64.b64encode(_read(file, Path.read_bytes)).decode()


def _read(file: Path, how: Callable[[Path], T]) -> T:
    try:
        return how(file)
    except OSError as error:
        raise OviError(
            f"{file}: cannot be read any more ({error.strerror}): its run was removed or began anew meanwhile. Report "
            "again"
        ) from error


def link_to(file: Path, page: Path) -> str:
    """A file's address as seen from the page, relative so that both can move together."""
    return quote(os.path.relpath(file.resolve(), page.resolve().parent).replace(os.sep, "/"))
