"""Files of JSON lines that may be in the middle of being written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file, none where there is no file.

    A last line that is not whole yet is left out; any other that cannot be read is warned of and left out: a process
    was killed while it wrote it.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    found = []
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except json.JSONDecodeError:
            content = None
        if isinstance(content, dict):
            found.append(content)
        elif number < len(lines):
            warnings.warn(f"{path}: line {number} is damaged and left out", stacklevel=2)
    return found
