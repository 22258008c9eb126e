"""Blocks of memory that batches are read into, used again and again.

A fresh block costs more than what is read into it: the system must find and clear its pages, in every process that
looks at it. Here a block is filled anew as soon as nothing refers to the batch that was in it, and not before: whoever
keeps a batch keeps its block, and reading goes on in others.
"""

from __future__ import annotations

import uuid
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MOST = 4096
"""Blocks that one pool uses again and again; whoever keeps more batches than that gets blocks that are used once."""
_STEP = 2**16
"""Bytes that sizes of blocks are multiples of."""
_SPARE = 8
"""A block may be larger than what it must hold by this part of it, so that the next, a little larger one, fits."""


class _Shared(NamedTuple):
    """What a loading process has shared with this one: its pool's name and flags, and its blocks by number."""

    pool: str
    in_use: Tensor
    blocks: dict[int, Tensor]


_arrived: dict[str, dict[int, _Shared]] = {}
"""For every loader what each of its workers has shared."""


class BlockPool:
    """Blocks of one process.

    Args:
        owner: the loader that batches go to in another process; None for batches that stay in this one.
        worker: which of the loader's processes this is.
    """

    def __init__(self, owner: str | None = None, worker: int = 0) -> None:
        self.owner, self.worker, self.name = owner, worker, uuid.uuid4().hex
        flags = torch.zeros(_MOST, dtype=torch.uint8)
        self.in_use = flags.share_memory_() if owner else flags
        self._blocks: dict[int, Tensor] = {}
        self._sent: set[int] = set()
        self._dropped: list[int] = []
        self._next = 0

    @property
    def num_bytes(self) -> int:
        """Memory of all blocks."""
        return sum(len(block) for block in self._blocks.values())

    def take(self, num_bytes: int) -> Block:
        """A block that nothing refers to, of at least that size."""
        free = [number for number in self._blocks if not self.in_use[number]]
        fitting = [number for number in free if len(self._blocks[number]) >= num_bytes]
        if fitting:
            number = min(fitting, key=lambda n: len(self._blocks[n]))
        else:
            for small in free:  # too small for this one; larger ones are coming, so it will be for others
                del self._blocks[small]
                self._sent.discard(small)
                self._dropped.append(small)
            if len(self._blocks) == _MOST:
                return Block(self, None, self._memory(num_bytes), num_bytes)
            number = self._new(num_bytes + num_bytes // _SPARE)
        self.in_use[number] = 1
        return Block(self, number, self._blocks[number], num_bytes)

    def _new(self, num_bytes: int) -> int:
        while self._next in self._blocks:
            self._next = (self._next + 1) % _MOST
        number, self._next = self._next, (self._next + 1) % _MOST
        self._blocks[number] = self._memory(num_bytes)
        return number

    def _memory(self, num_bytes: int) -> Tensor:
        size = -(-max(1, num_bytes) // _STEP) * _STEP
        return _shared(size) if self.owner else torch.empty(size, dtype=torch.uint8)

    def news(self, number: int) -> tuple[Tensor | None, list[int]]:
        """What the other process does not have yet: the block itself, and which ones are gone."""
        dropped, self._dropped = self._dropped, []
        block = None if number in self._sent else self._blocks[number]
        self._sent.add(number)
        return block, dropped


class Block:
    """A block while it is filled: write to ``bytes``, then hand over ``leased()``, or the block to another process.

    Whoever does neither gives it back.

    Args:
        pool: that it is of.
        number: in the pool; None for one that is used once.
        whole: its memory.
        num_bytes: wanted of it.
    """

    def __init__(self, pool: BlockPool, number: int | None, whole: Tensor, num_bytes: int) -> None:
        self.pool, self.number, self.whole, self.num_bytes = pool, number, whole, num_bytes

    @property
    def bytes(self) -> Tensor:
        """uint8 [num_bytes]."""
        return self.whole[: self.num_bytes]

    def give_back(self) -> None:
        """Have the block filled anew; what was written to it is of no use."""
        if self.number is not None:
            self.pool.in_use[self.number] = 0

    def leased(self) -> Tensor:
        """The bytes, for use in this process; the block is free when no tensor refers to them any more."""
        if self.number is None:
            return self.bytes
        return _leased(self.whole, self.num_bytes, self.pool.in_use, self.number)

    def __reduce__(self) -> Any:
        if self.number is None:
            return _received_once, (self.whole, self.num_bytes)
        pool = self.pool
        block, dropped = pool.news(self.number)
        flags = pool.in_use if block is not None else None
        return _receive, (pool.owner, pool.worker, pool.name, self.number, self.num_bytes, block, flags, dropped)


def forget(owner: str) -> None:
    """Let go of the blocks that a loader's processes have shared; batches that are still in use keep theirs."""
    _arrived.pop(owner, None)


def _receive(
    owner: str,
    worker: int,
    pool: str,
    number: int,
    num_bytes: int,
    block: Tensor | None,
    flags: Tensor | None,
    dropped: list[int],
) -> Tensor:
    """A block as it arrives from the process that filled it."""
    workers = _arrived.setdefault(owner, {})
    if worker not in workers or workers[worker].pool != pool:
        # The first of a process, which begins with a block and its flags. What its forerunner shared is let go.
        assert flags is not None
        workers[worker] = _Shared(pool, flags, {})
    shared = workers[worker]
    for gone in dropped:
        shared.blocks.pop(gone, None)
    if block is not None:
        # Each block brings its flags anew; they are the same memory, and the first mapping of it is kept.
        shared.blocks[number] = block
    return _leased(shared.blocks[number], num_bytes, shared.in_use, number)


def _received_once(whole: Tensor, num_bytes: int) -> Tensor:
    return whole[:num_bytes]


def _leased(whole: Tensor, num_bytes: int, in_use: Tensor, number: int) -> Tensor:
    # The array lives as long as the storage that torch makes of it, which every view of the batch shares.
    array = whole[:num_bytes].numpy()
    weakref.finalize(array, _release, in_use, number).atexit = False
    return torch.from_numpy(array)


def _release(in_use: Tensor, number: int) -> None:
    in_use[number] = 0


def _shared(num_bytes: int) -> Tensor:
    storage = torch.UntypedStorage._new_shared(num_bytes)
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
