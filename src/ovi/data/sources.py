"""Where clips come from: a folder of media files, or scenes drawn on the spot.

A source lists media files with their captions; it decodes nothing. ``encode`` asks it for them, cuts and encodes.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from warnings import warn

from ovi.data.captions import NAMES, find_captions, parse_captions, read_captions
from ovi.data.files import writing_failed
from ovi.data.reading.remote import is_remote, join, read_remote
from ovi.data.remote_files import list_files
from ovi.errors import OviError
from ovi.registry import Registry

SOURCES = Registry("source", group="source", doc="where clips with sound come from")

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm")
_OTHERS = (".m4v", ".avi", ".flv", ".mpg", ".mpeg", ".m2ts", ".ts", ".wmv", ".3gp", ".ogv")
"""Of video files too; those that lie beside files that are taken are told of."""
SOUND_SUFFIXES = (".wav", ".flac", ".mp3", ".m4a")
"""Files of sound alone, listed where clips of sound alone are wanted."""


@dataclass(frozen=True)
class ClipFormat:
    """What a clip is read as: frames per second, frames, pixels, and Hz of its sound.

    Height and width are 0 for sound alone, which lasts as long as the frames would; the rate of the sound is 0 for
    pictures alone.
    """

    fps: float
    num_frames: int
    height: int
    width: int
    sample_rate: int

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.fps

    @property
    def missing(self) -> frozenset[str]:
        """What clips are without: "video", "audio" or neither."""
        absent = {"video": not self.height, "audio": not self.sample_rate}
        return frozenset(name for name, gone in absent.items() if gone)

    def without(self, missing: Collection[str]) -> ClipFormat:
        """The same less "video" or "audio"."""
        made = replace(self, height=0, width=0) if "video" in missing else self
        return replace(made, sample_rate=0) if "audio" in missing else made


@dataclass(frozen=True)
class SourceItem:
    """One media file.

    Args:
        key: unique and stable name of letters, digits, ``-`` and ``_``; made from the path inside the source.
        path: of the file; of one behind a URL only once it was fetched (``ovi.data.local_copies``).
        file: the path inside the source, as captions and reports name it.
        caption: prompt; empty without one.
        extra: further fields of the caption file, such as planted truths.
        url: where it is, if not on this machine.
        num_bytes: of a file behind a URL.
    """

    key: str
    path: Path
    file: str
    caption: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    url: str = ""
    num_bytes: int = -1


class Source(ABC):
    """Lists media files; the same files in the same order on every call."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Name and knobs, JSON-ready: what an index says about where its clips came from."""

    @abstractmethod
    def items(self, form: ClipFormat, num_workers: int = 0, *, sound_alone: bool = False) -> list[SourceItem]:
        """The files, sorted by their path inside the source.

        Args:
            form: the clips that will be cut from them; a source that makes its files makes them so.
            num_workers: processes it may use.
            sound_alone: whether files of sound alone count; given only where they do.

        Raises:
            OviError: when there is none.
        """


