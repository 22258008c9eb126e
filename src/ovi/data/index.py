"""The index of a folder of latent shards: what is in it, and what made it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovi.clock import Clock
from ovi.codecs.bundle import REGISTRIES, Codecs
from ovi.data.reading.remote import is_remote, join, read_remote
from ovi.errors import OviError
from ovi.layout import LatentLayout

FORMAT, VERSION = "ovi-latent-shards", 2
READABLE = (1, 2)
"""Versions that ``load`` reads. In 2 a shard may have latent shapes of its own; in 1 all have the set's."""
_LEAST_BYTES = 1024
"""Of a sample in a tar: the headers of its two members."""
INDEX, REJECTED, JOURNAL = "index.json", "rejected.jsonl", ".encode"
SPLITS = ("train", "val")


@dataclass(frozen=True)
class LatentShapes:
    """Shapes of one sample's latents.

    Args:
        video: (C, F, h, w); (C, 0, 0, 0) for sound alone.
        audio: (L, C); (0, C) for pictures alone.
    """

    video: tuple[int, ...]
    audio: tuple[int, ...]

    @property
    def num_positions(self) -> int:
        """Latent positions of both together, before any patching: what a token budget counts."""
        return self.video[1] * self.video[2] * self.video[3] + self.audio[0]

    @property
    def whole(self) -> bool:
        """Whether there are pictures and sound."""
        return bool(self.video[1] and self.audio[0])

    def __str__(self) -> str:
        return f"video {list(self.video)}, audio {list(self.audio)}"


@dataclass(frozen=True)
class Shard:
    """One tar file of samples of one shape, and what the index says of it."""

    location: str
    num_samples: int
    num_bytes: int
    sha256: str
    shapes: LatentShapes

    @property
    def path(self) -> Path:
        """Of a shard on this machine.

        Raises:
            OviError: for one that is elsewhere.
        """
        if is_remote(self.location):
            raise OviError(f"{self.location}: is not on this machine")
        return Path(self.location)


