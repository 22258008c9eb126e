"""Learning curves as a file that any tool reads."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger


class Curves(CSVLogger):
    """Lightning's CSV logger: everything that is logged, in ``curves/metrics.csv`` of the run's folder.

    Where a run is continued in its folder, what was logged before moves to ``curves_1``, ``curves_2``, ...; Lightning
    would delete it.

    Args:
        save_dir: the run's folder.
        name: a folder in between; none.
        version: the folder's name.
    """

    def __init__(self, save_dir: str, name: str = "", version: str = "curves") -> None:
        super().__init__(save_dir, name=name, version=version)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None and (folder := Path(self.log_dir)).is_dir():
            places = (folder.with_name(f"{folder.name}_{n}") for n in count(1))
            folder.rename(next(place for place in places if not place.exists()))
        return super().experiment
