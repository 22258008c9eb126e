"""Brings every registered component in, ours and those of plug-ins, and shows them to Hydra."""

from __future__ import annotations

import importlib
import re
from importlib.metadata import entry_points
from pathlib import Path

import ovi
from ovi.errors import OviError
from ovi.registry import REGISTRIES

PLUGINS = "ovi.components"
"""Entry-point group of out-of-tree components: each names a module that registers something when imported."""

_REGISTERS = re.compile(r"\.register\(|\bRegistry\(")


def load_components(of: str | None = None) -> None:
    """Import every module of ours that owns a registry or enters something in one, then every installed plug-in.

    A new file in ``fusion/`` needs no list to be in: sources are searched for a registration, so that modules without
    one, and what they import, cost nothing.

    Args:
        of: the registry's name in the sources, such as ``FUSIONS``, to import the modules alone that enter something
            in that one; None for all.

    Raises:
        OviError: when a plug-in cannot be imported.
    """
    for module in component_modules(of):
        importlib.import_module(module)
    for plugin in entry_points(group=PLUGINS):
        try:
            plugin.load()
        except Exception as error:  # whatever a stranger's module raises
            of = f" of {plugin.dist.name}" if plugin.dist else ""
            raise OviError(
                f"the plug-in {plugin.name!r}{of} cannot be imported from {plugin.value!r} "
                f"({type(error).__name__}: {error}). Repair or uninstall it"
            ) from error


def load_config_dir(folder: str | Path) -> None:
    """Import the components that yaml files in a folder for ``--config-dir`` name by ``_target_``; they then register.

    Composing needs no such help: Hydra imports a target when it instantiates it.

    Raises:
        OviError: when there is no such folder, or a target in it cannot be imported.
    """
    from omegaconf import OmegaConf

    if not Path(folder).is_dir():
        raise OviError(f"--config-dir {folder}: there is no such folder")
    for registry in list(REGISTRIES.values()):
        for file in sorted(Path(folder, registry.group).glob("*.yaml")):
            target = OmegaConf.select(OmegaConf.load(file), "_target_")
            if target is None:  # settings of a component that is known otherwise
                continue
            try:
                importlib.import_module(str(target).rpartition(".")[0])
            except Exception as error:  # whatever a stranger's module raises
                raise OviError(
                    f"{file}: _target_ {target!r} cannot be imported ({type(error).__name__}: {error}). "
                    "It must name a class or function by its module: install that, or add its folder to PYTHONPATH"
                ) from error


def component_modules(of: str | None = None) -> list[str]:
    """Names of our modules whose source registers a component or makes a registry; ``of`` as in ``load_components``."""
    registers = _REGISTERS if of is None else re.compile(rf"\b{of}(\.register\(| = Registry\()")
    root = Path(ovi.__file__).parent
    found = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if path.parts[0] in ("commands", "conf", "registry.py"):
            continue
        if registers.search(file.read_text(encoding="utf-8")):
            found.append(".".join(["ovi", *path.with_suffix("").parts]).removesuffix(".__init__"))
    return found


def store_components() -> None:
    """Enter every registered component into Hydra's ConfigStore, which must happen before Hydra composes."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for registry in REGISTRIES.values():
        for name in registry:
            store.store(group=registry.group, name=name, node=registry.node(name), provider="ovi")
