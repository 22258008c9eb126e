"""Errors about what the user wrote, without the machinery behind them."""

from __future__ import annotations

from types import TracebackType

from ovi.errors import OviError


class ShortErrors:
    """A block in which bad input raises its message alone; with ``OVI_TRACEBACK=1``, and for bugs, everything.

    No generator: ``contextlib`` would put the traceback back that is taken away here.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from ovi.commands.failure import traceback_wanted, user_message

        if not isinstance(error, Exception) or traceback_wanted():
            return
        message = user_message(error)
        if message is None:
            return
        if isinstance(error, OviError):
            raise error.with_traceback(None) from None
        raise OviError(message) from None
