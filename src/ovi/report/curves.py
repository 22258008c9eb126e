"""Learning curves of many runs on one grid of steps, thin enough for a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

_NOT_SHOWN = ("val_sigma_n/", "attention_blocks/", "val_real/")
_ASIDE = ("_n", "_n_real")


def thinned(curves: Mapping[str, pd.DataFrame], *, most: int = 160) -> dict[str, dict[str, Any]]:
    """Curves by tag, each on one grid of steps for all runs, so that means over runs compare like with like.

    A tag logged at no more than ``most`` steps stays as it is; of others, a point is the mean over an interval of
    steps.

    Args:
        curves: columns step, tag, value, by run.
        most: points a curve.

    Returns:
        By tag: ``steps`` [N], ``runs`` {run: [N], None where it has no value}, ``bin``, steps a point stands for.
    """
    import pandas as pd

    # Figures of the mean over an interval need no more than five digits on a screen.
    parts = [table.assign(run=run) for run, table in curves.items() if len(table)]
    if not parts:
        return {}
    whole = pd.concat(parts, ignore_index=True)
    shown = ~(whole.tag.str.startswith(_NOT_SHOWN) | whole.tag.str.endswith(_ASIDE))
    whole = whole[shown & np.isfinite(whole.value)]
    found = {}
    for tag, rows in whole.groupby("tag", sort=True):
        steps = np.unique(rows.step)
        width = 1
        if len(steps) > most:
            width = int(np.ceil((steps[-1] - steps[0] + 1) / most))
        place = (rows.step - steps[0]) // width if width > 1 else np.searchsorted(steps, rows.step)
        means = rows.groupby(["run", place]).value.mean().unstack("run")
        at = rows.groupby(place).step.mean() if width > 1 else pd.Series(steps, index=range(len(steps)))
        found[str(tag)] = {
            "steps": [round(float(at[i]), 1) for i in means.index],
            "runs": {str(run): [_short(v) for v in means[run]] for run in means.columns},
            "bin": width,
        }
    return found


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None
