"""What the stages kept and rejected, as one page: counts by stage and reason, and a histogram of every figure."""

from __future__ import annotations

import base64
import html
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ovi.data.files import whole_file
from ovi.data.lines import json_lines
from ovi.errors import OviError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = str | Path | Iterable[Mapping[str, Any]]
"""A .jsonl file, or its lines as mappings."""

_KEPT, _REJECTED, _THRESHOLD = "#4477aa", "#cc6677", "#222222"
_BINS = 40
_MOST_ROWS = 40


def data_report(
    kept: Records,
    rejected: Records,
    out: str | Path,
    *,
    limits: Mapping[str, Sequence[float]] | None = None,
    steps: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Draw the report.

    Histograms show, by colour, what was kept, what this figure had rejected, and what other figures had; thresholds are
    dashed lines.

    Args:
        kept: records of the candidates kept (``Candidate.record``).
        rejected: records of those left out, as in ``rejected.jsonl``.
        out: .html, one file with its pictures inside, or .png.
        limits: ends of the ranges allowed, by figure; those of the rejections themselves are always marked.
        steps: ``seconds`` and ``clips`` of each step of the encoding, as an index has them; a table of the page.

    Returns:
        The path written.

    Raises:
        OviError: for another suffix, a file that cannot be read or written, or records without anything in them.
    """
    out = Path(out)
    if out.suffix not in (".html", ".png"):
        raise OviError(f"{out}: a report is written as .html or .png, got {out.suffix or 'no suffix'!r}")
    kept, rejected = read_records(kept), read_records(rejected)
    if not kept and not rejected:
        raise OviError("there is nothing to report: no candidate was kept and none rejected")
    picture = _png(_figure(kept, rejected, limits or {}, table=out.suffix == ".png"))
    with whole_file(out) as file:
        file.write(picture if out.suffix == ".png" else _page(kept, rejected, steps or {}, picture).encode())
    return out


def read_records(records: Records) -> list[dict[str, Any]]:
    """Records as a list, from memory or from a .jsonl file.

    Raises:
        OviError: for a file that cannot be read, naming the line.
    """
    if not isinstance(records, str | Path):
        return [dict(record) for record in records]
    try:
        text = Path(records).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OviError(f"{records}: cannot be read ({error})") from error
    return [record for _, record in json_lines(text, str(records))]


def rejection_counts(rejected: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, int]]:
    """(stage, reason, count), most frequent first; records without a stage are the reader's."""
    counts = Counter((str(r.get("stage") or "read"), str(r.get("reason"))) for r in rejected)
    return [(stage, reason, count) for (stage, reason), count in sorted(counts.items(), key=lambda c: (-c[1], c[0]))]


def _values(records: Iterable[Mapping[str, Any]], figure: str) -> np.ndarray:
    values = [(r.get("figures") or {}).get(figure) for r in records]
    return np.array([v for v in values if isinstance(v, int | float) and math.isfinite(v)], np.float64)


def _figure(
    kept: list[dict[str, Any]], rejected: list[dict[str, Any]], limits: Mapping[str, Sequence[float]], *, table: bool
) -> Figure:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for r in [*kept, *rejected] for name in r.get("figures") or {}))
    names = [name for name in names if len(_values([*kept, *rejected], name))]
    columns = 3
    rows = max(1, math.ceil(len(names) / columns))
    lines = _table(kept, rejected)
    table_height = 0.5 + 0.24 * len(lines) if table else 0.0
    legend_height = 0.85
    height = 2.5 * rows + table_height + legend_height
    figure = Figure(figsize=(12.0, height))
    if table:
        _draw_table(figure, lines, height)
    top = 1.0 - (table_height + legend_height) / height
    grid = figure.add_gridspec(
        rows, columns, left=0.05, right=0.985, top=top, bottom=0.45 / height, hspace=0.75, wspace=0.18
    )
    handles: dict[str, Any] = {}
    for number, name in enumerate(names):
        axes = figure.add_subplot(grid[number // columns, number % columns])
        mine = [r for r in rejected if r.get("figure") == name]
        ends = {*limits.get(name, ()), *(r["threshold"] for r in mine if r.get("threshold") is not None)}
        others = [r for r in rejected if r.get("figure") != name]
        series = {"kept": kept, "rejected by this figure": mine, "rejected otherwise": others}
        _histogram(axes, name, {label: _values(records, name) for label, records in series.items()}, sorted(ends))
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    if handles:
        where = 1.0 - (table_height + 0.05) / height
        figure.legend(handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(0.045, where), ncols=4)
    return figure


def _histogram(axes: Axes, name: str, series: Mapping[str, np.ndarray], ends: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    values = np.concatenate(list(series.values()))
    low, high = float(values.min()), float(values.max())
    # A far threshold would leave the values a sliver; it is drawn at the edge then, with its number.
    room = max(high - low, 1e-9 * max(abs(low), abs(high), 1.0))
    near = [end for end in ends if low - room <= end <= high + room]
    low, high = min([low, *near]), max([high, *near])
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    bins = np.linspace(low, high, _BINS + 1)
    colours = {"kept": _KEPT, "rejected by this figure": _REJECTED, "rejected otherwise": "#bbbbbb"}
    axes.hist(
        list(series.values()), bins=list(bins), stacked=True, color=[colours[s] for s in series], label=list(series)
    )
    margin = 0.03 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    for end in ends:
        at = min(max(end, low - margin), high + margin)
        arrow = "" if at == end else " (beyond)"
        axes.axvline(at, color=_THRESHOLD, linestyle="--", linewidth=1.2, label="threshold")
        right = at > low + 0.7 * (high - low)
        axes.annotate(
            f"{end:g}{arrow}",
            (at, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-3 if right else 3, -10),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=8,
        )
    axes.set_title(f"{name}   ({len(values)})", fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _table(kept: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> list[tuple[str, str, int, float]]:
    """(stage, reason, count, share of all) with totals first."""
    total = len(kept) + len(rejected)
    counts = rejection_counts(rejected)
    rows = [("kept", "", len(kept)), ("rejected", "", len(rejected)), *counts[:_MOST_ROWS]]
    if len(counts) > _MOST_ROWS:
        rows.append(("others", "", sum(count for _, _, count in counts[_MOST_ROWS:])))
    return [(stage, reason, count, count / total) for stage, reason, count in rows]


def _draw_table(figure: Figure, lines: list[tuple[str, str, int, float]], height: float) -> None:
    for number, (stage, reason, count, share) in enumerate(lines):
        y = 1.0 - (0.3 + 0.24 * number) / height
        weight = "bold" if number < 2 else "normal"
        figure.text(0.05, y, stage, weight=weight, fontsize=10)
        figure.text(0.25, y, reason, fontsize=10)
        figure.text(0.50, y, f"{count:,}", ha="right", weight=weight, fontsize=10)
        figure.text(0.56, y, f"{100 * share:.1f} %", ha="right", fontsize=10)


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _steps_table(steps: Mapping[str, Mapping[str, float]]) -> str:
    """Where the time went, the longest first."""
    if not steps:
        return ""
    rows = "\n".join(
        f"<tr><td>{html.escape(name)}</td><td class=n>{of['seconds']:,.1f}</td><td class=n>{of['clips']:,}</td>"
        f"<td class=n>{1000 * of['seconds'] / of['clips']:,.1f}</td></tr>"
        for name, of in sorted(steps.items(), key=lambda step: -step[1]["seconds"])
        if of["clips"]
    )
    head = "<th>step</th><th class=n>seconds, all processes</th><th class=n>clips</th><th class=n>ms a clip</th>"
    return f"<h2>Time</h2>\n<table><tr>{head}</tr>\n{rows}\n</table>\n"


def _page(
    kept: list[dict[str, Any]],
    rejected: list[dict[str, Any]],
    steps: Mapping[str, Mapping[str, float]],
    picture: bytes,
) -> str:
    rows = "\n".join(
        f"<tr{' class=total' if n < 2 else ''}><td>{html.escape(stage)}</td><td>{html.escape(reason)}</td>"
        f"<td class=n>{count:,}</td><td class=n>{100 * share:.1f} %</td></tr>"
        for n, (stage, reason, count, share) in enumerate(_table(kept, rejected))
    )
    encoded = base64.b64encode(picture).decode()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Clips kept and rejected</title>
<style>
body {{ font: 15px/1.4 sans-serif; max-width: 1320px; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .15em 1.2em .15em 0; text-align: left; border-bottom: 1px solid #ddd; }}
.n {{ text-align: right; }} .total td {{ font-weight: bold; }} img {{ max-width: 100%; }}
</style></head><body>
<h1>Clips kept and rejected</h1>
<table><tr><th>stage</th><th>reason</th><th class=n>candidates</th><th class=n>share</th></tr>
{rows}
</table>
{_steps_table(steps)}<p>Histograms: number of candidates by figure; dashed lines are thresholds.</p>
<img alt="histograms of the figures" src="data:image/png;base64,{encoded}">
</body></html>
"""
