"""Units done by this process, and by any number of others that run the same command."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import chain

from ovi.data.encode_folder import EncodeFolder
from ovi.data.launchers.base import LAUNCHERS, Launcher, Report, Unit, Worker, claimed, num_done, num_in_all

_LOOK_S = 5.0
"""How often progress counts what others have done."""


@LAUNCHERS.register("local")
class Local(Launcher):
    """This process, and with it all others that run the same command: torchrun, SLURM arrays, by hand."""

    def __call__(
        self, folder: EncodeFolder, units: Mapping[str, Unit], worker: Worker, begins_at: float, report: Report
    ) -> int:
        total, num_new, count = num_in_all(units), 0, 0
        base, looked = num_done(units, folder.finished()), time.monotonic()

        def on_one() -> None:
            nonlocal count
            count += 1
            report(base + count, total)

        while True:
            names = claimed(folder, units, begins_at, report)
            first = next(names, None)
            if first is None:
                if not set(units) - folder.finished():
                    return num_new
                time.sleep(folder.storage.poll_s)  # others hold what is left; a holder that dies leaves it to us
                continue
            for name in worker(folder, ((name, units[name]) for name in chain([first], names)), on_one):
                folder.claims.give_back(name)
                num_new += len(units[name])
                if time.monotonic() - looked > _LOOK_S:  # a folder of many units takes long to list
                    base, count, looked = num_done(units, folder.finished()), 0, time.monotonic()


__all__ = ["Local"]
