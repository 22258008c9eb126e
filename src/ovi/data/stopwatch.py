"""Where the time of an encoding goes: seconds and clips by step, gathered where the work is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")

_current: ContextVar[Stopwatch | None] = ContextVar("ovi_stopwatch", default=None)


class Stopwatch:
    """Seconds and counts by step. Steps may lie within one another: time counts for the innermost alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self._steps: list[str] = []
        self._since = 0.0

    @contextmanager
    def running(self) -> Iterator[Stopwatch]:
        """Have ``step`` and ``stepping`` count here for the time of the block."""
        token = _current.set(self)
        try:
            yield self
        finally:
            _current.reset(token)

    def add(self, times: Mapping[str, Iterable[float]]) -> None:
        """Take in what another one ``to_dict`` says."""
        for name, (seconds, count) in times.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self.counts[name] = self.counts.get(name, 0) + int(count)

    def to_dict(self) -> dict[str, list[float]]:
        """JSON-ready: [seconds, count] by step."""
        return {name: [seconds, self.counts.get(name, 0)] for name, seconds in self.seconds.items()}

    def _enter(self, name: str) -> None:
        self._settle()
        self._steps.append(name)

    def _leave(self, count: int) -> None:
        self._settle()
        name = self._steps.pop()
        self.counts[name] = self.counts.get(name, 0) + count

    def _settle(self) -> None:
        now = time.perf_counter()
        if self._steps:
            name = self._steps[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


@contextmanager
def step(name: str, count: int = 1) -> Iterator[None]:
    """Count the block's time, if a stopwatch runs.

    Args:
        name: of the step.
        count: clips, or files, that it does.
    """
    watch = _current.get()
    if watch is None:
        yield
        return
    watch._enter(name)
    try:
        yield
    finally:
        watch._leave(count)


def stepping(name: str, work: Callable[[Iterator[Item]], Iterable[Item]], items: Iterable[Item]) -> Iterator[Item]:
    """What a generator makes of items, its time counted as a step's, and each item that it takes.

    Args:
        name: of the step.
        work: a generator function of one argument; what it waits for its items is not counted.
        items: given to it; none of them is None, nor of what it makes.
    """

    def taken() -> Iterator[Item]:
        for item in items:
            watch = _current.get()
            if watch is not None:
                watch.counts[name] = watch.counts.get(name, 0) + 1
            yield item

    made = iter(work(taken()))
    while True:
        with step(name, 0):
            item = next(made, None)
        if item is None:
            return
        yield item


__all__ = ["Stopwatch", "step", "stepping"]
