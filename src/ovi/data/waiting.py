"""Waiting for what other processes do."""

from __future__ import annotations

import time

_LONGEST_S = 5.0


def pause(since: float, poll_s: float) -> None:
    """Sleep before looking again: a tenth of the time waited so far, so that long waits cost few looks.

    Args:
        since: when the wait began, as ``time.monotonic`` says.
        poll_s: the least to sleep.
    """
    time.sleep(max(poll_s, min(0.1 * (time.monotonic() - since), _LONGEST_S)))


__all__ = ["pause"]
