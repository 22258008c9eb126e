"""What may be concluded from runs: means with intervals by variant, paired differences, which way is better."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ovi.errors import OviError
from ovi.runs.intervals import AUTO, holm, interval_of_mean
from ovi.runs.paired import Paired, paired
from ovi.runs.run import PRUNED

if TYPE_CHECKING:
    import pandas as pd

    from ovi.metrics.clip_metric import Direction


def direction(tag: str) -> Direction:
    """Which way a figure gets better, ``lower`` or ``higher``, as its metric declares; None where nothing says."""
    # Metrics bring torch with them: who only reads folders does without.
    from ovi.metrics.directions import direction as declared

    return declared(tag)


def summarise(
    table: pd.DataFrame, tag: str, by: str = "label", *, level: float = 0.95, method: str = AUTO
) -> pd.DataFrame:
    """Mean and interval of one figure for every variant, best first; variants without it last.

    The interval is of the mean over trainings (seeds): Student's t, which assumes that they scatter about normally, or
    from 30 runs on the bootstrap (see ``ovi.runs.intervals``: with few seeds a bootstrap's is far too narrow). With two
    seeds it is very wide, with one there is none.

    Args:
        table: of runs, one a row; those whose ``status`` is ``pruned`` have no final figure and do not count.
        tag: of the figure, a column.
        by: column that says which runs belong together.
        level: of confidence, 0..1.
        method: of intervals: ``auto``, ``t`` or ``bootstrap``.

    Returns:
        Columns ``by``, n (runs that have the figure), mean, std (NaN for one run), low, high, interval (``t``,
        ``bootstrap``, or ``none``).

    Raises:
        OviError: when the table has no such column, or for another method.
    """
    import pandas as pd

    for column in (by, tag):
        if column not in table:
            raise OviError(f"the table of runs has no column {column!r}; it has {', '.join(map(str, table.columns))}")
    rows = []
    for name, group in table.groupby(by, dropna=False, sort=False):
        values = pd.to_numeric(group[tag], errors="coerce")
        if "status" in group:
            values = values[group["status"] != PRUNED]
        values = values.dropna()
        n, found = len(values), interval_of_mean(values.to_numpy(), level=level, method=method)
        mean = float(values.mean()) if n else math.nan
        std = float(values.std(ddof=1)) if n > 1 else math.nan
        rows.append((name, n, mean, std, found.low, found.high, found.method))
    summary = pd.DataFrame(rows, columns=[by, "n", "mean", "std", "low", "high", "interval"])
    return summary.sort_values("mean", ascending=direction(tag) != "higher", na_position="last", ignore_index=True)


__all__ = ["Paired", "direction", "holm", "paired", "summarise"]
