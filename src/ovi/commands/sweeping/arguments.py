"""Which words of a command line are for the sweep, which for every run, and which for Hydra's launcher."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ovi.errors import OviError

OWN = (
    "sweep",
    "name",
    "seeds",
    "base",
    "axes",
    "crossed",
    "retrain",
    "sweeper",
    "n_jobs",
    "threads",
    "on_stopped",
    "objective",
    "space",
    "search",
)
"""Settings of ``conf/sweep.yaml``, but ``launcher``: Hydra would take that for a config group."""

OPEN = ("axes", "space")
"""Those whose keys are the user's own."""


@dataclass(frozen=True)
class Arguments:
    """A command line, sorted.

    Args:
        own: settings of the sweep and Hydra's flags.
        of_runs: overrides of every run.
        of_launcher: ``hydra.launcher.*``.
        launcher: where runs go; None where it is not said.
    """

    own: tuple[str, ...]
    of_runs: tuple[str, ...]
    of_launcher: tuple[str, ...]
    launcher: str | None


def sort_arguments(argv: Sequence[str]) -> Arguments:
    """Sort the words of a command line.

    Raises:
        OviError: for what the sweep itself decides.
    """
    own, of_runs, of_launcher, launcher = [], [], [], None
    for word in argv:
        if word.startswith("-") or not ("=" in word or word.startswith("~")):
            own.append(word)
            continue
        key = key_of(word)
        top = re.split(r"[./@]", key)[0]
        if key == "launcher":
            launcher = word.partition("=")[2]
        elif key == "hydra/launcher":
            raise OviError(f"{word}: say launcher={word.partition('=')[2]}")
        elif key == "seed":
            raise OviError(f"{word}: a sweep takes seeds=[{word.partition('=')[2]}]")
        elif key.startswith("hydra.launcher"):
            of_launcher.append(word)
        elif top == "hydra":
            raise OviError(f"{word}: a sweep decides this itself; runs go to runs/<name>, and name= is yours to set")
        elif top in OWN:
            # Hydra closes mappings against new keys; these are there to be filled.
            own.append(f"++{word}" if top in OPEN and word[0].isalpha() else word)
        else:
            of_runs.append(word)
    return Arguments(tuple(own), tuple(of_runs), tuple(of_launcher), launcher)


def key_of(override: str) -> str:
    """The key of an override, without what adds or deletes it."""
    return override.partition("=")[0].lstrip("+~")


def merged(*overrides: Iterable[str]) -> list[str]:
    """Overrides of which later ones replace earlier ones of the same key: Hydra takes a config group but once."""
    found: dict[str, str] = {}
    for override in (word for words in overrides for word in words):
        key = key_of(override)
        found.pop(key, None)
        found[key] = override
    return list(found.values())