@SOURCES.register("folder")
class Folder(Source):
    """Every mp4, mov, mkv and webm below a folder, captioned by captions.jsonl or captions.csv beside them.

    With ``incomplete=audio`` or ``both`` of ``ovi encode`` every wav, flac, mp3 and m4a as well.

    Args:
        path: the folder, searched recursively; hidden files and folders are left out. It may be an fsspec URL
            (``s3://bucket/videos``): files are then fetched one by one, when their turn comes.
        captions: caption file, or its URL; None takes ``captions.jsonl`` or ``captions.csv`` of the folder, if there.
        suffixes: of the video files that are taken, ``[.mp4, .m4v, .avi]``; any that FFmpeg reads.
    """

    def __init__(self, *, path: str, captions: str | None = None, suffixes: Sequence[str] = SUFFIXES) -> None:
        self.suffixes = tuple(str(suffix).lower() for suffix in suffixes)
        if isinstance(suffixes, str) or not self.suffixes or any(s[0] != "." or len(s) < 2 for s in self.suffixes):
            raise OviError(f"source.suffixes is a list such as [.mp4, .avi], got {suffixes!r}")
        self.path: Path | str = path.rstrip("/") if is_remote(path) else Path(path)
        self.captions: Path | str | None = captions if captions is None or is_remote(captions) else Path(captions)

    def describe(self) -> dict[str, Any]:
        said = {"name": "folder", "path": str(self.path), "captions": self.captions and str(self.captions)}
        return said if self.suffixes == SUFFIXES else {**said, "suffixes": list(self.suffixes)}

    def items(self, form: ClipFormat, num_workers: int = 0, *, sound_alone: bool = False) -> list[SourceItem]:
        suffixes = self.suffixes + SOUND_SUFFIXES if sound_alone else self.suffixes
        others = tuple(suffix for suffix in _OTHERS if suffix not in suffixes)
        if isinstance(self.path, str):
            return self._remote_items(self.path, suffixes, others)
        if not self.path.is_dir():
            raise OviError(f"{self.path}: there is no such folder; source.path names a folder of media files")
        listed = media_files(self.path, suffixes + others)
        files = sorted(p.relative_to(self.path).as_posix() for p in listed if p.name.lower().endswith(suffixes))
        _tell_of_others(self.path, [p.name for p in listed if not p.name.lower().endswith(suffixes)])
        if not files:
            raise OviError(f"{self.path}: no {', '.join(suffixes)} files in it or below it; is source.path right?")
        folder, caption_file = self.path, self.captions or find_captions(self.path)
        if isinstance(caption_file, str):
            captions = parse_captions(
                _caption_bytes(caption_file), caption_file, folder, lambda name: (folder / name).is_file()
            )
        else:
            captions = read_captions(caption_file, folder) if caption_file else {}
        _check_captioned(caption_file, captions, files, suffixes)
        return [_item(folder, file, captions.get(file, {})) for file in files]

    def _remote_items(self, url: str, suffixes: tuple[str, ...], others: tuple[str, ...]) -> list[SourceItem]:
        sizes = list_files(url)
        files = sorted(file for file in sizes if _is_media(file, suffixes))
        _tell_of_others(url, [file for file in sizes if _is_media(file, others)])
        if not files:
            raise OviError(f"{url}: no {', '.join(suffixes)} files in it or below it; is source.path right?")
        caption_file = self.captions
        if caption_file is None:
            found = [name for name in NAMES if name in sizes]
            if len(found) > 1:
                raise OviError(f"{url} has {' and '.join(NAMES)}: which one counts? Name it with captions=URL")
            caption_file = join(url, found[0]) if found else None
        captions = {}
        if caption_file is not None:
            captions = parse_captions(_caption_bytes(caption_file), caption_file, url, sizes.__contains__)
        _check_captioned(caption_file, captions, files, suffixes)
        return [
            replace(_item(Path(), file, captions.get(file, {})), url=join(url, file), num_bytes=sizes[file])
            for file in files
        ]


@SOURCES.register("synthetic")
class Synthetic(Source):
    """Bouncing balls whose impacts sound, drawn to mp4 files whose truth is known; see ``ovi.data.synthetic``.

    Args:
        path: folder for the files; those of an earlier run with the same knobs are used again.
        num_clips: how many.
        seed: the same seed draws the same clips.
        num_balls: fewest and most balls of a clip, 1 to 3.
        max_impacts: the most impacts of a clip.
        min_interval_s: the least time between two impacts.
        drop_height: range of the bounce's apex above the floor, in picture heights.
        travel: range of the share of its lane that a ball drifts across during the clip.
        restitution: range of the speed after over the speed before an impact.
        floor_height: range of the floor's top, in picture heights.
        noise_level: standard deviation of the background noise, full scale 1.
    """

    def __init__(
        self,
        *,
        path: str,
        num_clips: int = 512,
        seed: int = 0,
        num_balls: Sequence[int] = (1, 1),
        max_impacts: int = 5,
        min_interval_s: float = 0.45,
        drop_height: Sequence[float] = (0.3, 0.45),
        travel: Sequence[float] = (0.0, 0.5),
        restitution: Sequence[float] = (0.8, 1.0),
        floor_height: Sequence[float] = (0.06, 0.2),
        noise_level: float = 0.0005,
    ) -> None:
        if num_clips < 1:
            raise OviError(f"source.num_clips must be at least 1, got {num_clips}")
        self.path, self.num_clips, self.seed = Path(path), num_clips, seed
        self.scene = {
            "num_balls": tuple(num_balls),
            "max_impacts": max_impacts,
            "min_interval_s": min_interval_s,
            "drop_height": tuple(drop_height),
            "travel": tuple(travel),
            "restitution": tuple(restitution),
            "floor_height": tuple(floor_height),
            "noise_level": noise_level,
        }

    def describe(self) -> dict[str, Any]:
        return {
            "name": "synthetic",
            "path": str(self.path),
            "num_clips": self.num_clips,
            "seed": self.seed,
            **self.scene,
        }

    def items(self, form: ClipFormat, num_workers: int = 0, *, sound_alone: bool = False) -> list[SourceItem]:
        from ovi.data.synthetic import write_synthetic

        try:
            captions = write_synthetic(
                self.path,
                num_clips=self.num_clips,
                seed=self.seed,
                knobs=self.scene,
                num_workers=num_workers if num_workers > 1 else 0,
                **asdict(form),
            )
        except OSError as error:
            raise writing_failed(self.path, error) from error
        # The caption file, not the folder: an earlier run may have drawn more clips than are asked for now.
        records = read_captions(captions, self.path)
        return [_item(self.path, file, records[file]) for file in sorted(records)]


