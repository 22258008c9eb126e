"""Where ``ovi evaluate`` has its clips from: files of any model, shards, or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ovi.commands.prompt_table import Prompt
from ovi.data.files import sha256
from ovi.data.media import Clip, MediaError, probe, read_clip
from ovi.errors import OviError
from ovi.metrics.clip_metric import MeasuredClip, planted_truth


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        fps: frames per second; files of another rate are resampled.
        sample_rate: of the sound, in Hz.
        num_frames: frames of a clip; None for the whole file.
        height, width: pixels; None for those of the file.
        variable_frame_rate: as ``read_clip`` has it.
        without_sound: ``silence`` takes a file without a sound track as silent, ``reject`` leaves it out.
    """

    fps: float
    sample_rate: int
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    variable_frame_rate: Literal["reject", "resample"] = "resample"
    without_sound: Literal["reject", "silence"] = "reject"

    def read(self, path: Path) -> Clip:
        """One file.

        Raises:
            MediaError: when it cannot be read so.
        """
        info = probe(path)
        # The whole of a file is what both tracks hold, which headers promise a little too much of.
        whole_s = min(info.duration_s, info.audio_duration_s or info.duration_s)
        return read_clip(
            path,
            fps=self.fps,
            num_frames=self.num_frames or max(1, int(whole_s * self.fps + 0.01)),
            height=self.height or max(1, info.height),
            width=self.width or max(1, info.width),
            sample_rate=self.sample_rate,
            variable_frame_rate=self.variable_frame_rate,
            without_sound=self.without_sound,
        )


class Clips(Protocol):
    """A set of clips that can be gone through once."""

    real: bool

    def __len__(self) -> int: ...

    def describe(self) -> dict[str, Any]:
        """Plain data that names the set, for the result and as key of kept statistics."""
        ...

    def __call__(self, numbers: Sequence[int]) -> Iterator[MeasuredClip]:
        """The clips of these numbers; those that cannot be had are left out and noted in ``rejected``."""
        ...

    rejected: list[dict[str, str]]


@dataclass
class FileClips:
    """Video files with sound, by whatever model or camera."""

    files: list[Path]
    reading: Reading
    real: bool
    prompts: dict[str, Prompt] = field(default_factory=dict)
    counterpart: Callable[[Path], np.ndarray | None] | None = None
    rejected: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.files)

    def describe(self) -> dict[str, Any]:
        return {"files": {file.name: sha256(file) for file in self.files}, "reading": vars(self.reading)}

    def __call__(self, numbers: Sequence[int]) -> Iterator[MeasuredClip]:
        for number in numbers:
            file = self.files[number]
            try:
                clip = self.reading.read(file)
            except MediaError as error:
                self.rejected.append({"file": str(file), "reason": error.reason, "error": str(error)})
                continue
            prompt = self.prompts.get(file.name)
            yield MeasuredClip(
                clip.frames,
                clip.waveform,
                number=number,
                real=self.real,
                caption=prompt.caption if prompt else "",
                truth=planted_truth(prompt.extra) if prompt else {},
                real_waveform=self.counterpart(file) if self.counterpart else None,
            )


@dataclass
class ShardClips:
    """Validation clips of a folder of latent shards, decoded from their latents."""

    index: Any
    codecs: Any
    real: bool = True
    rejected: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return int(self.index.num_samples("val"))

    def about(self, numbers: Sequence[int]) -> list[tuple[str, dict[str, Any]]]:
        """(caption, further facts) of these clips, in order."""
        return [(s.captions[0], s.extra[0]) for _, s in validation_samples(self.index, numbers)]

    def sound(self, number: int) -> np.ndarray | None:
        """Waveform of one clip."""
        return next((clip.waveform for clip in self([number])), None)

    def describe(self) -> dict[str, Any]:
        return {"codecs": self.index.content["codecs"], "shards": [s.sha256 for s in self.index.splits["val"]]}

    def __call__(self, numbers: Sequence[int]) -> Iterator[MeasuredClip]:
        from ovi.generate import decoded

        for number, sample in validation_samples(self.index, numbers):
            (clip,) = decoded(self.codecs, sample.video, sample.audio)
            yield MeasuredClip(
                clip.frames,
                clip.waveform,
                number=number,
                real=True,
                caption=sample.captions[0],
                truth=planted_truth(sample.extra[0]),
            )


@dataclass
class GeneratedClips:
    """Clips that a checkpoint generates, each from its prompt and its number alone."""

    restored: Any
    generator: Any
    prompts: list[Prompt]
    device: Any
    size: tuple[int, int, int]
    keep: Path | None = None
    counterpart: Callable[[int], np.ndarray | None] | None = None
    real: bool = False
    rejected: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    def describe(self) -> dict[str, Any]:
        return {"step": self.restored.step, "size": list(self.size), "prompts": len(self.prompts)}

    def __call__(self, numbers: Sequence[int]) -> Iterator[MeasuredClip]:
        from ovi.data.media import write_clip

        codecs, model = self.restored.codecs.to(self.device), self.restored.model.to(self.device)
        shapes = codecs.latent_shapes(*self.size)
        step = self.generator.batch_size
        for start in range(0, len(numbers), step):
            chunk = list(numbers[start : start + step])
            texts = [t.to(self.device) for t in codecs.text.encode([self.prompts[n].caption for n in chunk])]
            clips = self.generator.clips(model, codecs, (shapes["video"], shapes["audio"]), texts, chunk)
            for number, clip in zip(chunk, clips):
                if self.keep is not None:
                    write_clip(self.keep / f"{number:05d}.mp4", clip)
                prompt = self.prompts[number]
                yield MeasuredClip(
                    clip.frames,
                    clip.waveform,
                    number=number,
                    caption=prompt.caption,
                    truth=planted_truth(prompt.extra),
                    real_waveform=self.counterpart(number) if self.counterpart else None,
                )


def validation_samples(index: Any, numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """(number, batch of one) of the validation samples with these numbers, in their stored order."""
    from ovi.data.shards import LatentDataset, collate

    wanted = set(numbers)
    dataset = LatentDataset(index, "val")
    for number, sample in enumerate(dataset):
        if number in wanted:
            yield number, collate([sample])
        if number >= max(wanted, default=-1):
            return


def files_in(folder: str | Path, knob: str) -> list[Path]:
    """Video files of a folder, by name.

    Raises:
        OviError: when there is no such folder, or none in it.
    """
    from ovi.data.sources import SUFFIXES, media_files

    path = Path(folder)
    if not path.is_dir():
        raise OviError(f"{knob}={folder}: there is no such folder")
    files = sorted(media_files(path))
    if not files:
        raise OviError(f"{knob}={folder}: holds no video file ({', '.join(SUFFIXES)})")
    return files
