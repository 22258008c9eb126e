"""Which figures runs can be ranked by, and their means and intervals by variant."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ovi.errors import OviError
from ovi.runs.intervals import AUTO, BOOTSTRAP, FEWEST_FOR_BOOTSTRAP
from ovi.runs.run import FINISHED, Run
from ovi.runs.statistics import direction, summarise
from ovi.runs.table import metric_tags, table_of

if TYPE_CHECKING:
    import pandas as pd

COSTS = ("steps", "train_seconds", "flops", "parameters", "peak_memory_gb")
"""Costs that are shown of every variant, means over its runs."""

INTERVALS = {"t": "Student's t", "bootstrap": "bootstrap"}
"""How intervals of means are found, in words; which one a row has, it says."""

_ASIDE = ("_n", "_n_real", "_coverage")
_NO_RESULTS = ("val_real/", "val_sigma_n/", "attention_blocks/", "lr-", "train/")


def finished_table(runs: Iterable[Run]) -> pd.DataFrame:
    """The runs that trained to their end as a table, a row each; pruned ones are left out."""
    return table_of(run for run in runs if run.state == FINISHED)


def ranked_tags(table: pd.DataFrame) -> list[str]:
    """Figures a table can be ranked by: those with a declared direction first, counts and floors left out."""
    tags = [t for t in metric_tags(table) if not t.endswith(_ASIDE) and not t.startswith(_NO_RESULTS)]
    tags = [t for t in tags if table[t].notna().any()]
    return sorted(tags, key=lambda t: (direction(t) is None, t))


def choose_metrics(table: pd.DataFrame, asked: Sequence[str]) -> list[str]:
    """The figures to rank by, the first being the main one.

    Args:
        table: of finished runs.
        asked: by the user, ``val/`` may be left away; empty for those of validation with a declared direction that
            all runs have, or else half of them.

    Raises:
        OviError: for a figure no run has, or, where none is asked for, none that all runs have; tags are listed.
    """
    tags = ranked_tags(table)
    there = f"There are: {', '.join(tags) or 'none'}"
    if asked:
        known = {tag.removeprefix("val/"): tag for tag in tags} | {tag: tag for tag in metric_tags(table)}
        for name in asked:
            if name not in known or table[known[name]].isna().all():
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise OviError(f"metric={name}: no finished run has such a figure.{hint} {there}")
        return list(dict.fromkeys(known[name] for name in asked))
    if not tags:
        raise OviError(f"none of the {len(table)} finished runs has a figure: were they trained without validation?")
    common = [tag for tag in tags if table[tag].notna().all()]
    if not common:
        raise OviError(
            f"no figure is common to all {len(table)} finished runs: choose one with metric=TAG (runs without it are "
            f"shown as missing). {there}"
        )
    declared = [tag for tag in tags if direction(tag)]
    # Losses by noise level have a direction, too: they are asked for by name.
    declared = [tag for tag in declared if tag.startswith("val/")] or declared
    usual = [tag for tag in declared if table[tag].notna().mean() >= 0.5]
    return [tag for tag in declared if tag in common] or usual or common[:1]


def rank(table: pd.DataFrame, tag: str, intervals: str = AUTO) -> list[dict[str, Any]]:
    """Variants by one figure, best first, as plain data; those that lack it altogether come last.

    Args:
        table: of finished runs.
        tag: of the figure.
        intervals: how they are found: ``auto``, ``t`` or ``bootstrap``.

    Returns:
        Rows of ``label``, ``n``, ``mean``, ``std``, ``low``, ``high`` (None where not defined), ``interval`` (how its
        ends were found), ``lacking`` (finished runs without the figure), ``coverage`` (share of clips it rests on) and
        ``clips`` (how many there were).
    """
    aside = {name: companion(tag, list(table.columns), name) for name in ("coverage", "n")}
    # A table may have hundreds of columns, and every step below would copy them all.
    narrow = table[list(dict.fromkeys(["label", tag, *filter(None, aside.values())]))]
    grouped = narrow.groupby("label")
    counts, means = grouped.size(), grouped.mean()
    return [
        {
            "label": row["label"],
            "n": row["n"],
            **{key: _plain(row[key]) for key in ("mean", "std", "low", "high")},
            "interval": row["interval"],
            "lacking": int(counts[row["label"]] - row["n"]),
            "coverage": _plain(means[aside["coverage"]][row["label"]]) if aside["coverage"] else None,
            "clips": _plain(means[aside["n"]][row["label"]]) if aside["n"] else None,
        }
        for row in summarise(narrow[["label", tag]], tag, method=intervals).to_dict("records")
    ]


def too_narrow(table: pd.DataFrame, intervals: str) -> list[str]:
    """What is wrong with intervals that were asked for, in a sentence: a bootstrap of a few seeds."""
    fewest = int(table.groupby("label").size().min()) if len(table) else 0
    if intervals != BOOTSTRAP or fewest >= FEWEST_FOR_BOOTSTRAP:
        return []
    return [
        f"intervals=bootstrap with {fewest} seeds: below {FEWEST_FOR_BOOTSTRAP} a 95 % interval holds the true mean "
        "far less often than 95 times in 100, with 3 seeds about 75 times; intervals=auto takes Student's t there"
    ]


def companion(tag: str, tags: Sequence[str], kind: str) -> str | None:
    """The tag that says another thing of the same metric: of ``val/impact_offset_ms`` ``val/impact_offset_coverage``.

    Args:
        tag: of a figure.
        tags: all there are.
        kind: ``coverage`` or ``n``.
    """
    stem = tag
    while stem:
        if (found := f"{stem}_{kind}") in tags and found != tag:
            return found
        stem = stem.rpartition("_")[0]
    return None


def costs_of(table: pd.DataFrame, label: str) -> dict[str, float | None]:
    """Mean costs of a variant's finished runs; None where no run says."""
    mine = table[table["label"] == label] if len(table) else table
    return {name: _plain(mine[name].mean()) if name in mine and len(mine) else None for name in COSTS}


def _plain(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
