"""Stages that tests plant in other processes; imported there by name."""

import os
import signal
import time
from pathlib import Path

from ovi.data.stages.base import STAGES, Filter


@STAGES.register("tests_logged")
class Logged(Filter):
    """Writes the key of every clip it sees to a file, and may kill its process.

    Args:
        log: file that keys are appended to.
        kill: part of the key of a clip before which the process is killed.
        times: how many processes are killed.
    """

    name = "tests_logged"
    level = "clip"

    def __init__(self, *, log: str, kill: str | None = None, times: int = 1) -> None:
        self.log, self.kill, self.times = Path(log), kill, times

    def judge(self, candidate):
        if self.kill is not None and self.kill in candidate.key:
            for number in range(self.times):
                try:
                    os.close(os.open(f"{self.log}.killed-{number}", os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    continue
                time.sleep(0.5)  # time for others to finish something
                os.kill(os.getpid(), signal.SIGKILL)
        with open(self.log, "a") as file:
            file.write(candidate.key + "\n")
        return candidate
