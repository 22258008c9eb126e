"""Stages that tests plant in other processes; imported there by name."""

import os
import signal
import time
from pathlib import Path

from ovi.codecs.base import TEXT_ENCODERS
from ovi.codecs.text import HashedText
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


@TEXT_ENCODERS.register("tests_deadly_text")
class DeadlyText(HashedText):
    """Kills its process when it is asked for anything.

    Args:
        text_dim: width of an embedding.
        kill: whether to.
    """

    def __init__(self, *, text_dim: int = 8, kill: bool = False) -> None:
        super().__init__(text_dim=text_dim)
        self.kill = kill

    def encode(self, prompts):
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(prompts)
