"""``ovi sweep``: many runs of ``ovi train``, alike but for what varies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from ovi.commands.compose import running
from ovi.commands.hydra_app import run
from ovi.commands.sweeping.arguments import Arguments, sort_arguments
from ovi.errors import OviError


def main(argv: list[str]) -> None:
    """Compose ``conf/sweep.yaml`` of what is the sweep's own, and sweep with the rest."""
    from ovi.commands.failure import exit_clearly

    with exit_clearly():
        arguments = sort_arguments(argv)

    def sweep_task(config: DictConfig) -> Any:
        from hydra.core.global_hydra import GlobalHydra

        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        return sweep(config, arguments, hydra.config_loader)

    run("sweep", sweep_task, list(arguments.own))


def sweep_words(words: Sequence[str]) -> Any:
    """Sweep from a program or a notebook; the words are those of the command line, flags aside.

    Raises:
        OviError: as ``sweep`` does, and for flags.
    """
    flags = [word for word in words if word.startswith("-")]
    if flags:
        raise OviError(f"{' '.join(flags)}: flags are of the command line; here there are overrides, as in name=mine")
    arguments = sort_arguments(words)
    with running("sweep", arguments.own) as (config, loader):
        return sweep(config, arguments, loader)


def sweep(config: DictConfig, arguments: Arguments, loader: Any) -> Any:
    """Plan, check, run and report a sweep.

    Args:
        config: composed from ``conf/sweep.yaml``.
        arguments: the command line, sorted.
        loader: Hydra's, of further configurations.

    Returns:
        The table of results.

    Raises:
        OviError: before the first run for what does not fit, afterwards when a run failed.
    """
    from hydra.core.hydra_config import HydraConfig

    from ovi.commands.sweeping.grid import sweep_grid
    from ovi.commands.sweeping.plan import plan_sweep
    from ovi.commands.sweeping.search import sweep_search

    plan = plan_sweep(config, arguments, loader, HydraConfig.get().runtime.choices.get("sweep"))
    return sweep_search(plan) if plan.searches else sweep_grid(plan)
