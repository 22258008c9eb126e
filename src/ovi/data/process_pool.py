"""Work spread over processes of this machine, its results in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

import torch

from ovi.errors import OviError

Task = TypeVar("Task")


class ProcessPool:
    """Processes that each hold one thing, and do tasks with it. A context: they end with the block.

    Args:
        num_workers: processes.
        held: what each gets once, pickled; tasks are done as ``work(held, task)``.
    """

    def __init__(self, num_workers: int, held: Any) -> None:
        self.num_workers = num_workers
        self._pool = ProcessPoolExecutor(
            num_workers,
            # Never fork: torch and FFmpeg have threads by now, and a lock held by one stays locked in the child.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(held,),
        )

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def ordered(
        self, tasks: Iterable[Task], work: Callable[[Any, Task], Any], *, ahead: int
    ) -> Iterator[tuple[Task, Any]]:
        """Tasks and their results in order, never more than ``ahead`` waiting: memory does not grow with the set.

        Args:
            tasks: taken a few ahead of what is asked for.
            work: a function of a module, called in a process with what that holds and a task.
            ahead: tasks given out at a time.

        Raises:
            OviError: when a process is killed.
        """
        waiting: deque[tuple[Task, Future[Any]]] = deque()
        try:
            for task in tasks:
                waiting.append((task, self._pool.submit(_do, work, task)))
                if len(waiting) >= ahead:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        except BrokenProcessPool as error:
            raise OviError(
                "an encoding process was killed, most likely for want of memory: lower num_workers, then run the same "
                "command again to continue"
            ) from error


_held: Any = None
"""What a worker process holds."""


def _start(held: Any) -> None:
    global _held
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us; a traceback from each would bury its message
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _held = held


def _do(work: Callable[[Any, Any], Any], task: Any) -> Any:
    return work(_held, task)


def _end_with_parent() -> None:
    """A pool's workers outlive a parent that is killed: they hold both ends of the pipe they wait at."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


__all__ = ["ProcessPool"]
