"""``ovi compare``: whether the difference between two variants is real, over the same samples and seeds."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ovi.commands.hints import did_you_mean
from ovi.errors import OviError
from ovi.runs.comparable import ALLOWED
from ovi.runs.paired import STAGE, Paired, paired, shared_tags
from ovi.runs.run import FINISHED, Run, find_runs
from ovi.runs.statistics import holm

OPTIONS = {
    "metric": "figures to compare, as metric=val/av_offset_xcorr_ms,loss; all that both sides have if left away",
    "level": "of confidence, 0.95 if left away",
    "allow": f"what may differ between the runs: {', '.join(ALLOWED)}",
    "out": "a .json file for the result",
}

ARROWS = {"lower": "↓", "higher": "↑"}
"""Which way is better."""

USAGE = f"""usage: ovi compare A B [metric=TAG,...] [level=0.95] [allow=...] [out=FILE.json]

A and B are each a run's folder, several of them (comma-separated, or a pattern such as 'runs/x/ovi_seed*'),
or a variant in a sweep's folder:

  ovi compare runs/my_sweep:ovi runs/my_sweep:none
  ovi compare runs/train/2026-01-02_10-00-00 runs/train/2026-01-02_11-00-00 metric=val/loss

Runs are paired by seed, clips by number: same prompt, same noise. With several seeds the interval says what other
trainings would give; with one it holds for these two trainings only.