def _tell_of_others(where: Path | str, names: Sequence[str]) -> None:
    if names:
        counts = Counter(Path(name).suffix.lower() for name in names).most_common()
        told = ", ".join(f"{count} {suffix}" for suffix, count in counts)
        more = ",".join(suffix for suffix, _ in counts)
        warn(f"{where}: passed over {told} files; source.suffixes=[.mp4,{more}] takes them", stacklevel=3)


def _caption_bytes(location: Path | str) -> bytes:
    try:
        return read_remote(location) if isinstance(location, str) else location.read_bytes()
    except OSError as error:
        raise OviError(f"{location}: cannot be read as UTF-8 text ({error})") from error


def _check_captioned(
    caption_file: Path | str | None, captions: Collection[str], files: Collection[str], suffixes: tuple[str, ...]
) -> None:
    ignored = sorted(set(captions) - set(files))
    if ignored:
        raise OviError(
            f"{caption_file}: names {ignored[0]!r}, which is there but is not a clip: "
            f"known are {', '.join(suffixes)} outside hidden folders"
            + (
                "; set incomplete=audio for files of sound alone"
                if ignored[0].lower().endswith(SOUND_SUFFIXES) and not set(SOUND_SUFFIXES) & set(suffixes)
                else ""
            )
        )


def _is_media(file: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a posix path is of a media file, and nothing on it is hidden."""
    return file.lower().endswith(suffixes) and not any(part.startswith(".") for part in file.split("/"))


def _item(folder: Path, file: str, record: dict[str, Any]) -> SourceItem:
    extra = {name: value for name, value in record.items() if name != "caption"}
    return SourceItem(stable_key(file), folder / file, file, record.get("caption", ""), extra)


def media_files(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Media files below a folder, hidden ones left out, links to folders followed, but not back to where one is."""
    found = []
    above = {os.fspath(folder): frozenset((os.path.realpath(folder),))}
    for parent, folders, names in os.walk(folder, followlinks=True):
        # Those on the way here alone: a folder that two names lead to is found by both, whichever comes first.
        passed, entered = above.pop(parent), {}
        for name in folders:
            inside = os.path.join(parent, name)
            real = os.path.realpath(inside)
            if not name.startswith(".") and real not in passed:
                entered[name] = above[inside] = passed | {real}
        folders[:] = sorted(entered)
        found += [Path(parent) / n for n in names if n.lower().endswith(suffixes) and not n.startswith(".")]
    return [path for path in found if not _never_ends(path)]


def _never_ends(path: Path) -> bool:
    """Whether opening it may wait for ever: pipes, sockets and devices are no media files, whatever they are called."""
    try:
        mode = path.stat().st_mode
    except OSError:  # a dangling link; reading it will reject it
        return False
    return not stat.S_ISREG(mode)


def stable_key(file: str) -> str:
    """Key of a path: its readable part, then 12 hex digits of its hash, so that "a b.mp4" and "a_b.mp4" differ."""
    readable = re.sub(r"[^A-Za-z0-9]+", "_", Path(file).stem).strip("_").lower()[:40] or "clip"
    return f"{readable}-{hashlib.blake2b(file.encode('utf-8', 'surrogateescape'), digest_size=6).hexdigest()}"
