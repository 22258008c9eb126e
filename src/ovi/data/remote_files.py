"""Files behind fsspec URLs, with failures that name the URL and what to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ovi.errors import OviError

Result = TypeVar("Result")

ATTEMPTS = 4


class UnreachableError(OviError):
    """A file system refused or broke off: trying again may help."""


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it without a slash at its end.

    Raises:
        OviError: for an unknown protocol, or one whose package is not installed.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise OviError(f"{url}: URLs need the package fsspec; install ovi with the extra data") from None
    with reaching(url):
        system, path = url_to_fs(url)
        return system, path.rstrip("/")


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Name the URL in whatever goes wrong inside the block; a file that is not there stays a FileNotFoundError."""
    try:
        yield
    except (FileNotFoundError, OviError):
        raise
    except ImportError as error:  # fsspec's words for a protocol without its package
        raise OviError(f"{url}: a package is missing: {error}") from error
    except ValueError as error:  # and for an unknown one
        raise OviError(f"{url}: cannot be opened ({error})") from error
    except Exception as error:  # every file system raises its own kinds
        raise UnreachableError(
            f"{url}: cannot be reached ({type(error).__name__}: {error}). Are the credentials set, as its file system "
            f"wants them (for s3:// by AWS_ACCESS_KEY_ID and so on), and is the name right?"
        ) from error


def trying(url: str, action: Callable[[], Result]) -> Result:
    """What an action returns; done again after a while where the file system broke off, but not where it refused.

    Raises:
        FileNotFoundError: when it is not there.
        OviError: when it fails ``ATTEMPTS`` times.
    """
    for attempt in range(ATTEMPTS):
        try:
            with reaching(url):
                return action()
        except UnreachableError as error:
            if attempt + 1 == ATTEMPTS or isinstance(error.__cause__, PermissionError):
                raise
            time.sleep(0.5 * 2**attempt)
    raise AssertionError


def list_files(url: str) -> dict[str, int]:
    """Sizes in bytes of all files below a URL, by their path below it.

    Raises:
        OviError: when it cannot be reached.
    """
    system, root = file_system(url)

    def find() -> dict[str, Any]:
        system.invalidate_cache(root)
        found: dict[str, Any] = system.find(root, detail=True)
        return found

    found = trying(url, find)
    return {path[len(root) :].lstrip("/"): int(about.get("size") or 0) for path, about in found.items()}
