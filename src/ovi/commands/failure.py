"""How a command ends when something goes wrong: one message and an exit code, or the whole traceback.

Bad input (an ``OviError``, anywhere in the chain of causes, and a disk that refuses) prints its message and exits 1.
An interrupt exits 130. Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from ovi.errors import OviError

_INTERRUPTED = 130
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}
# torch re-raises a loader worker's exception as one of the same type whose message is the worker's traceback.
_FROM_WORKER = re.compile(r"^Caught \w+ in .*?^Traceback.*^[\w.]+: (?P<message>.*)", re.DOTALL | re.MULTILINE)


def traceback_wanted() -> bool:
    """Whether ``OVI_TRACEBACK=1``, or ``HYDRA_FULL_ERROR=1`` where the former says nothing, asks for tracebacks."""
    return os.environ.get("OVI_TRACEBACK", os.environ.get("HYDRA_FULL_ERROR", "")) == "1"


def user_message(error: BaseException | None) -> str | None:
    """What a user should read of an exception, or None when it is a bug.

    It may stand anywhere in the chain of explicit causes. The outermost speaks: who wraps an ``OviError`` in another
    knows more about it.
    """
    while error is not None:
        if isinstance(error, OviError):
            worker = _FROM_WORKER.match(str(error).replace("Original Traceback", "Traceback"))
            return worker["message"].strip() if worker else str(error)
        if isinstance(error, OSError) and error.errno in _DISK:
            where = f": {error.filename}" if error.filename else ""
            return f"cannot write or read{where} ({error.strerror}). Free space there, or choose another folder"
        error = error.__cause__
    return None


@contextmanager
def exit_clearly() -> Iterator[None]:
    """Turn bad input inside the block into one message on stderr and exit code 1, an interrupt into 130."""
    try:
        yield
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as stop:
        # Lightning answers an interrupt with a plain exit 1, after having saved what there is to save.
        if stop.code != _INTERRUPTED and isinstance(stop.__context__, KeyboardInterrupt):
            _interrupted()
        raise
    except Exception as error:
        message = user_message(error)
        if message is None or traceback_wanted():
            raise
        print(f"ovi: {message}", file=sys.stderr)
        raise SystemExit(1) from None


def _interrupted() -> NoReturn:
    if traceback_wanted():
        raise
    print("ovi: interrupted", file=sys.stderr)
    raise SystemExit(_INTERRUPTED) from None
