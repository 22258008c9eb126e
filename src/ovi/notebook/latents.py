"""A set of latent shards to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovi.commands.kernel import in_notebook
from ovi.errors import OviError
from ovi.notebook.short_errors import ShortErrors
from ovi.notebook.tables import html_table, text_table

if TYPE_CHECKING:
    from ovi.codecs.bundle import Codecs
    from ovi.data.batch import LatentBatch
    from ovi.data.shards import LatentSample
    from ovi.layout import LatentLayout
    from ovi.notebook.clips import Clips


class Latents:
    """The shards of a folder, as ``ovi encode`` wrote them.

    Args:
        path: the folder, or its URL.
        codec_paths: where the codecs' weights lie on this machine, ``{"video": ..., "audio": ..., "text": ...}``; what
            is absent lies where it lay.

    Raises:
        OviError: when there is no whole set.
    """

    def __init__(self, path: str | Path, codec_paths: Mapping[str, str | None] | None = None) -> None:
        from ovi.data.index import ShardIndex

        self.path, self.codec_paths = str(path), codec_paths
        with ShortErrors():
            self.index = ShardIndex.load(path)

    @cached_property
    def codecs(self) -> Codecs:
        """Those that encoded it."""
        return self.index.codecs(self.codec_paths)

    @cached_property
    def layout(self) -> LatentLayout:
        """What its latents look like to a network."""
        return self.index.layout(self.codec_paths)

    def batch(self, numbers: int | Sequence[int], *, split: str = "train") -> LatentBatch:
        """Samples as a batch of latents, float32.

        Args:
            numbers: of the samples in stored order, or how many of the first.
            split: ``train`` or ``val``.

        Raises:
            OviError: for a split or a sample that is not there, or samples of several shapes.
        """
        import torch

        from ovi.data.batch import LatentBatch
        from ovi.data.shards import LatentShards

        count = self.index.num_samples(split) if split in self.index.splits else 0
        wanted = list(range(min(numbers, count)) if isinstance(numbers, int) else numbers)
        if not wanted or any(not 0 <= n < count for n in wanted):
            raise OviError(
                f"{self.path} has samples 0 to {count - 1} in {split!r} (splits: {', '.join(self.index.splits)}); "
                f"got {numbers}"
            )
        with ShortErrors():
            dataset = LatentShards(self.index, split)
            samples = [dataset[n] for n in wanted]
        alike = [n for n, s in zip(wanted, samples) if _shapes(s) == _shapes(samples[0])]
        if len(alike) < len(samples):
            raise OviError(
                f"{self.path} holds samples of several shapes, and a batch has one: of those asked for, {alike} "
                f"are like sample {wanted[0]}; ask for samples of one shape at a time"
            )
        abouts = [dict(s.about) for s in samples]
        captions = [str(about.pop("caption", "")) for about in abouts]
        made = LatentBatch(
            torch.stack([s.video for s in samples]),
            torch.stack([s.audio for s in samples]),
            [s.text for s in samples],
            captions,
            [s.key for s in samples],
            abouts,
        )
        return made.to("cpu")

    def clips(self, numbers: int | Sequence[int], *, split: str = "train") -> Clips:
        """The same samples decoded to clips, with their captions.

        Raises:
            OviError: as ``batch``, or for samples without pictures or without sound.
        """
        from ovi.generate import decoded
        from ovi.notebook.clips import Clips

        batch = self.batch(numbers, split=split)
        if not (batch.has_video and batch.has_audio):
            lacks = "sound" if batch.has_video else "pictures"
            raise OviError(f"these samples of {self.path} have no {lacks}: clips want both; batch() has their latents")
        return Clips(decoded(self.codecs, batch.video, batch.audio), batch.captions)

    def __repr__(self) -> str:
        title, rows = self._table()
        return text_table(rows, title=title)

    def _repr_html_(self) -> str:
        title, rows = self._table()
        return html_table(rows, title=title)

    def _table(self) -> tuple[str, list[tuple[Any, ...]]]:
        from ovi.notebook.reprs import clock_table, index_table

        _, rows = index_table(self.index)
        return f"latents in {self.path}", [*rows, *clock_table(self.index.clock)[1]]


def latents(path: str | Path, *, codec_paths: Mapping[str, str | None] | None = None) -> Latents:
    """Open a set of latent shards to look at; arguments as for ``Latents``.

    Raises:
        OviError: when there is no whole set.
    """
    return Latents(path, codec_paths)


def _shapes(sample: LatentSample) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(sample.video.shape), tuple(sample.audio.shape)


def encode(*overrides: str) -> Latents:
    """Encode clips to latent shards as ``ovi encode`` does; what is there already is used again.

    Args:
        overrides: as on the command line: ``"set=demo"``, ``"out=data/mine"``, ...

    Raises:
        OviError: as the command does.
    """
    from rich.console import Console

    with ShortErrors():
        from ovi.commands.compose import compose, task_config
        from ovi.commands.encode import encode_source

        # A notebook keeps every update of a bar: there the last one is enough.
        console = Console(force_jupyter=False, force_terminal=False, width=100) if in_notebook() else None
        summary = encode_source(task_config(compose("encode", overrides)), console)
    return Latents(summary.folder)
