"""Units done by this process, and by any number of others that run the same command."""

from __future__ import annotations

from collections.abc import Mapping

from ovi.data.encode_folder import EncodeFolder
from ovi.data.launchers.base import LAUNCHERS, Launcher, Report, Unit, Worker, claimed, num_done, num_in_all


@LAUNCHERS.register("local")
class Local(Launcher):
    """This process, and with it all others that run the same command: torchrun, SLURM arrays, by hand."""

    def __call__(
        self, folder: EncodeFolder, units: Mapping[str, Unit], worker: Worker, begins_at: float, report: Report
    ) -> int:
        total, num_new, count = num_in_all(units), 0, 0
        base = num_done(units, folder.finished())

        def on_one() -> None:
            nonlocal count
            count += 1
            report(base + count, total)

        names = claimed(folder, units, begins_at, report)
        for name in worker(folder, ((name, units[name]) for name in names), on_one):
            folder.claims.give_back(name)
            num_new += len(units[name])
            base, count = num_done(units, folder.finished()), 0
        return num_new


__all__ = ["Local"]
