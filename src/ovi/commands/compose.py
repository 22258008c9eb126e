"""A command's configuration without its command line: for programs and notebooks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from ovi.commands.components import load_components, store_components
from ovi.commands.hydra_app import hydra_errors_as_ours
from ovi.commands.knobs import check_knobs


def compose(command: str, overrides: Sequence[str] = ()) -> DictConfig:
    """What a command would work with, checked as on its command line. A Hydra that runs already is left as it is.

    Args:
        command: ``train``, ``encode``, ``sample``, ``evaluate``: a file of ``conf/``.
        overrides: as typed.

    Returns:
        The configuration with Hydra's own part, ``hydra``, which ``task_config`` takes out.

    Raises:
        OviError: for overrides that do not compose, knobs that nothing has.
    """
    with _hydra():
        return _composed(command, overrides)


@contextmanager
def running(command: str, overrides: Sequence[str] = ()) -> Iterator[tuple[DictConfig, Any]]:
    """What ``compose`` gives, with a Hydra that stays up for as long as a ``with`` block works with it.

    Yields:
        The configuration for the command's function, and Hydra's loader of further ones.
    """
    with _hydra() as hydra:
        composed = _composed(command, overrides)
        with hydra_errors_as_ours(), _current(composed):
            yield task_config(composed), hydra.config_loader


@contextmanager
def _hydra() -> Iterator[Any]:
    load_components()
    store_components()
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra_errors_as_ours(), initialize_config_module("ovi.conf", version_base="1.3"):
            yield GlobalHydra.instance().hydra
    finally:
        GlobalHydra.instance().hydra = before


def _composed(command: str, overrides: Sequence[str]) -> DictConfig:
    config = hydra_compose(command, list(overrides), return_hydra_config=True)
    check_knobs(config)
    return config


@contextmanager
def _current(composed: DictConfig) -> Iterator[None]:
    state = HydraConfig.instance()
    before = state.cfg
    state.set_config(composed)
    try:
        yield
    finally:
        state.cfg = before


def task_config(composed: DictConfig) -> DictConfig:
    """A copy of what ``compose`` gave without Hydra's own part, as a command's function takes it."""
    config = copy.deepcopy(composed)
    with open_dict(config):
        config.pop("hydra")
    return config


@contextmanager
def in_folder(composed: DictConfig, folder: Path) -> Iterator[DictConfig]:
    """Have a composed configuration's ``${hydra:...}`` mean a run in a folder, for the length of a ``with`` block.

    Yields:
        The configuration for the command's function.
    """
    whole = copy.deepcopy(composed)
    with open_dict(whole):
        whole.hydra.runtime.output_dir = str(folder)
    with _current(whole), hydra_errors_as_ours():
        yield task_config(composed)


def run_folder(config: DictConfig) -> Path:
    """Where a composed command would write if it began now."""
    fresh = copy.deepcopy(config)
    OmegaConf.clear_cache(fresh)  # it keeps the time at which the folder was first asked for
    return Path(fresh.hydra.run.dir)


def flat(config: DictConfig) -> dict[str, Any]:
    """Values by dotted key, interpolations as written."""
    found: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict) and value:
            for name, child in value.items():
                walk(child, f"{key}.{name}" if key else str(name))
        else:
            found[key] = value

    walk(OmegaConf.to_container(config, resolve=False), "")
    return found


def made_of(node: Any, *wiring: Any) -> Any:
    """What a node of a configuration stands for, called with its wiring where it has any."""
    with hydra_errors_as_ours():
        made = instantiate(node, _convert_="all")
        return made(*wiring) if wiring else made
