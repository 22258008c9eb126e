"""Sweeps from a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ovi.notebook.short_errors import ShortErrors

if TYPE_CHECKING:
    import pandas as pd


def sweep(*words: str) -> pd.DataFrame:
    """Do what is not done yet of a sweep, as ``ovi sweep`` does.

    Args:
        words: as on the command line: ``"axes={model/fusion: [none, bridge]}"``, ``"seeds=[0,1,2]"``, ``"name=mine"``,
            and overrides of every run.

    Returns:
        A row for every run: its label, settings, seed, costs and figures.

    Raises:
        OviError: before the first run for what does not fit, afterwards when a run failed.
    """
    with ShortErrors():
        from ovi.commands.sweep import sweep_words

        found: pd.DataFrame = sweep_words(words)
    return found
