"""Tables as text, one record a line: JSON lines and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from ovi.errors import OviError


def json_lines(text: str, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, record) of JSON lines; empty lines count but are passed over.

    Args:
        text: of the file.
        where: what messages call it.

    Raises:
        OviError: for a line that is no JSON object.
    """
    # Not splitlines: JSON strings may hold the Unicode separators it would break at.
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            yield line, json_record(content, f"{where}, line {line}")


def json_record(content: str, where: str) -> dict[str, Any]:
    """The JSON object of one line.

    Raises:
        OviError: when it is none.
    """
    try:
        record = json.loads(content)
    except json.JSONDecodeError as error:
        raise OviError(f"{where}: is not JSON ({error}): {content.strip()[:80]}") from error
    if not isinstance(record, dict):
        raise OviError(f"{where}: expected one object {{...}} a line, got {content.strip()[:80]}")
    return record


def csv_rows(text: str, where: str, *, columns: tuple[str, ...] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line on which it ends, row) of CSV with a header; a quoted cell may hold line breaks.

    A row with more cells than the header has the rest as a list under "", one with fewer has None for those it lacks.

    Args:
        text: of the file, its line ends as they are.
        where: what messages call it.
        columns: which the header must have.

    Raises:
        OviError: for a header without them, or text that is not CSV.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", strict=True)
    try:
        if not set(columns) <= set(reader.fieldnames or ()):
            wanted = " and ".join(columns)
            raise OviError(f"{where}, line 1: expected a header with {wanted}, got {reader.fieldnames or 'none'}")
        for row in reader:
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise OviError(f"{where}, line {reader.line_num}: is not CSV ({error})") from error
