"""Errors about what the user wrote, without the machinery behind them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ovi.errors import OviError


@contextmanager
def short_errors() -> Iterator[None]:
    """Have bad input inside the block raise its message alone; with ``OVI_TRACEBACK=1``, and for bugs, everything."""
    from ovi.commands.failure import traceback_wanted, user_message

    try:
        yield
    except Exception as error:
        message = user_message(error)
        if message is None or traceback_wanted():
            raise
        if isinstance(error, OviError):
            raise error.with_traceback(None) from None
        raise OviError(message) from None
