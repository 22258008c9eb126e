"""Registries: a name for every component a researcher may swap.

A registered class or function is the only declaration of a component. Its signature says everything else:
positional parameters are *wiring*, given by the code that builds it; keyword-only parameters are *knobs*, set by the
researcher. The Hydra node, the row in ``ovi list``, and the tests all derive from that signature.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from ovi.errors import OviError

Component = TypeVar("Component", bound=Callable[..., Any])

REGISTRIES: dict[str, Registry] = {}
"""Every registry by its name, filled as the modules that own them are imported."""


class UnknownNameError(OviError, KeyError):
    """A name that no component is registered under."""

    __str__ = OviError.__str__


class DuplicateNameError(OviError, ValueError):
    """A name that another component already has."""


@dataclass(frozen=True)
class Knob:
    """One keyword-only parameter of a component: its name, its default and its annotation as written."""

    name: str
    default: Any
    annotation: str

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    def __str__(self) -> str:
        return self.name if self.required else f"{self.name}={self.default!r}"


class Registry(Mapping[str, Callable[..., Any]]):
    """Components of one kind by name.

    Args:
        name: what one entry is called, in messages and in ``ovi list NAME=entry``.
        group: the Hydra config group its entries appear in, for instance ``model/fusion``.
        doc: one line that says what an entry does.

    Raises:
        DuplicateNameError: when another registry has that name.
    """

    def __init__(self, name: str, *, group: str, doc: str) -> None:
        if name in REGISTRIES:
            raise DuplicateNameError(f"a registry called {name!r} exists already")
        self.name, self.group, self.doc = name, group, doc
        self._entries: dict[str, Callable[..., Any]] = {}
        REGISTRIES[name] = self

    def register(self, name: str) -> Callable[[Component], Component]:
        """Decorator that enters a class or function under ``name``.

        Raises:
            DuplicateNameError: when the name is taken by something else (re-running a notebook cell that defines
                the same class again replaces it).
        """

        def enter(component: Component) -> Component:
            other = self._entries.get(name)
            if other is not None and _path(other) != _path(component):
                raise DuplicateNameError(
                    f"{self.name} {name!r} is already {_path(other)}; registered are {', '.join(self)}. "
                    f"Give {_path(component)} another name."
                )
            self._entries[name] = component
            return component

        return enter

    @contextmanager
    def temporary(self, name: str, component: Callable[..., Any]) -> Iterator[None]:
        """Enter a component for the length of a ``with`` block (tests, notebooks)."""
        self.register(name)(component)
        try:
            yield
        finally:
            del self._entries[name]

    def __getitem__(self, name: str) -> Callable[..., Any]:
        try:
            return self._entries[name]
        except KeyError:
            close = difflib.get_close_matches(str(name), self._entries, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UnknownNameError(
                f"no {self.name} is called {name!r}.{hint} Registered: {', '.join(self) or 'none'}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def wiring(self, name: str) -> list[str]:
        """Names of the positional parameters, which the code that builds the component supplies."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return [p.name for p in _parameters(self[name]) if p.kind in kinds]

    def knobs(self, name: str) -> dict[str, Knob]:
        """The keyword-only parameters by name, in the order written."""
        return {
            p.name: Knob(p.name, p.default, _annotation(p))
            for p in _parameters(self[name])
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }

    def node(self, name: str) -> dict[str, Any]:
        """The Hydra node of an entry: its target and every knob at its default.

        A component with wiring comes as ``_partial_``, to be called by the code that knows the wiring; one without is
        instantiated whole. Knobs without a default become ``???``. Hydra hands tuples over as lists: a component that
        takes a sequence accepts both.
        """
        node: dict[str, Any] = {"_target_": _path(self[name])}
        if self.wiring(name):
            node["_partial_"] = True
        for knob in self.knobs(name).values():
            default = knob.default
            node[knob.name] = "???" if knob.required else list(default) if isinstance(default, tuple) else default
        return node

    def spec(self, node: Mapping[str, Any]) -> dict[str, Any]:
        """What a Hydra node of this registry stands for, as plain data to store: ``{"name": ..., "knobs": {...}}``.

        Raises:
            UnknownNameError: when its target is not registered here.
        """
        name = next((n for n in self if _path(self[n]) == node.get("_target_")), None)
        if name is None:
            raise UnknownNameError(
                f"{node.get('_target_')!r} is not a registered {self.name}; registered: {', '.join(self)}"
            )
        return {"name": name, "knobs": {k: v for k, v in node.items() if k not in ("_target_", "_partial_")}}

    def build(self, spec: Mapping[str, Any], *wiring: Any) -> Any:
        """Call the entry that a stored ``spec`` names with its knobs, after the given wiring.

        Raises:
            UnknownNameError: for an unknown name, or a knob the entry does not have.
        """
        name, given = spec["name"], dict(spec.get("knobs", {}))
        component, known = self[name], self.knobs(name)
        unknown = [k for k in given if k not in known]
        if unknown:
            raise UnknownNameError(
                f"{self.name} {name!r} has no knob {', '.join(unknown)}; it has {', '.join(known) or 'none'}"
            )
        return component(*wiring, **given)

    def summary(self, name: str) -> str:
        """First line of the entry's docstring."""
        return (inspect.getdoc(self[name]) or "").strip().split("\n")[0]


def _path(component: Callable[..., Any]) -> str:
    return f"{component.__module__}.{component.__qualname__}"


def _parameters(component: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(component).parameters.values())


def _annotation(parameter: inspect.Parameter) -> str:
    a = parameter.annotation
    return "" if a is inspect.Parameter.empty else a if isinstance(a, str) else getattr(a, "__name__", str(a))
