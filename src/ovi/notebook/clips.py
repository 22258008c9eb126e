"""Clips that play in a notebook, with sound."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from ovi.data.media import Clip

_WIDTH = 192
"""Pixels that a small clip is enlarged to."""


class Clips(Sequence["Clip"]):
    """Clips in their order, shown as a grid of players.

    Args:
        clips: what is shown.
        captions: one a clip; fewer leave the rest without.
        columns: players in a row.
    """

    def __init__(self, clips: Iterable[Clip], captions: Iterable[str] = (), *, columns: int = 4) -> None:
        self.clips, self.captions, self.columns = list(clips), list(captions), columns
        self.captions += [""] * (len(self.clips) - len(self.captions))

    def __len__(self) -> int:
        return len(self.clips)

    @overload
    def __getitem__(self, index: int) -> Clip: ...
    @overload
    def __getitem__(self, index: slice) -> Clips: ...
    def __getitem__(self, index: int | slice) -> Clip | Clips:
        if isinstance(index, slice):
            return Clips(self.clips[index], self.captions[index], columns=self.columns)
        return self.clips[index]

    def __add__(self, other: Clips) -> Clips:
        return Clips(self.clips + other.clips, self.captions + other.captions, columns=self.columns)

    def __repr__(self) -> str:
        if not self.clips:
            return "no clips"
        first = self.clips[0]
        frames, height, width = first.frames.shape[:3]
        return (
            f"{len(self)} clips; the first has {frames} frames of {height}x{width} at {first.fps:g} frames/s and "
            f"{first.duration_s:g} s of sound at {first.sample_rate} Hz"
        )

    def _repr_html_(self) -> str:
        players = "".join(video_html(clip, caption) for clip, caption in zip(self.clips, self.captions))
        columns = min(self.columns, max(1, len(self)))
        return (
            f'<div style="display:grid;grid-template-columns:repeat({columns},max-content);gap:12px">'
            f"{players or 'no clips'}</div>"
        )

    def save(self, folder: str | Path) -> list[Path]:
        """Write them as mp4 files, ``000.mp4`` and so on; returns the files."""
        from ovi.data.media import write_clip

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{number:03d}.mp4" for number in range(len(self))]
        for file, clip in zip(files, self.clips):
            write_clip(file, clip)
        return files


def show(clips: Clip | Iterable[Clip], captions: str | Iterable[str] = (), *, columns: int = 4) -> Clips:
    """One clip or several as players with sound, for the last line of a cell.

    Args:
        clips: what is shown.
        captions: one a clip.
        columns: players in a row.
    """
    from ovi.data.media import Clip

    given = [clips] if isinstance(clips, Clip) else clips
    return Clips(given, [captions] if isinstance(captions, str) else captions, columns=columns)


def video_html(clip: Clip, caption: str = "", *, width: int | None = None) -> str:
    """A player that holds its clip, mp4 with sound, so that a saved notebook still plays it.

    Args:
        clip: of even height and width.
        caption: below it.
        width: in pixels; None enlarges small clips.
    """
    shown = width or max(_WIDTH, clip.frames.shape[2])
    data = base64.b64encode(_mp4(clip)).decode()
    label = f' aria-label="{escape(caption, quote=True)}"' if caption else ""
    text = f'<figcaption style="width:{shown}px;font-size:smaller">{escape(caption)}</figcaption>' if caption else ""
    return (
        f'<figure style="margin:0"><video controls loop playsinline width="{shown}"{label} '
        f'style="image-rendering:pixelated" src="data:video/mp4;base64,{data}"></video>{text}</figure>'
    )


def _mp4(clip: Clip) -> bytes:
    from ovi.data.media import write_clip

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        write_clip(file, clip)
        return file.read_bytes()
