"""Batches to a training process: which ones, in which order, from where on, and what was left out."""

from __future__ import annotations

import multiprocessing
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from warnings import warn

from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ovi.data.batch import LatentBatch, PackedBatch, Skipped
from ovi.data.reading.ahead import FetchAhead
from ovi.data.reading.blocks import BlockPool, forget
from ovi.data.reading.plan import Position, ReadingPlan
from ovi.data.shards import LatentShards


class SkippedSamples:
    """What loaders left out, by sample; each is warned of once."""

    def __init__(self) -> None:
        self.counts: Counter[Skipped] = Counter()

    @property
    def total(self) -> int:
        """Samples left out, each as often as it was."""
        return self.counts.total()

    def add(self, skipped: Iterable[Skipped]) -> None:
        for one in skipped:
            if not self.counts[one]:
                warn(f"left out: {one}", stacklevel=2)
            self.counts[one] += 1


class RankBatches(Sampler[list[int]]):
    """One rank's batches of an epoch as sample numbers, from a position on.

    Args:
        plan: of all batches.
        rank, world_size: whose batches.
        position: asked by ``begin`` where the next iteration begins; None takes one epoch after the other.
    """

    def __init__(
        self,
        plan: ReadingPlan,
        *,
        rank: int = 0,
        world_size: int = 1,
        position: Callable[[], Position] | None = None,
    ) -> None:
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self._position, self._where = position, Position(-1)

    def __len__(self) -> int:
        return self.plan.num_batches(self.world_size)

    def begin(self) -> Position:
        """Fix where the next iterations begin, and say where."""
        self._where = self._position() if self._position else Position(self._where.epoch + 1)
        return self._where

    def __iter__(self) -> Iterator[list[int]]:
        # A DataLoader asks more than once for one iteration of its own.
        return self.of(self._where)

    def of(self, where: Position) -> Iterator[list[int]]:
        """The batches from a position to the end of its epoch."""
        batches = self.plan.of_rank(where.epoch, self.rank, self.world_size)
        for number in range(where.batch, len(batches)):
            yield batches[number].tolist()


class _Reader(Dataset[PackedBatch]):
    """The data set as a DataLoader that draws lists of numbers wants it."""

    def __init__(self, dataset: LatentShards) -> None:
        self.dataset, self.owner = dataset, uuid.uuid4().hex
        self._pool: BlockPool | None = None

    def __getitem__(self, numbers: list[int]) -> PackedBatch:
        if self._pool is None:
            worker = get_worker_info()
            self._pool = BlockPool(self.owner, worker.id) if worker else BlockPool()
        return self.dataset.read_batch(numbers, self._pool)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}


class LatentLoader(DataLoader[Any]):
    """A rank's ``LatentBatch`` es in the plan's order, whatever the number of loading processes.

    Args:
        dataset: the samples.
        batches: which of them, in which order.
        num_workers: loading processes; 0 loads in this one.
        pin_memory: hand batches over in memory that a GPU fetches from by itself.
        skipped: takes what is left out; several loaders may share one.
        sized: whether it has a length: the batches of an epoch, also where the next iteration begins within one.
    """

    def __init__(
        self,
        dataset: LatentShards,
        batches: RankBatches,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        skipped: SkippedSamples | None = None,
        sized: bool = True,
    ) -> None:
        reader = _Reader(dataset)
        if num_workers:
            dataset.share()
        super().__init__(
            reader,
            sampler=batches,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=_itself,  # type: ignore[arg-type]
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            multiprocessing_context=loading_context() if num_workers else None,
        )
        weakref.finalize(self, forget, reader.owner).atexit = False
        self.skipped = skipped if skipped is not None else SkippedSamples()
        self.latents, self.batches, self._sized = dataset, batches, sized

    def __len__(self) -> int:
        if not self._sized:
            raise TypeError("a loader made without a length")
        return len(self.batches)

    def __iter__(self) -> Iterator[LatentBatch]:  # type: ignore[override]
        ahead, where = None, self.batches.begin()
        if self.latents.cache is not None:
            ahead = FetchAhead(self.latents.cache, map(self.latents.shards_of, self.batches.of(where)))
        return _Unpacking(super().__iter__(), self.skipped, ahead)

    # A trainer that finds these takes the loader for one that continues where it was, which it does: its position is
    # the data module's to keep.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class _Unpacking:
    """Batches as training sees them. Reading begins when this is made, not with the first ``next``."""

    def __init__(self, packed: Iterator[PackedBatch], skipped: SkippedSamples, ahead: FetchAhead | None) -> None:
        self._packed, self._skipped, self._ahead = packed, skipped, ahead

    def __iter__(self) -> Iterator[LatentBatch]:
        return self

    def __next__(self) -> LatentBatch:
        batch = next(self._packed)
        if self._ahead is not None:
            self._ahead.advance()
        self._skipped.add(batch.skipped)
        return batch.unpack()

    def __del__(self) -> None:
        if getattr(self, "_ahead", None) is not None:
            self._ahead.stop()  # type: ignore[union-attr]


def _itself(batch: PackedBatch) -> PackedBatch:
    return batch


def loading_context() -> Any:
    """How loading processes are started.

    Never by forking this process: torch and FFmpeg have threads by now, and a lock that one of them holds stays locked
    in the child. A server that has imported what reading needs forks them instead, at once and clean.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def warm_up() -> None:
    """Start the server of loading processes, so that the first of them need not wait for its imports."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        loading_context()
        from multiprocessing.forkserver import ensure_running

        ensure_running()
