"""``ovi report``: many runs as one page that opens offline, or as a paper's table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ovi.commands.hints import did_you_mean
from ovi.errors import OviError

USAGE = """ovi report FOLDER [FOLDER ...] [KEY=VALUE ...]    compare the runs in some folders

  FOLDER             of a run, a sweep, or many; runs that go on or have failed are listed as such
  format=html        one page with plots, clips and tables inside; md or latex: a paper's table
  out=FILE           report.html in the first FOLDER by default; md and latex are printed without it
  metric=TAG[,TAG]   figures to rank by, the first is shown first; all that have a direction and that all runs have
  title=TEXT         of the page, or in front of a table's caption

  media=embed        clips inside the page; link: where they are, beside the page; none
  max_mb=100         the most that clips inside the page may take
  prompts=8          whose clips are shown; all
  curve_points=160   of a learning curve

  intervals=auto     of means over seeds: Student's t below 30, a bootstrap from there on; or always t, or bootstrap
  spread=std         of a paper's table: the standard deviation over seeds, or interval
"""

HTML = "html"


def main(argv: list[str]) -> None:
    """Run ``ovi report FOLDER ...`` and say where the report is.

    Raises:
        OviError: for words it does not take, folders without runs, or figures no run has.
    """
    if not argv or set(argv) & {"-h", "--help", "help"}:
        print(USAGE, end="")
        return
    folders, settings = _parse(argv)
    if not folders:
        raise OviError(f"ovi report takes at least one folder of runs\n{USAGE}")
    form = settings.pop("format", HTML)
    of_page, of_table = {"media", "max_mb", "prompts", "curve_points"}, {"spread"}
    foreign = (of_table if form == HTML else of_page) & settings.keys()
    if foreign:
        raise OviError(f"{', '.join(sorted(foreign))}: format={form} has no such setting\n{USAGE}")
    from ovi.commands.components import load_components
    from ovi.runs.run import find_runs

    load_components()  # metrics of plug-ins too say which way they are better
    runs, problems = find_runs(*folders)
    if not runs:
        raise OviError(f"no runs in {', '.join(folders)}{'; '.join(['', *problems[:3]])}")
    metrics, title, out = settings.pop("metric", []), settings.pop("title", None), settings.pop("out", None)
    if form == HTML:
        from ovi.report.page import write_page

        target = out or _place(folders[0]) / "report.html"
        print(write_page(runs, target, problems=problems, metrics=metrics, title=title, **settings))
        return
    from ovi.data.files import whole_file
    from ovi.report.provenance import mixed
    from ovi.report.ranking import finished_table, too_narrow
    from ovi.report.tables import paper_table

    text = paper_table(runs, form, metrics=metrics, caption=title, **settings)
    narrow = too_narrow(finished_table(runs), settings.get("intervals", ""))
    for note in (*problems, *mixed(runs), *narrow):
        print(f"ovi: {note}", file=sys.stderr)
    if out is None:
        print(text, end="")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as file:
        file.write(text.encode())
    print(out)


def _place(folder: str) -> Path:
    """The folder itself; of a pattern such as ``runs/x/ovi_seed*`` the folder it is in."""
    place = Path(folder)
    while not place.is_dir():
        place = place.parent
    return place


def _parse(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    readers: dict[str, Callable[[str], Any]] = {
        "format": str,
        "out": Path,
        "metric": lambda text: [name.strip() for name in text.split(",") if name.strip()],
        "title": str,
        "media": str,
        "max_mb": float,
        "prompts": lambda text: None if text == "all" else int(text),
        "curve_points": int,
        "spread": str,
        "intervals": str,
    }
    folders, settings, rest = [], {}, list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.lstrip("-").partition("=")
        if word.startswith("--") and not equals and rest:
            value, equals = rest.pop(0), "="
        # A folder's name may have the sign in it, as those of a sweep do.
        if not equals or (key not in readers and not word.startswith("-") and ("/" in word or Path(word).exists())):
            folders.append(word)
        elif key not in readers:
            raise OviError(f"ovi report does not take {word!r}.{did_you_mean(key, readers)}\n{USAGE}")
        else:
            try:
                settings[key] = readers[key](value)
            except ValueError:
                raise OviError(f"ovi report: {key} cannot be {value!r}\n{USAGE}") from None
    return folders, settings


__all__ = ["USAGE", "main"]
