"""A paper's table of variants and figures, in Markdown or LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ovi.errors import OviError
from ovi.report.ranking import INTERVALS, choose_metrics, finished_table, rank
from ovi.runs.intervals import AUTO
from ovi.runs.run import FINISHED, Run
from ovi.runs.statistics import direction

MARKDOWN, LATEX = FORMATS = ("md", "latex")
STD, INTERVAL = SPREADS = ("std", "interval")

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "[": "{[}", "]": "{]}", "*": "{*}",
}  # fmt: skip
"""Brackets and stars, too: at the beginning of a row the end of the row before takes them for its own."""


def paper_table(
    runs: Sequence[Run],
    form: str,
    *,
    metrics: Sequence[str] = (),
    spread: str = STD,
    intervals: str = AUTO,
    caption: str | None = None,
) -> str:
    """Means over seeds and their spread, variants in rows, best first by the first figure.

    Arrows say which way a figure is better, the best mean is bold; a figure without a declared direction has neither.
    The caption says how many seeds there are. LaTeX wants the package booktabs.

    Args:
        runs: finished ones count.
        form: ``md`` or ``latex``.
        metrics: columns; empty for all with a direction that every run has.
        spread: ``std``, or ``interval`` for the interval of the mean over seeds.
        intervals: how those are found: ``auto``, ``t`` or ``bootstrap``.
        caption: words in front of what the caption says anyway.

    Raises:
        OviError: without a finished run, for a figure no run has or none in common, or values outside these.
    """
    if form not in FORMATS:
        raise OviError(f"format must be html, {' or '.join(FORMATS)}, got {form!r}")
    if spread not in SPREADS:
        raise OviError(f"spread must be {' or '.join(SPREADS)}, got {spread!r}")
    table = finished_table(runs)
    if not len(table):
        states = ", ".join(sorted({run.state for run in runs})) or "there are none"
        raise OviError(f"no run has finished ({states}): a table is made of finished runs")
    tags = choose_metrics(table, metrics)
    columns = {tag: {row["label"]: row for row in rank(table, tag, intervals)} for tag in tags}
    labels = list(columns[tags[0]])
    said = _said(runs, columns, spread, caption)
    counts = {row["n"] for rows in columns.values() for row in rows.values() if row["n"]}
    cell = partial(_cell, spread=spread, counted=len(counts) > 1)
    return (_markdown if form == MARKDOWN else _latex)(labels, columns, said, cell)


def _said(runs: Sequence[Run], columns: dict[str, dict[str, Any]], spread: str, caption: str | None) -> str:
    rows = [row for of_tag in columns.values() for row in of_tag.values()]
    counts = sorted({row["n"] for row in rows if row["n"]})
    seeds = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    methods = sorted({INTERVALS[row["interval"]] for row in rows if row["interval"] in INTERVALS})
    what = (
        "Mean ± standard deviation"
        if spread == STD
        else f"Mean and its 95 % interval ({' or '.join(methods) or 'none'})"
    )
    told = f"{what} over seeds ({seeds})." if counts != [1] else "One seed each (n = 1): no spread is known."
    words = [f"{caption.rstrip('.')}." if caption else "", told]
    lacking = sum(row["lacking"] for row in rows)
    if lacking:
        words.append(f"{_count(lacking, 'figure')} missing in finished runs and left out.")
    others = sum(run.state != FINISHED for run in runs)
    if others:
        words.append(f"{_count(others, 'run')} without a result and left out.")
    return " ".join(word for word in words if word)


def _count(number: int, what: str) -> str:
    return f"{number} {what} is" if number == 1 else f"{number} {what}s are"


def _markdown(labels: Sequence[str], columns: dict[str, dict[str, Any]], said: str, cell_of: Callable[..., str]) -> str:
    heads = [_md(tag) + {"lower": " ↓", "higher": " ↑", None: ""}[direction(tag)] for tag in columns]
    lines = [f"| variant | {' | '.join(heads)} |", f"|---|{'---:|' * len(columns)}"]
    for label in labels:
        cells = []
        for tag, rows in columns.items():
            cell = cell_of(rows[label], "±")
            cells.append(f"**{cell}**" if _is_best(rows, label, tag) else cell or "n/a")
        lines.append(f"| {_md(label)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _md(said)]) + "\n"


def _latex(labels: Sequence[str], columns: dict[str, dict[str, Any]], said: str, cell_of: Callable[..., str]) -> str:
    arrows = {"lower": r" $\downarrow$", "higher": r" $\uparrow$", None: ""}
    heads = [_tex(tag) + arrows[direction(tag)] for tag in columns]
    lines = [r"\begin{table}", r"  \centering", rf"  \caption{{{_tex(said).replace('±', '$' + chr(92) + 'pm$')}}}"]
    lines += [rf"  \begin{{tabular}}{{l{'r' * len(columns)}}}", r"    \toprule"]
    lines += [f"    variant & {' & '.join(heads)} \\\\", r"    \midrule"]
    for label in labels:
        cells = []
        for tag, rows in columns.items():
            cell = cell_of(rows[label], r"$\pm$").replace("-", "$-$")
            cells.append(rf"\textbf{{{cell}}}" if _is_best(rows, label, tag) else cell or "n/a")
        lines.append(f"    {_tex(label)} & {' & '.join(cells)} \\\\")
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}"]) + "\n"


def _is_best(rows: dict[str, Any], label: str, tag: str) -> bool:
    way = direction(tag)
    means = [row["mean"] for row in rows.values() if row["mean"] is not None]
    if way is None or not means or len(rows) < 2:
        return False
    return bool(rows[label]["mean"] == (min if way == "lower" else max)(means))


def _cell(row: dict[str, Any], between: str, *, spread: str, counted: bool) -> str:
    """A mean with its spread, to the spread's second significant digit, and its number of seeds if counted; empty where
    it is missing."""
    if row["mean"] is None:
        return ""
    ends = (row["low"], row["high"])
    width = row["std"] if spread == STD else None if None in ends else (ends[1] - ends[0]) / 2
    places = _places(width if width else abs(row["mean"]) / 100)
    mean, seeds = f"{row['mean']:.{places}f}", f" (n = {row['n']})" if counted else ""
    if spread == STD:
        return mean + ("" if row["std"] is None else f" {between} {row['std']:.{places}f}") + seeds
    return mean + ("" if None in ends else f" [{ends[0]:.{places}f}, {ends[1]:.{places}f}]") + seeds


def _places(width: float) -> int:
    return 0 if not width else max(0, min(6, 1 - math.floor(math.log10(width))))


def _md(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", text.replace("\n", " "))


def _tex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text.replace("\n", " "))
