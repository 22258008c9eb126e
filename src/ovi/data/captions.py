"""Captions beside a folder of clips: ``captions.jsonl`` or ``captions.csv``.

Each line or row has ``file`` (path inside the folder) and ``caption``; every other field is kept with the clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ovi.data.lines import csv_rows, json_lines
from ovi.errors import OviError

NAMES = ("captions.jsonl", "captions.csv")


def find_captions(folder: Path) -> Path | None:
    """The folder's caption file, if it has one.

    Raises:
        OviError: when it has both kinds.
    """
    found = [folder / name for name in NAMES if (folder / name).is_file()]
    if len(found) > 1:
        raise OviError(f"{folder} has {' and '.join(NAMES)}: which one counts? Keep one, or name it with captions=FILE")
    return found[0] if found else None


def read_captions(path: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Records by file, as a posix path inside ``folder``; each record has "caption" and whatever else was given.

    Raises:
        OviError: for a malformed line, a field that is missing, two captions for one file, or a file that is not
            there; every message names the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OviError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    return parse_captions(content, path, folder, lambda name: (folder / name).is_file())


def parse_captions(
    content: bytes, path: Path | str, folder: Path | str, is_there: Callable[[str], bool]
) -> dict[str, dict[str, Any]]:
    """The same from the content of a caption file, wherever it is.

    Args:
        content: of the file.
        path, folder: for the messages; the path's suffix tells the kind.
        is_there: whether a file is in the folder.
    """
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")  # as files opened as text are read
    except UnicodeDecodeError as error:
        raise OviError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    rows = _csv_rows(path, text) if str(path).endswith(".csv") else json_lines(text, str(path))
    records: dict[str, dict[str, Any]] = {}
    lines: dict[str, int] = {}
    for line, row in rows:
        file, caption = row.pop("file", None), row.get("caption")
        if not isinstance(file, str) or not file or not isinstance(caption, str):
            raise OviError(f"{path}, line {line}: needs the strings 'file' and 'caption', got {_brief(file, caption)}")
        name = Path(file).as_posix()
        if name in records:
            raise OviError(f"{path}, line {line}: {name!r} has a caption already, in line {lines[name]}; remove one")
        if not is_there(name):
            raise OviError(f"{path}, line {line}: names {name!r}, which is not in {folder}; correct or remove the line")
        records[name], lines[name] = row, line
    return records


def _csv_rows(path: Path | str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, row in csv_rows(text, str(path), columns=("file", "caption")):
        if "" in row:
            raise OviError(f"{path}, line {line}: has more cells than the header; quote commas")
        yield line, row


def _brief(file: Any, caption: Any) -> str:
    return f"file {file!r:.60} and caption {caption!r:.60}"
