"""Checks a composed config against the registries: a knob nobody has must not pass in silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig

from ovi.commands.hints import did_you_mean
from ovi.errors import OviError
from ovi.registry import REGISTRIES, Registry

_HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


def check_knobs(config: DictConfig) -> None:
    """Refuse a knob that its component does not have, wherever the component's node stands in the config.

    Hydra's own check does not see what comes by ``+key=value`` or from a yaml file, and a component with wiring is
    called long after.

    Raises:
        OviError: naming the key, the component and the knobs it has; or a config group that does not exist.
    """
    for key in map(str, config):
        if "/" in key:  # Hydra takes `+model/fuson=none` for a value whose name has a slash in it
            raise OviError(unknown_group(key))
    owners = {
        registry.node(name)["_target_"]: (registry, name) for registry in REGISTRIES.values() for name in registry
    }
    for key, node in _nodes(config, ""):
        target = node._get_node("_target_", validate_access=False)
        owner = owners.get(str(target._value())) if target is not None else None  # type: ignore[union-attr]
        if owner:
            _check(key, node, *owner)


def unknown_group(group: str) -> str:
    """Message for a config group that does not exist."""
    groups = [registry.group for registry in REGISTRIES.values()]
    return f"no config group {group!r}.{did_you_mean(group, groups)} `ovi list` shows them"


def _check(key: str, node: DictConfig, registry: Registry, name: str) -> None:
    knobs, wiring = registry.knobs(name), registry.wiring(name)
    for knob in map(str, node.keys()):
        if knob in knobs or knob in _HYDRA_KEYS:
            continue
        where = f"{key}.{knob}" if key else knob
        if knob in wiring:
            raise OviError(f"{where} is not a knob: {registry.name} {name!r} is given its {knob} by the code")
        raise OviError(
            f"{where}: {registry.name} {name!r} has no knob {knob!r}.{did_you_mean(knob, knobs)} "
            f"Its knobs: {', '.join(map(str, knobs.values())) or 'none'}"
        )


def _nodes(config: DictConfig | ListConfig, key: str) -> Iterator[tuple[str, DictConfig]]:
    """Every mapping in a config with its dotted key, without resolving an interpolation."""
    if config._is_none() or config._is_missing() or config._is_interpolation():
        return
    if isinstance(config, DictConfig):
        yield key, config
    names: list[Any] = list(config.keys()) if isinstance(config, DictConfig) else list(range(len(config)))
    for name in names:
        child = config._get_node(name)
        if isinstance(child, DictConfig | ListConfig):
            yield from _nodes(child, f"{key}.{name}" if key else str(name))
