"""Units done by this process, and by any number of others that run the same command."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import chain

from ovi.data.encode_folder import EncodeFolder
from ovi.data.launchers.base import LAUNCHERS, LOOK_S, Launcher, Report, Unit, Worker, claimed, num_done, num_in_all
from ovi.data.waiting import pause


@LAUNCHERS.register("local")
class Local(Launcher):
    """This process, and with it all others that run the same command: torchrun, SLURM arrays, by hand."""

    def __call__(
        self, folder: EncodeFolder, units: Mapping[str, Unit], worker: Worker, begins_at: float, report: Report
    ) -> int:
        total, num_new, base, count = num_in_all(units), 0, 0, 0
        waits_since = time.monotonic()

        def on_one() -> None:
            nonlocal count
            count += 1
            report(base + count, total)

        while True:
            finished, looked = folder.finished(), time.monotonic()
            if units.keys() <= finished:
                return num_new
            base, count = num_done(units, finished), 0
            if base:
                report(base, total)
            names = claimed(folder, units, finished, begins_at)
            first = next(names, None)
            if first is None:
                pause(waits_since, folder.storage.poll_s)  # others hold what is left; one that dies leaves it to us
                continue
            for name in worker(folder, ((name, units[name]) for name in chain([first], names)), on_one):
                folder.claims.give_back(name)
                num_new += len(units[name])
                if time.monotonic() - looked > LOOK_S:
                    base, count, looked = num_done(units, folder.finished()), 0, time.monotonic()
            waits_since = time.monotonic()


__all__ = ["Local"]
