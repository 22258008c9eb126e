"""Stages as a user chose them: named with their knobs, to be built wherever they run."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ovi.data.stages.base import STAGES, Level, Stage
from ovi.errors import OviError


@dataclass(frozen=True)
class ChosenStages:
    """Specs of stages in their order, and what the code gives them. Plain enough to be sent to another process.

    Args:
        specs: ``{"name": ..., "knobs": {...}}`` by any label; None switches one off.
        wiring: values of positional parameters, by the parameter's name.
    """

    specs: Mapping[str, Mapping[str, Any] | None]
    wiring: Mapping[str, Any]
    modules: tuple[str, ...] = field(init=False, default=())
    """Where the stages are registered: another process imports these before it asks for them."""

    def __post_init__(self) -> None:
        names = {STAGES[spec["name"]].__module__ for spec in self.specs.values() if spec is not None}
        object.__setattr__(self, "modules", tuple(sorted(names)))

    def of_level(self, *levels: Level, before: Level | None = None) -> dict[str, Stage]:
        """The stages of these levels, built, in order; only those ahead of the first of level ``before``, if given.

        Raises:
            OviError: for a stage that wants something nobody gives, or knobs that make no sense.
        """
        for module in self.modules:
            importlib.import_module(module)
        built: dict[str, Stage] = {}
        for label, spec in self.specs.items():
            if spec is None:
                continue
            if level_of(spec["name"]) == before:
                break
            if level_of(spec["name"]) not in levels:
                continue
            missing = [name for name in STAGES.wiring(spec["name"]) if name not in self.wiring]
            if missing:
                raise OviError(f"stage {label}: {spec['name']} needs {', '.join(missing)}, which was not given")
            built[label] = STAGES.build(spec, *(self.wiring[name] for name in STAGES.wiring(spec["name"])))
        return built

    def describe(self) -> dict[str, Any]:
        """JSON-ready: what decides which clips pass."""
        return {label: dict(spec) for label, spec in self.specs.items() if spec is not None}

    def describe_wiring(self) -> dict[str, Any]:
        """JSON-ready: what the code gives the stages, by class and settings; the clips' form is told elsewhere."""
        wanted = {name for spec in self.specs.values() if spec for name in STAGES.wiring(spec["name"])} - {"form"}
        return {name: _described(self.wiring[name]) for name in sorted(wanted & self.wiring.keys())}


def _described(given: Any) -> dict[str, Any]:
    plain = {k: v for k, v in getattr(given, "__dict__", {}).items() if isinstance(v, str | int | float | bool | None)}
    kind = given if isinstance(given, type) or not hasattr(given, "__dict__") else type(given)
    return {"is": f"{kind.__module__}.{getattr(given, '__qualname__', kind.__qualname__)}", **plain}


def level_of(name: str) -> Level:
    """The level of a registered stage."""
    level: Level = STAGES[name].level  # type: ignore[attr-defined]
    return level
