"""Work spread over processes of this machine, its results in order."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
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

logger = logging.getLogger(__name__)

Task = TypeVar("Task")

_PATIENCE = 3
"""Times that a process may end with no task to blame."""


class Crash(OviError):
    """A task that ended the process it was done in, twice, with nothing else going on there."""


Alone = Callable[[Callable[[Any, Any], Any], Any], Any]
"""Does ``work(held, task)`` in a process by itself; raises ``Crash`` when that ends twice."""


class ProcessPool:
    """Processes that each hold one thing, and do tasks with it. A context: they end with the block.

    Where one ends in the middle of its work, what the others were at is lost too: all of that is done again task by
    task in a single process, which shows the task that ends it; then the pool goes on.

    Args:
        num_workers: processes.
        held: what each gets once, pickled; tasks are done as ``work(held, task)``.
    """

    def __init__(self, num_workers: int, held: Any) -> None:
        self.num_workers = num_workers
        # Pickled here: what goes wrong when it is unpickled is then an error like any other, and can be told.
        self._held = pickle.dumps(held)
        self._pool = _Executor(num_workers, self._held)
        self._ended = 0

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def ordered(
        self,
        tasks: Iterable[Task],
        work: Callable[[Any, Task], Any],
        *,
        ahead: int,
        crashed: Callable[[Task, Alone, Crash], Any] | None = None,
    ) -> Iterator[tuple[Task, Any]]:
        """Tasks and their results in order, never more than ``ahead`` waiting: memory does not grow with the set.

        Args:
            tasks: taken a few ahead of what is asked for.
            work: a function of a module, called in a process with what that holds and a task.
            ahead: tasks given out at a time.
            crashed: gives the result of a task that ends its process, and may try parts of it alone; None raises.

        Raises:
            OviError: when a process cannot start, is killed again and again, or, without ``crashed``, by a task.
        """
        waiting: deque[tuple[Task, Future[Any]]] = deque()
        for task in tasks:
            waiting.append((task, self._submitted(work, task)))
            if len(waiting) >= ahead:
                yield self._next(waiting, work, crashed)
        while waiting:
            yield self._next(waiting, work, crashed)

    def _submitted(self, work: Callable[[Any, Task], Any], task: Task) -> Future[Any]:
        try:
            return self._pool.submit(_do, work, task)
        except BrokenProcessPool as error:  # an earlier task has ended it; its result says so in its turn
            future: Future[Any] = Future()
            future.set_exception(error)
            return future

    def _next(
        self,
        waiting: deque[tuple[Task, Future[Any]]],
        work: Callable[[Any, Task], Any],
        crashed: Callable[[Task, Alone, Crash], Any] | None,
    ) -> tuple[Task, Any]:
        task, future = waiting[0]
        try:
            result = future.result()
        except BrokenProcessPool:
            self._do_alone(waiting, work, crashed)
            result = waiting[0][1].result()
        waiting.popleft()
        return task, result

    def _do_alone(
        self,
        waiting: deque[tuple[Task, Future[Any]]],
        work: Callable[[Any, Task], Any],
        crashed: Callable[[Task, Alone, Crash], Any] | None,
    ) -> None:
        """Do what the end of the pool has left undone one by one, then open another pool."""
        how, blamed = self._pool.ended(), False
        logger.warning("a worker process ended (%s); what was in work is done again one by one", how)
        with SingleProcess(self._held) as alone:
            for place, (task, future) in enumerate(waiting):
                if not future.done() or not isinstance(future.exception(), BrokenProcessPool):
                    continue
                again: Future[Any] = Future()
                try:
                    again.set_result(alone(work, task))
                except Crash as error:
                    if crashed is None:
                        raise
                    blamed = True
                    again.set_result(crashed(task, alone, error))
                waiting[place] = task, again
        self._ended += not blamed
        if self._ended >= _PATIENCE:
            raise OviError(
                f"worker processes were ended {self._ended} times ({how}) with no clip to blame, most likely for want "
                f"of memory: lower num_workers, then run the same command again to continue"
            )
        self._pool = _Executor(self.num_workers, self._held)


class SingleProcess:
    """One process that does tasks one by one, another in its place when it ends. A context: it ends with the block.

    Args:
        held: what it gets once, pickled; called with ``work`` and ``task`` it returns ``work(held, task)``, or raises
            ``Crash`` for a task that ends the process twice.
    """

    def __init__(self, held: bytes) -> None:
        self._held = held
        self._pool: _Executor | None = None

    def __enter__(self) -> SingleProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, work: Callable[[Any, Any], Any], task: Any) -> Any:
        for last in (False, True):
            try:
                return self._started().submit(_do, work, task).result()
            except BrokenProcessPool as error:
                assert self._pool is not None
                how, self._pool = self._pool.ended(), None
                if last:
                    raise Crash(how) from error
        raise AssertionError

    def _started(self) -> _Executor:
        if self._pool is None:
            self._pool = _Executor(1, self._held)
            try:
                self._pool.submit(_do, _nothing, None).result()
            except BrokenProcessPool as error:
                how, self._pool = self._pool.ended(), None
                raise OviError(
                    f"a worker process ends while it starts ({how}); a script that starts some must do its work below "
                    f'`if __name__ == "__main__":`'
                ) from error
        return self._pool


class _Executor(ProcessPoolExecutor):
    """Python's own, with processes that hold something, and that can say how they ended."""

    def __init__(self, num_workers: int, held: bytes) -> None:
        super().__init__(
            num_workers,
            # Never fork: torch and FFmpeg have threads by now, and a lock held by one stays locked in the child.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(held,),
        )
        # Not public, and gone once it is shut down; without it only how a process ended stays unknown.
        self._mine: dict[int, Any] = getattr(self, "_processes", {})

    def ended(self) -> str:
        """How the process ended that broke the pool; all others are ended too."""
        self.shutdown(cancel_futures=True)
        codes = {process.exitcode for process in self._mine.values()} - {0, None, -signal.SIGTERM}
        return ", ".join(_in_words(code) for code in sorted(codes)) or "nothing says how"


def _in_words(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code}, {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


_held: Any = None
"""What a worker process holds."""
_failed = ""
"""Why it holds nothing."""


def _start(held: bytes) -> None:
    global _held, _failed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us; a traceback from each would bury its message
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        _held = pickle.loads(held)
    except OviError as error:
        _failed = str(error)
    except Exception as error:
        _failed = f"{type(error).__name__}: {error}"


def _do(work: Callable[[Any, Any], Any], task: Any) -> Any:
    if _failed:
        raise OviError(f"a worker process could not start: {_failed}")
    return work(_held, task)


def _nothing(held: Any, task: Any) -> None:
    """To see that a process has started."""


def _end_with_parent() -> None:
    """A pool's workers outlive a parent that is killed: they hold both ends of the pipe they wait at."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


__all__ = ["Alone", "Crash", "ProcessPool", "SingleProcess"]
