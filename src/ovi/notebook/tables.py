"""Rows of facts as a table, in html and in plain text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any


def html_table(rows: Sequence[Sequence[Any]], *, head: Sequence[str] = (), title: str = "") -> str:
    """Rows as an html table, everything escaped.

    Args:
        rows: cells of each; the first names the row.
        head: names of the columns.
        title: above it.
    """
    left = ' style="text-align:left"'
    caption = f'<caption style="text-align:left;font-weight:bold">{escape(title)}</caption>' if title else ""
    names = f"<tr>{''.join(f'<th{left}>{escape(name)}</th>' for name in head)}</tr>" if head else ""
    body = "".join(
        f"<tr><th{left}>{escape(str(row[0]))}</th>"
        + "".join(f"<td{left}>{escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table>{caption}{names}{body}</table>"


def text_table(rows: Sequence[Sequence[Any]], *, head: Sequence[str] = (), title: str = "") -> str:
    """The same for a terminal."""
    lines = [[str(cell) for cell in row] for row in ([head] if head else []) + list(rows)]
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(max(map(len, lines), default=0))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([title] * bool(title) + text)
