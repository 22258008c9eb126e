"""Where ``ovi evaluate`` has its clips from: files of any model, shards, or a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from ovi.commands.prompt_table import Prompt
from ovi.data.files import sha256, whole_file
from ovi.data.media import Clip, MediaError, probe, read_clip
from ovi.errors import OviError
from ovi.metrics.clip_metric import MeasuredClip, planted_truth

Counterpart = Callable[[int], np.ndarray | None]
"""From a generated clip's number to the sound of the real clip of the same prompt; None where there is none."""


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
    rejected: list[dict[str, str]]
    counterpart: Counterpart | None

    def __len__(self) -> int: ...

    def __call__(self, places: Sequence[int]) -> Iterator[MeasuredClip]:
        """The clips at these places; those that cannot be had are left out and noted in ``rejected``."""
        ...


class RealClips(Clips, Protocol):
    """Clips that others are held against."""

    def describe(self, count: int) -> dict[str, Any]:
        """Plain data that names the first clips and all that is known of them: key of their kept statistics."""
        ...

    def sound(self, number: int) -> np.ndarray | None:
        """Waveform of the clip of this number alone; None when it cannot be had."""
        ...


@dataclass
class FileClips:
    """Video files with sound, by whatever model or camera; ``names`` are their paths in the folder."""

    folder: Path
    files: list[Path]
    reading: Reading
    real: bool
    prompts: Mapping[str, Prompt] = field(default_factory=dict)
    counterpart: Counterpart | None = None
    rejected: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def names(self) -> list[str]:
        return names_in(self.folder, self.files)

    def describe(self, count: int) -> dict[str, Any]:
        names = self.names[:count]
        prompts = {name: self.prompts[name] for name in names if name in self.prompts}
        return {
            "files": {name: _digest(file) for name, file in zip(names, self.files)},
            "prompts": {name: [prompt.caption, dict(prompt.extra)] for name, prompt in prompts.items()},
            "reading": vars(self.reading),
        }

    def sound(self, number: int) -> np.ndarray | None:
        clip = self._read(number)
        return clip.waveform if clip else None

    def _read(self, number: int) -> Clip | None:
        try:
            return self.reading.read(self.files[number])
        except MediaError as error:
            self.rejected.append({"file": str(self.files[number]), "reason": error.reason, "error": str(error)})
            return None

    def __call__(self, places: Sequence[int]) -> Iterator[MeasuredClip]:
        for number in places:
            clip = self._read(number)
            if clip is None:
                continue
            prompt = self.prompts.get(self.names[number])
            yield MeasuredClip(
                clip.frames,
                clip.waveform,
                number=number,
                real=self.real,
                caption=prompt.caption if prompt else "",
                truth=planted_truth(prompt.extra) if prompt else {},
                real_waveform=self.counterpart(number) if self.counterpart else None,
            )


@dataclass
class ShardClips:
    """Validation clips of a folder of latent shards, decoded from their latents: those with pictures and sound that
    have the first one's shape, numbered in their stored order, damaged ones counted in."""

    index: Any
    codecs: Any
    device: Any
    real: bool = True
    counterpart: Counterpart | None = None
    rejected: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._numbers)

    @cached_property
    def _dataset(self) -> Any:
        from ovi.data.shards import LatentShards

        return LatentShards(self.index, "val")

    @cached_property
    def _numbers(self) -> list[int]:
        """Numbers of these clips in the split."""
        shapes = [shard.shapes for shard in self._dataset.shards for _ in range(shard.num_samples)]
        whole = next((shape for shape in shapes if shape.whole), None)
        return [number for number, shape in enumerate(shapes) if whole is not None and shape == whole]

    def samples(self, numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """(number, batch of one) of these clips; damaged ones are left out and noted in ``rejected``."""
        from ovi.data.shards import Damage, collate

        for number in numbers:
            try:
                yield number, collate([self._dataset[self._numbers[number]]])
            except Damage as error:
                record = {"file": error.skipped.shard, "reason": "damaged", "error": str(error.skipped)}
                self.rejected.append(record)

    def prompts(self, limit: int | None) -> dict[int, Prompt]:
        """By number, the prompts of the first clips that can be read."""
        samples = self.samples(range(len(self)))
        return {number: Prompt(s.captions[0], "", s.extra[0]) for number, s in islice(samples, limit)}

    def describe(self, count: int) -> dict[str, Any]:
        shards = [[s.sha256, s.num_samples, str(s.shapes)] for s in self.index.splits["val"]]
        return {"codecs": self.index.content["codecs"], "shards": shards, "count": count}

    def sound(self, number: int) -> np.ndarray | None:
        from ovi.codecs.bundle import fit_length

        for _, sample in self.samples([number]):
            codec, clock = self.codecs.audio.to(self.device), self.codecs.clock
            with torch.no_grad():
                waveform = codec.decode(sample.audio.to(codec.mean)).clamp(-1, 1)
            num_samples = clock.num_samples(clock.num_frames(sample.video.shape[2]))
            return np.asarray(fit_length(waveform, num_samples)[0].cpu())
        return None

    def __call__(self, places: Sequence[int]) -> Iterator[MeasuredClip]:
        from ovi.generate import decoded

        for codec in (self.codecs.video, self.codecs.audio):
            codec.to(self.device)
        for number, sample in self.samples(places):
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
    prompts: Mapping[int, Prompt]
    device: Any
    size: tuple[int, int, int]
    keep: Path | None = None
    counterpart: Counterpart | None = None
    real: bool = False
    rejected: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    def __call__(self, places: Sequence[int]) -> Iterator[MeasuredClip]:
        from ovi.data.media import write_clip

        codecs, model = self.restored.codecs.to(self.device), self.restored.model.to(self.device)
        shapes = codecs.latent_shapes(*self.size)
        numbers = list(self.prompts)
        step = self.generator.batch_size
        for start in range(0, len(places), step):
            chunk = [numbers[place] for place in places[start : start + step]]
            texts = [t.to(self.device) for t in codecs.text.encode([self.prompts[n].caption for n in chunk])]
            clips = self.generator.clips(model, codecs, (shapes["video"], shapes["audio"]), texts, chunk)
            for number, clip in zip(chunk, clips):
                if self.keep is not None:
                    write_clip(self.keep / kept_name(number), clip)
                prompt = self.prompts[number]
                yield MeasuredClip(
                    clip.frames,
                    clip.waveform,
                    number=number,
                    caption=prompt.caption,
                    truth=planted_truth(prompt.extra),
                    real_waveform=self.counterpart(number) if self.counterpart else None,
                )

    def write_list(self, count: int) -> None:
        """Write ``samples.jsonl`` beside the first clips, as ``ovi sample`` does: file, prompt, and what else is known
        of each, such as planted truths."""
        assert self.keep is not None
        known = [
            {"file": kept_name(number), "caption": prompt.caption}
            | {name: value for name, value in prompt.extra.items() if name not in ("file", "caption")}
            for number, prompt in islice(self.prompts.items(), count)
        ]
        with whole_file(self.keep / "samples.jsonl") as file:
            file.write("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in known).encode())


def kept_name(number: int) -> str:
    """File name of a clip that a checkpoint generated."""
    return f"{number:05d}.mp4"


def names_in(folder: Path, files: Iterable[Path]) -> list[str]:
    """What files are called: their paths in the folder, since those in subfolders may share their names."""
    return [file.relative_to(folder).as_posix() for file in files]


def _digest(file: Path) -> str:
    try:
        return sha256(file)
    except OSError as error:  # it will be left out when its turn comes
        return f"cannot be read: {error.strerror}"


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
