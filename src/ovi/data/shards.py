"""Latent shards to batches: every sample exactly once over ranks and workers.

An epoch lays the shards end to end, in an order of its own when shuffled, and gives each consumer (a loader worker of
a rank) one run of samples of that line, all runs equally long to within one. That is one rule for many shards and for
few: no consumer goes empty because there are more consumers than shards, and none reads more than two shards in part.
"""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import safetensors.torch
import torch
import webdataset as wds
from safetensors import SafetensorError
from torch import Tensor, distributed
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander

from ovi.data.batch import LatentBatch
from ovi.data.index import Shard, ShardIndex
from ovi.errors import OviError

__all__ = ["LatentDataset", "LatentSample", "Run", "ShardIndex", "collate", "share"]


@dataclass(frozen=True)
class LatentSample:
    """One clip: video [C, F, h, w], audio [L, C] and text [n, text_dim], float32, and what its json says."""

    key: str
    video: Tensor
    audio: Tensor
    text: Tensor
    about: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Consecutive samples of one shard, from ``start`` to before ``stop``."""

    shard: Shard
    start: int
    stop: int


class LatentDataset(IterableDataset[LatentSample]):
    """Samples of one split, for a DataLoader with ``collate``.

    Samples and their order follow from the arguments, ``epoch`` and the number of consumers alone. Change the epoch
    with ``set_epoch`` before the loader's workers start: a persistent worker keeps the epoch it was born with.

    Args:
        index: of the shards.
        split: "train" or "val".
        shuffle: whether to permute shards, and samples within a buffer, anew in every epoch.
        seed: of the permutations.
        epoch: the epoch to begin with.
        buffer: how many samples the shuffle holds in memory, encoded.
        even: give every consumer the same number of samples, leaving out fewer than there are consumers: ranks then
            make equally many steps, as distributed training needs. Unshuffled, the same ones are left out every time.
        rank, world_size: which share of the samples; None asks torch.distributed, and is the whole where there is none.

    Raises:
        OviError: for an unknown or empty split.
    """

    def __init__(
        self,
        index: ShardIndex,
        split: str,
        *,
        shuffle: bool,
        seed: int = 0,
        epoch: int = 0,
        buffer: int = 1024,
        even: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        if buffer < 1:
            raise OviError(f"the shuffle buffer must hold at least 1 sample, got {buffer}")
        self.index, self.split, self.shards = index, split, index.shards(split)
        self.shuffle, self.seed, self.epoch, self.buffer, self.even = shuffle, seed, epoch, buffer, even
        grouped = distributed.is_available() and distributed.is_initialized()
        self.rank = rank if rank is not None else distributed.get_rank() if grouped else 0
        self.world_size = world_size if world_size is not None else distributed.get_world_size() if grouped else 1
        if not 0 <= self.rank < self.world_size:
            raise OviError(f"rank must be 0 to below world_size, got {self.rank} of {self.world_size}")

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration belongs to."""
        self.epoch = epoch

    def num_batches(self, batch_size: int, *, num_workers: int = 0, drop_last: bool = False) -> int:
        """Batches that a loader with these settings yields on this rank in an epoch."""
        workers = max(1, num_workers)
        sizes = [self._bounds(self.rank * workers + worker, self.world_size * workers) for worker in range(workers)]
        counts = [stop - start for start, stop in sizes]
        return sum(n // batch_size if drop_last else -(-n // batch_size) for n in counts)

    def __iter__(self) -> Iterator[LatentSample]:
        worker = get_worker_info()
        num_workers = worker.num_workers if worker else 1
        consumer = self.rank * num_workers + (worker.id if worker else 0)
        # Runs, not webdataset's splitters by whole shards: see the module's first lines.
        pipeline = wds.DataPipeline(
            lambda: iter(self.runs(consumer, self.world_size * num_workers)),
            read_runs,
            lambda samples: self._shuffled(samples, consumer),
            self._decoded,
        )
        yield from pipeline

    def runs(self, consumer: int, num_consumers: int) -> list[Run]:
        """The runs of samples that one of ``num_consumers`` reads in this epoch."""
        shards = list(self.shards)
        if self.shuffle:
            random.Random(f"shards {self.seed} {self.epoch}").shuffle(shards)
        return share(shards, *self._bounds(consumer, num_consumers))

    def _bounds(self, consumer: int, num_consumers: int) -> tuple[int, int]:
        total = sum(shard.num_samples for shard in self.shards)
        if self.even:
            total -= total % num_consumers
        return total * consumer // num_consumers, total * (consumer + 1) // num_consumers

    def _shuffled(self, samples: Iterator[dict[str, Any]], consumer: int) -> Iterator[dict[str, Any]]:
        """Samples in an order drawn through a buffer: each comes out at random once the buffer is full."""
        if not self.shuffle:
            yield from samples
            return
        draw = random.Random(f"samples {self.seed} {self.epoch} {consumer}")
        held: list[dict[str, Any]] = []
        for sample in samples:
            if len(held) < self.buffer:
                held.append(sample)
                continue
            place = draw.randrange(self.buffer)
            yield held[place]
            held[place] = sample
        draw.shuffle(held)
        yield from held

    def _decoded(self, samples: Iterable[dict[str, Any]]) -> Iterator[LatentSample]:
        for sample in samples:
            yield self._decode(sample)

    def _decode(self, sample: dict[str, Any]) -> LatentSample:
        key, where = sample["__key__"], sample["__url__"]
        try:
            # Spelled out, because webdataset's own decoding would unpickle what it is given.
            tensors = {name: tensor.float() for name, tensor in safetensors.torch.load(sample["safetensors"]).items()}
            about = json.loads(sample["json"])
            made = LatentSample(key, tensors["video"], tensors["audio"], tensors["text"], about)
        except (KeyError, ValueError, SafetensorError) as error:
            raise OviError(f"{where}: sample {key} is damaged ({error}); run `ovi encode` again") from error
        shapes = {"video": tuple(made.video.shape), "audio": tuple(made.audio.shape)}
        if shapes != self.index.latent_shapes:
            raise OviError(f"{where}: sample {key} has latents {shapes}, the index says {self.index.latent_shapes}")
        return made


def share(shards: Sequence[Shard], start: int, stop: int) -> list[Run]:
    """The runs that cover samples ``start`` to before ``stop`` of the shards laid end to end."""
    runs, offset = [], 0
    for shard in shards:
        first, last = max(start - offset, 0), min(stop - offset, shard.num_samples)
        if first < last:
            runs.append(Run(shard, first, last))
        offset += shard.num_samples
    return runs


def read_runs(runs: Iterable[Run]) -> Iterator[dict[str, Any]]:
    """Samples of the runs as webdataset has them: bytes by suffix, ``__key__`` and ``__url__``.

    Raises:
        OviError: when a shard cannot be read or holds fewer samples than the index says.
    """
    for run in runs:
        path, count = run.shard.path, 0
        try:
            with open(path, "rb") as stream:
                files = tar_file_expander(iter([{"url": str(path), "stream": stream}]))
                for sample in islice(group_by_keys(files), run.start, run.stop):
                    yield sample
                    count += 1
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:
            raise OviError(f"{path}: is damaged or cannot be read ({error}); run `ovi encode` again") from error
        if count < run.stop - run.start:
            raise OviError(
                f"{path}: ends after {run.start + count} samples, the index says {run.shard.num_samples}; it is "
                f"damaged: run `ovi encode` again"
            )


def collate(samples: Sequence[LatentSample]) -> LatentBatch:
    """Samples to a batch; ``extra`` holds everything of their json but the caption."""
    return LatentBatch(
        video=torch.stack([sample.video for sample in samples]),
        audio=torch.stack([sample.audio for sample in samples]),
        text=[sample.text for sample in samples],
        captions=[sample.about.get("caption", "") for sample in samples],
        keys=[sample.key for sample in samples],
        extra=[{name: value for name, value in sample.about.items() if name != "caption"} for sample in samples],
    )