@dataclass(frozen=True)
class ShardIndex:
    """A whole set of shards; ``load`` reads one.

    Args:
        folder: where the shards are; a URL as a string.
        clock: rates of the latents.
        num_frames, height, width: of a clip, in frames and pixels.
        latent_shapes: ``{"video": (C, F, h, w), "audio": (L, C)}`` of such a clip; shards may have others.
        splits: the shards of each split, in order.
        content: the whole index, as stored.
    """

    folder: Path | str
    clock: Clock
    num_frames: int
    height: int
    width: int
    latent_shapes: dict[str, tuple[int, ...]]
    splits: dict[str, tuple[Shard, ...]]
    content: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = True) -> ShardIndex:
        """Read a folder's ``index.json`` and see that every shard on this machine is there with its size.

        Args:
            path: the folder, or its index.json; either may be an fsspec URL.
            verify: look at the shards; without, only the index is read.

        Raises:
            OviError: when there is none, it is of another format or version, or a shard is missing or not whole.
        """
        folder = str(path)
        folder = folder[: -len(INDEX)].rstrip("/") or "." if folder.rstrip("/").endswith(INDEX) else folder
        content = _read(folder)
        where = join(folder, INDEX)
        try:
            shapes = {name: tuple(map(_count, content["latent_shapes"][name])) for name in ("video", "audio")}
            _check_codecs(content)
            index = cls(
                folder=folder if is_remote(folder) else Path(folder),
                clock=Clock(**content["clock"]),
                num_frames=_count(content["num_frames"]),
                height=_count(content["height"]),
                width=_count(content["width"]),
                latent_shapes=shapes,
                splits={
                    split: tuple(
                        Shard(
                            join(folder, s["file"]),
                            _count(s["num_samples"]),
                            _count(s["num_bytes"]),
                            str(s["sha256"]),
                            _shapes(s.get("latent_shapes"), shapes),
                        )
                        for s in entry["shards"]
                    )
                    for split, entry in content["splits"].items()
                },
                content=content,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OviError(
                f"{where}: is not a whole index ({type(error).__name__}: {error}); encode it again"
            ) from None
        if verify:
            for problem in (*index.contradictions(), *index.problems()):
                raise OviError(problem)
        return index

    def contradictions(self) -> list[str]:
        """What in the index cannot be true, whatever the shards hold: it was damaged, or changed by hand."""
        where, found = join(self.folder, INDEX), list[str]()
        for split, shards in self.splits.items():
            said = self.content["splits"][split].get("num_samples")
            if said is not None and said != self.num_samples(split):
                found.append(f"split {split} has {said} samples, its shards {self.num_samples(split)} together")
            found += [
                f"{shard.location} would hold {shard.num_samples} samples in {shard.num_bytes} bytes"
                for shard in shards
                if shard.num_samples * _LEAST_BYTES > shard.num_bytes
            ]
        locations = Counter(shard.location for shards in self.splits.values() for shard in shards)
        found += [f"{location} is listed {count} times" for location, count in locations.items() if count > 1]
        if problem := clock_problem(self.clock, self.shapes):
            found.append(f"clips of {self.num_frames} frames: {problem}")
        return [f"{where}: {one}; `ovi data check` tells more, `ovi encode` writes it anew" for one in found]

    def problems(self) -> list[str]:
        """What is wrong with the shards: those on this machine that are not there, or not with their size."""
        if is_remote(self.folder):
            return []
        found = (_problem(shard) for shards in self.splits.values() for shard in shards)
        return [problem for problem in found if problem is not None]

    def codecs(self, paths: Mapping[str, str | None] | None = None, *, text: bool = True) -> Codecs:
        """The codecs that encoded the set, statistics included: what decodes samples made in its likeness.

        Args:
            paths: where their weights lie on this machine, as ``with_paths`` takes them; None is where they lay.
            text: whether to build the text encoder; decoding does without.
        """
        return Codecs.from_dict(self.content["codecs"], paths, text=text)

    @property
    def shapes(self) -> LatentShapes:
        """Shapes of a clip of the set's own length and size."""
        return LatentShapes(self.latent_shapes["video"], self.latent_shapes["audio"])

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The split's shards.

        Raises:
            OviError: for a split that is not in the set, or holds no sample.
        """
        if split not in self.splits:
            raise OviError(f"{self.folder} has no split {split!r}; it has {', '.join(self.splits)}")
        if not self.splits[split]:
            raise OviError(
                f"{self.folder}: split {split!r} holds no sample; encode again with another val_fraction or more clips"
            )
        return self.splits[split]

    def num_samples(self, split: str) -> int:
        """Samples in a split; 0 for one that is empty or unknown."""
        return sum(shard.num_samples for shard in self.splits.get(split, ()))

    def layout(self, paths: Mapping[str, str | None] | None = None) -> LatentLayout:
        """What the latents look like to a network; no codec is built where the index says how wide its text is."""
        text = self.content.get("text")
        if text is None:
            encoder = self.codecs(paths).text
            text = {"dim": encoder.text_dim, "len": encoder.text_len}
        return LatentLayout(
            self.latent_shapes["video"][0], self.latent_shapes["audio"][1], text["dim"], text["len"], self.clock
        )

    def differences(self, other: ShardIndex) -> list[str]:
        """What keeps samples of both sets from being mixed, one phrase each; empty when nothing does."""
        pairs = {
            "video channels": (self.latent_shapes["video"][0], other.latent_shapes["video"][0]),
            "audio channels": (self.latent_shapes["audio"][1], other.latent_shapes["audio"][1]),
        }
        found = [f"{name} {a} against {b}" for name, (a, b) in pairs.items() if a != b]
        found += self.clock.differences(other.clock)
        mine, theirs = _flat(self.content["codecs"]), _flat(other.content["codecs"])
        incidental = _incidental(self) | _incidental(other)
        for name in dict.fromkeys([*mine, *theirs]):
            if name.startswith(("clock.", "state.")) or name in incidental:
                continue
            if mine.get(name) != theirs.get(name):
                found.append(f"{name} {mine.get(name)!r} against {theirs.get(name)!r}")
        kinds = [kind for kind in ("video", "audio") if _state(self, kind) != _state(other, kind)]
        kinds = [kind for kind in kinds if not other._is_without(kind)]
        if without := [kind for kind in kinds if self._is_without(kind)]:
            found.append(f"the first has no statistics of {' and '.join(without)} latents: name the other one first")
            kinds = [kind for kind in kinds if kind not in without]
        if kinds:
            found.append(
                f"other statistics of the {' and '.join(kinds)} latents: encode one with codecs_of=FOLDER of the other"
            )
        mine, theirs = _state(self, "text"), _state(other, "text")
        if mine is not None and theirs is not None and mine != theirs:
            found.append("embeddings of another text encoder's weights")
        return found

    def _is_without(self, kind: str) -> bool:
        """Whether no sample has pictures, or sound, and their codec has no statistics either."""
        if (_state(self, kind) or {}).get("fitted", True):
            return False
        shapes = (shard.shapes for shards in self.splits.values() for shard in shards)
        return not any(one.video[1] if kind == "video" else one.audio[0] for one in shapes)


def clock_problem(clock: Clock, shapes: LatentShapes) -> str | None:
    """Why latents of these shapes cannot be of one clip, if they cannot."""
    if not shapes.whole:
        return None
    frames, tokens = shapes.video[1], shapes.audio[0]
    expected = clock.num_audio_tokens(clock.num_samples(clock.num_frames(frames)))
    if tokens == expected:
        return None
    return f"{frames} latent frames last as long as {expected} audio tokens, the samples have {tokens}"


def _count(value: Any) -> int:
    """A number of something.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no whole number from 0")
    return value


def _check_codecs(content: Mapping[str, Any]) -> None:
    """See that what tells of the codecs has the form that reads them.

    Raises:
        KeyError, TypeError, ValueError: when it has not.
    """
    for kind in REGISTRIES:
        if not isinstance(content["codecs"][kind]["name"], str):
            raise TypeError(f"the name of the {kind} codec is no text")
    if content.get("text") is not None:
        _count(content["text"]["dim"]), _count(content["text"]["len"])
    if content.get("dtype") not in (None, "float16", "bfloat16", "float32", "int8"):
        raise ValueError(f"dtype {content['dtype']!r}")


def _state(index: ShardIndex, kind: str) -> Any:
    return index.content["codecs"].get("state", {}).get(kind)


def _incidental(index: ShardIndex) -> set[str]:
    """Knobs of the codecs that say nothing about what a latent means; none of a codec that is not installed here."""
    found = set()
    for kind, registry in REGISTRIES.items():
        name = index.content["codecs"].get(kind, {}).get("name")
        if name in registry:
            found |= {f"{kind}.knobs.{knob}" for knob in getattr(registry[name], "incidental_knobs", ())}
    return found


def _flat(content: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(content, Mapping):
        return {name: content}
    return {k: v for key, value in content.items() for k, v in _flat(value, f"{name}.{key}".lstrip(".")).items()}


def _shapes(said: Mapping[str, Any] | None, of_set: dict[str, tuple[int, ...]]) -> LatentShapes:
    """Shapes of a shard: its own, else the set's; a kind that it names no shape for is not in its samples."""
    if said is None:
        said = of_set
    video, audio = (tuple(map(_count, said.get(name) or ())) for name in ("video", "audio"))
    made = LatentShapes(video or (of_set["video"][0], 0, 0, 0), audio or (0, of_set["audio"][1]))
    if len(made.video) != 4 or len(made.audio) != 2 or not (video or audio) or min(made.video + made.audio) < 0:
        raise ValueError(f"latent shapes {made} of a shard")
    return made


def _read(folder: str) -> dict[str, Any]:
    where = join(folder, INDEX)
    try:
        raw = read_remote(where) if is_remote(where) else Path(where).read_bytes()
        content = json.loads(raw.decode("utf-8"))
    except FileNotFoundError:
        if not is_remote(folder) and (Path(folder) / JOURNAL).is_dir():
            raise OviError(
                f"{folder}: its encoding was not finished, so it has no {INDEX}; run the same `ovi encode` again, "
                f"it continues"
            ) from None
        raise OviError(f"{where}: not found; give the folder that `ovi encode` wrote as data.path") from None
    except (OSError, ValueError) as error:
        raise OviError(f"{where}: cannot be read as JSON ({error}); encode the set again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise OviError(f"{where}: is not an index of latent shards (format {FORMAT!r} expected)")
    if content.get("version") not in READABLE:
        raise OviError(
            f"{where}: is of format version {content.get('version')!r}, this ovi reads versions "
            f"{' and '.join(map(str, READABLE))}; encode the set again, or use the ovi that wrote it"
        )
    return content


def _problem(shard: Shard) -> str | None:
    try:
        size = shard.path.stat().st_size
    except FileNotFoundError:
        return f"{shard.path}: is in the index but not there; copy it, or run `ovi encode` again"
    if size != shard.num_bytes:
        return (
            f"{shard.path}: has {size} bytes, the index says {shard.num_bytes}: copied in part, or of another set; "
            f"copy it again, or run `ovi encode` again"
        )
    return None
