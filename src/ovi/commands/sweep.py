"""``ovi sweep``: many runs of ``ovi train``, alike but for what varies."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from ovi.commands.hydra_app import run
from ovi.commands.sweeping.arguments import Arguments, sort_arguments


def main(argv: list[str]) -> None:
    """Compose ``conf/sweep.yaml`` of what is the sweep's own, and sweep with the rest."""
    from ovi.commands.failure import exit_clearly

    with exit_clearly():
        arguments = sort_arguments(argv)

    def sweep_task(config: DictConfig) -> Any:
        return sweep(config, arguments)

    run("sweep", sweep_task, list(arguments.own))


def sweep(config: DictConfig, arguments: Arguments) -> Any:
    """Plan, check, run and report a sweep.

    Args:
        config: composed from ``conf/sweep.yaml``.
        arguments: the command line, sorted.

    Returns:
        The table of results.

    Raises:
        OviError: before the first run for what does not fit, afterwards when a run failed.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    from ovi.commands.sweeping.grid import sweep_grid
    from ovi.commands.sweeping.plan import plan_sweep
    from ovi.commands.sweeping.search import sweep_search

    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    plan = plan_sweep(config, arguments, hydra.config_loader, HydraConfig.get().runtime.choices.get("sweep"))
    return sweep_search(plan) if plan.searches else sweep_grid(plan)
