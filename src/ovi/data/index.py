"""The index of a folder of latent shards: what is in it, and what made it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovi.clock import Clock
from ovi.codecs.bundle import Codecs
from ovi.errors import OviError

FORMAT, VERSION = "ovi-latent-shards", 1
INDEX, REJECTED, JOURNAL = "index.json", "rejected.jsonl", ".encode"
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Shard:
    """One tar file, and what the index says of it."""

    path: Path
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """A whole set of shards; ``load`` reads one.

    Args:
        folder: where the shards are.
        clock: rates of the latents.
        num_frames, height, width: of a clip, in frames and pixels.
        latent_shapes: ``{"video": (C, F, h, w), "audio": (L, C)}``.
        splits: the shards of each split, in order.
        content: the whole index, as stored.
    """

    folder: Path
    clock: Clock
    num_frames: int
    height: int
    width: int
    latent_shapes: dict[str, tuple[int, ...]]
    splits: dict[str, tuple[Shard, ...]]
    content: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> ShardIndex:
        """Read a folder's ``index.json`` and see that every shard is there with its size.

        Args:
            path: the folder, or its index.json.

        Raises:
            OviError: when there is none, it is of another format or version, or a shard is missing or not whole.
        """
        path = Path(path)
        path = path if path.name == INDEX else path / INDEX
        content = _read(path)
        try:
            index = cls(
                folder=path.parent,
                clock=Clock(**content["clock"]),
                num_frames=int(content["num_frames"]),
                height=int(content["height"]),
                width=int(content["width"]),
                latent_shapes={name: tuple(shape) for name, shape in content["latent_shapes"].items()},
                splits={
                    split: tuple(
                        Shard(path.parent / s["file"], int(s["num_samples"]), int(s["num_bytes"]), s["sha256"])
                        for s in entry["shards"]
                    )
                    for split, entry in content["splits"].items()
                },
                content=content,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OviError(
                f"{path}: is not a whole index ({type(error).__name__}: {error}); encode the set again"
            ) from None
        for shards in index.splits.values():
            for shard in shards:
                _check(shard)
        return index

    def codecs(self) -> Codecs:
        """The codecs that encoded the set, statistics included: what decodes samples made in its likeness."""
        return Codecs.from_dict(self.content["codecs"])

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


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (path.parent / JOURNAL).is_dir():
            raise OviError(
                f"{path.parent}: its encoding was not finished, so it has no {INDEX}; run the same `ovi encode` again, "
                f"it continues"
            ) from None
        raise OviError(f"{path}: not found; give the folder that `ovi encode` wrote as data.path") from None
    except (OSError, ValueError) as error:
        raise OviError(f"{path}: cannot be read as JSON ({error}); encode the set again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise OviError(f"{path}: is not an index of latent shards (format {FORMAT!r} expected)")
    if content.get("version") != VERSION:
        raise OviError(
            f"{path}: is of format version {content.get('version')!r}, this ovi reads version {VERSION}; encode the "
            f"set again, or use the ovi that wrote it"
        )
    return content


def _check(shard: Shard) -> None:
    try:
        size = shard.path.stat().st_size
    except FileNotFoundError:
        raise OviError(f"{shard.path}: is in the index but not there; copy it, or run `ovi encode` again") from None
    if size != shard.num_bytes:
        raise OviError(
            f"{shard.path}: has {size} bytes, the index says {shard.num_bytes}: copied in part, or of another set; "
            f"copy it again, or run `ovi encode` again"
        )