{chr(10).join(f"  {name:<6} {meaning}" for name, meaning in OPTIONS.items())}"""


@dataclass(frozen=True)
class Side:
    """One of the two variants: what it is called, and its finished runs."""

    name: str
    runs: list[Run]


def main(argv: list[str]) -> None:
    """Run ``ovi compare A B [option=value ...]``.

    Raises:
        OviError: for sides that are not there or cannot be compared.
    """
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
    words, options = _split(argv)
    if len(words) != 2:
        raise OviError(f"ovi compare takes two sides, got {len(words)} ({' '.join(words)}).\n{USAGE}")
    level = _level(options.get("level", "0.95"))
    out = Path(options["out"]) if "out" in options else None
    if out is not None and out.suffix != ".json":
        raise OviError(f"out={out}: the result is written as JSON, name a .json file")
    tags = [tag.strip() for tag in options.get("metric", "").split(",") if tag.strip()]
    allow = [what for what in options.get("allow", "").split(",") if what]
    result = compare(*words, tags=tags, level=level, allow=allow)
    _show(result)
    if out is not None:
        from ovi.data.files import write_json

        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, to_dict(result))


@dataclass(frozen=True)
class Comparison:
    """The result: both sides, the figures with p values corrected for their number, and what was left out."""

    a: Side
    b: Side
    figures: list[Paired]
    notes: list[str]


def compare(a: str, b: str, *, tags: Sequence[str] = (), level: float = 0.95, allow: Sequence[str] = ()) -> Comparison:
    """Compare two variants.

    Args:
        a, b: as the command line names them.
        tags: figures; empty for all with a better way that every run of both has.
        level: of confidence, 0..1.
        allow: what may differ: ``data``, ``generator``, ``steps``.

    Raises:
        OviError: for sides that are not there or cannot be compared.
    """
    from ovi.commands.components import load_components

    load_components()  # metrics of plug-ins say which way is better, too
    notes: list[str] = []
    first, second = _side(a, notes), _side(b, notes)
    if first.name == second.name:
        first, second = replace(first, name=f"{first.name} (a)"), replace(second, name=f"{second.name} (b)")
    one_sided = {run.seed for run in first.runs} ^ {run.seed for run in second.runs}
    if one_sided:
        notes.append(f"seeds of one side only are left out: {', '.join(map(str, sorted(one_sided)))}")
    chosen = list(tags) or shared_tags(first.runs, second.runs)
    if not chosen:
        raise OviError("no figure with a better way is common to all runs of both sides: name some, metric=TAG")
    names = (first.name, second.name)
    found = [paired(first.runs, second.runs, tag, names=names, level=level, allow=allow) for tag in chosen]
    corrected = holm([one.p for one in found])
    return Comparison(first, second, [replace(one, p=p) for one, p in zip(found, corrected)], notes)


def to_dict(result: Comparison) -> dict[str, Any]:
    """The result as plain data."""
    return {
        "a": {"name": result.a.name, "runs": [run.name for run in result.a.runs]},
        "b": {"name": result.b.name, "runs": [run.name for run in result.b.runs]},
        "correction": f"Holm over {len(result.figures)} figures",
        "figures": [one.to_dict() for one in result.figures],
        "notes": result.notes,
    }


def _split(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    words, options = [], {}
    for word in argv:
        name, sign, value = word.removeprefix("--").partition("=")
        if sign and name in OPTIONS:
            options[name] = value
        elif word.startswith("--") or (sign and "/" not in name and not Path(word.partition(":")[0]).exists()):
            raise OviError(
                f"ovi compare has no option {name!r}.{did_you_mean(name, OPTIONS)} It has {', '.join(OPTIONS)}"
            )
        else:
            words.append(word)
    return words, options


def _level(text: str) -> float:
    try:
        level = float(text)
    except ValueError:
        level = math.nan
    if not 0 < level < 1:
        raise OviError(f"level is a confidence between 0 and 1, such as 0.95, got {text!r}")
    return level


def _side(word: str, notes: list[str]) -> Side:
    """The finished runs that a word stands for."""
    path, label = word, None
    if not Path(word).exists() and ":" in word:
        # A label may hold colons itself.
        cuts = [place for place, sign in enumerate(word) if sign == ":"]
        cut = next((place for place in cuts if Path(word[:place]).exists()), cuts[-1])
        path, label = word[:cut], word[cut + 1 :]
    paths = [path] if Path(path).exists() else [part for part in path.split(",") if part]
    runs, problems = find_runs(*paths)
    notes += problems
    if not runs:
        raise OviError(f"{word}: no runs there{'; '.join(['', *problems[:3]])}")
    if label is not None:
        runs = _of_label(runs, label, path)
    labels = list(dict.fromkeys(run.label for run in runs))
    if len(labels) > 1:
        raise OviError(f"{word} has runs of several variants: choose one, as in {path}:{labels[0]}. {_list(labels)}")
    finished = [run for run in runs if run.state == FINISHED]
    notes += [f"{run.folder} is left out: it is {run.state}" for run in runs if run.state != FINISHED]
    if not finished:
        raise OviError(f"{word}: none of its {len(runs)} runs has finished: {_list([r.state for r in runs])}")
    return Side(labels[0] if len(finished) > 1 or label is not None else finished[0].name, finished)


def _of_label(runs: list[Run], label: str, path: str) -> list[Run]:
    """Those of a label; or, where it alone is meant, of a value that the variant sets."""
    found = [run for run in runs if run.label == label]
    found = found or [run for run in runs if label in run.variant.values()]
    if not found:
        labels = list(dict.fromkeys(run.label for run in runs))
        raise OviError(f"{path} has no variant {label!r}.{did_you_mean(label, labels)} {_list(labels)}")
    return found


def _list(words: Sequence[str]) -> str:
    shown = list(dict.fromkeys(words))
    return f"There are: {', '.join(shown[:12])}{', ...' if len(shown) > 12 else ''}"


def _show(result: Comparison) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    for note in result.notes:
        print(f"ovi: {note}", file=sys.stderr)
    percent = f"{100 * result.figures[0].level:g} %"
    names = escape(result.a.name), escape(result.b.name)
    heads = Column("figure", no_wrap=True), *names, "difference", percent, "p"
    table = Table(*heads, box=SIMPLE, padding=(0, 1, 0, 0))
    for one in result.figures:
        low, high = one.interval.low, one.interval.high
        table.add_row(
            f"{one.tag.removeprefix(STAGE)} {ARROWS.get(one.better or '', '')}",
            _shown(one.mean_a),
            _shown(one.mean_b),
            _shown(one.difference, "+"),
            "" if math.isnan(low) else f"{low:.4g} .. {high:.4g}",
            "" if math.isnan(one.p) else f"{one.p:.2g}",
        )
    console = Console()
    console.print(table)
    for one in result.figures:
        console.print(f"{one.tag}: {one.verdict}", soft_wrap=True, highlight=False, markup=False)
        undefined = one.num_undefined
        if any(undefined):
            console.print(
                f"  not defined for {undefined[0]} clips of {result.a.name} and {undefined[1]} of {result.b.name}: "
                "these pairs are left out; look at the coverage, too",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )
    if len(result.figures) > 1:
        console.print(f"p values are corrected for {len(result.figures)} figures (Holm); intervals are of each alone")


def _shown(value: float, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:{sign}.4g}"


__all__ = ["Comparison", "Side", "compare", "main", "to_dict"]
