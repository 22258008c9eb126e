"""Lists of prompts for evaluation: one prompt a clip, in a csv, jsonl or txt file."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ovi.commands.pairing import paired
from ovi.data.lines import csv_rows, json_lines
from ovi.errors import OviError

FILE_COLUMNS = ("file", "video", "name", "id")
CAPTION_COLUMNS = ("caption", "prompt")
PART_COLUMNS = ("video_prompt", "speech_prompt", "audio_prompt")


@dataclass(frozen=True)
class Prompt:
    """One line of a list.

    Attributes:
        caption: the prompt as the network sees it.
        file: the clip it belongs to, as written; empty when the list does not say.
        extra: the line's other fields.
    """

    caption: str
    file: str
    extra: Mapping[str, Any]


def read_prompt_table(path: str | Path) -> list[Prompt]:
    """Prompts of a file, in order.

    A .txt has one prompt a line. A .csv or .jsonl names the clip by ``file`` (or ``video``, ``name``, ``id``) and the
    prompt by ``caption`` (or ``prompt``), or in parts as Verse-Bench has them: ``video_prompt``, ``speech_prompt`` and
    ``audio_prompt``, which are put together in the model's format: ``video <S>speech<E> <AUDCAP>audio<ENDAUDCAP>``.

    Raises:
        OviError: when it cannot be read, has no prompt, or a line lacks its prompt.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")  # line ends as they are: a quoted field of a csv may hold some
    except (OSError, UnicodeDecodeError) as error:
        raise OviError(f"prompts={path}: cannot be read ({error})") from error
    if path.suffix == ".txt":
        prompts = [Prompt(line.strip(), "", {}) for line in io.StringIO(text, newline=None) if line.strip()]
    elif path.suffix in (".csv", ".jsonl"):
        prompts = [_prompt(path, number, row) for number, row in _rows(path, text)]
    else:
        raise OviError(f"prompts={path}: expected a .csv, .jsonl or .txt file")
    if not prompts:
        raise OviError(f"prompts={path}: holds no prompt")
    return prompts


def captions_for(
    files: Iterable[str], prompts: list[Prompt], path: Any, folder: Any = "the clips"
) -> dict[str, Prompt]:
    """The prompt of each file, matched by its path in the folder, or where that is no prompt's, by its name without
    folder and suffix.

    Args:
        files: posix paths inside the folder.
        prompts: of a list.
        path, folder: the list and the folder, for messages.

    Raises:
        OviError: when a prompt names no file, two prompts name one, or it is not clear which file is meant.
    """
    by_name: dict[str, Prompt] = {}
    for prompt in prompts:
        if not prompt.file:
            raise OviError(f"{path}: says no file for its prompts; it needs a column of {', '.join(FILE_COLUMNS)}")
        name = PurePosixPath(prompt.file).as_posix()
        if by_name.setdefault(name, prompt) is not prompt:
            raise OviError(f"{path}: has two prompts for {name!r}")
    found = paired(files, by_name, of=str(folder), to=str(path))
    return {file: by_name[name] for file, name in found.items()}


def _rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix == ".jsonl":
        yield from json_lines(text, f"prompts={path}")
        return
    for line, row in csv_rows(text, f"prompts={path}"):
        yield line, {name: cell for name, cell in row.items() if name and cell is not None}


def _prompt(path: Path, number: int, row: dict[str, Any]) -> Prompt:
    file = next((str(row[c]) for c in FILE_COLUMNS if row.get(c) not in (None, "")), "")
    caption = next((str(row[c]) for c in CAPTION_COLUMNS if row.get(c)), "") or _composed(row)
    if not caption.strip():
        raise OviError(
            f"prompts={path}, line {number}: has no prompt; expected {' or '.join(CAPTION_COLUMNS)}, or parts in "
            f"{', '.join(PART_COLUMNS)}; its fields are {', '.join(row) or 'none'}"
        )
    used = {*FILE_COLUMNS, *CAPTION_COLUMNS}
    return Prompt(caption, file, {k: v for k, v in row.items() if k not in used})


def _composed(row: Mapping[str, Any]) -> str:
    picture, speech, sound = (str(row.get(column) or "").strip() for column in PART_COLUMNS)
    parts = [picture, f"<S>{speech}<E>" if speech else "", f"<AUDCAP>{sound}<ENDAUDCAP>" if sound else ""]
    return " ".join(part for part in parts if part)
