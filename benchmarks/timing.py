"""Times of several calls, taken in turns so that a machine's drift meets all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any


def nothing() -> None:
    """Where nothing has to be done."""


@dataclass(frozen=True)
class Task:
    """A call to time, with what belongs around it but not into its time."""

    run: Callable[[], Any]
    before: Callable[[], Any] = nothing
    after: Callable[[], Any] = nothing


def interleaved(
    tasks: Mapping[str, Task],
    *,
    rounds: int,
    warmup: int,
    synchronise: Callable[[], Any] = nothing,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every task in every round: A B C A B C ..., after ``warmup`` rounds that are not kept.

    Args:
        tasks: by name, in the order they take turns.
        rounds: times kept of each.
        warmup: rounds thrown away first.
        synchronise: waits until the device has done what it was given.
        clock: seconds that never go back.
    """
    times: dict[str, list[float]] = {name: [] for name in tasks}
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of one task would be charged to it
    try:
        for turn in range(warmup + rounds):
            gc.collect()
            for name, task in tasks.items():
                task.before()
                synchronise()
                start = clock()
                result = task.run()
                synchronise()
                taken = clock() - start
                del result  # freed outside the time, and before the next task runs
                task.after()
                if turn >= warmup:
                    times[name].append(taken)
    finally:
        if collecting:
            gc.enable()
    return times


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median and spread: all times, median, smallest, largest and interquartile range, in seconds."""
    quarters = quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return {
        "times_s": list(times),
        "median_s": median(times),
        "min_s": min(times),
        "max_s": max(times),
        "iqr_s": quarters[2] - quarters[0],
    }


def speed(times: Sequence[float], baseline: Sequence[float]) -> float:
    """How many times faster than the baseline: the median over rounds of baseline time / own time of that round."""
    return median(b / t for t, b in zip(times, baseline, strict=True))
