"""The ``ovi`` command: looks a subcommand up, imports its module and hands it the remaining arguments.

Nothing heavy may be imported here: ``ovi --help`` answers at once.
"""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

from ovi.commands.failure import exit_clearly
from ovi.commands.hints import did_you_mean
from ovi.errors import OviError


class Command(NamedTuple):
    """A subcommand: the module whose ``main(argv)`` runs it, and one line of help."""

    module: str
    help: str


COMMANDS = {
    "train": Command("ovi.commands.train", "train twin towers on shards of latents"),
    "sweep": Command("ovi.commands.sweep", "train many runs that differ in what varies: ablations, searches"),
    "encode": Command("ovi.commands.encode", "turn videos with sound, or synthetic clips, into shards of latents"),
    "data": Command("ovi.commands.data", "check a set of latent shards"),
    "sample": Command("ovi.commands.sample", "generate clips with sound from a trained run"),
    "evaluate": Command("ovi.commands.evaluate", "measure clips of any model, or of a run, against real ones"),
    "report": Command("ovi.commands.report", "compare runs: one page with plots and clips, or a paper's table"),
    "compare": Command("ovi.commands.compare", "whether two variants differ, over the same samples and seeds"),
    "convert": Command("ovi.commands.convert", "weights to the published names: of a run, of Ovi, of Wan2.2"),
    "demo": Command("ovi.commands.demo", "the whole loop on synthetic clips, small"),
    "list": Command("ovi.commands.list", "what can be swapped: every registered component and its knobs"),
}


def main(argv: list[str] | None = None) -> None:
    """Run ``ovi`` with the given arguments, those of the process if None.

    Raises:
        SystemExit: with code 1 after a message on bad input, 130 on an interrupt.
    """
    arguments = sys.argv[1:] if argv is None else argv
    with exit_clearly():
        name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
        if name in ("-h", "--help", "help"):
            print(usage())
        elif name in ("-V", "--version"):
            print(f"ovi {_version()}")
        else:
            command = COMMANDS.get(name)
            if command is None:
                raise OviError(f"no command {name!r}.{did_you_mean(name, COMMANDS)} Commands: {', '.join(COMMANDS)}")
            importlib.import_module(command.module).main(rest)


def usage() -> str:
    """The text of ``ovi --help``."""
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    return f"""ovi: a training and ablation bench for twin-backbone joint audio-video diffusion

usage: ovi COMMAND [key=value ...]
       ovi COMMAND --help     the command's configuration and options
       ovi --version

commands:
{table}

Settings are Hydra overrides, for instance: ovi train model/fusion=none trainer.max_steps=100
OVI_TRACEBACK=1 shows the traceback behind an error message."""


def _version() -> str:
    from importlib.metadata import version

    return version("ovi")
