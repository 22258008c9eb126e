"""Several sets as one: which they are, how much each weighs, and whether they fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from warnings import warn

from ovi.data.index import ShardIndex
from ovi.errors import OviError


@dataclass(frozen=True)
class Mixture:
    """Sets that are read together.

    Args:
        indexes: of the sets, by name.
        weights: of each; None where none was given.
    """

    indexes: dict[str, ShardIndex]
    weights: tuple[float, ...] | None

    @property
    def first(self) -> ShardIndex:
        """The set that says what the latents look like; the others agree with it."""
        return next(iter(self.indexes.values()))


def load_mixture(path: str | None, sets: Mapping[str, Any] | Sequence[str] | None, *, strict: bool = True) -> Mixture:
    """Load one set, or several that agree.

    Args:
        path: of a single set.
        sets: paths, or ``{name: {"path": PATH, "weight": WEIGHT}}`` (or ``{name: PATH}``).
        strict: refuse a set of which shards are missing or not whole; otherwise warn, as long as one is.

    Raises:
        OviError: when neither or both are given, a weight is no positive number or given to some sets alone, sets
            differ in anything that their latents depend on, or shards are missing.
    """
    if (path is None) == (not sets):
        raise OviError(
            f"give data.path=FOLDER for one set, or data.sets for several, and not both; got path {path!r} and sets "
            f"{sets!r}"
        )
    entries = {"set": path} if path is not None else _entries(sets or ())
    indexes, weights = {}, []
    for name, entry in entries.items():
        place, weight = _entry(name, entry)
        indexes[name] = ShardIndex.load(place, verify=strict)
        if not strict:
            for contradiction in indexes[name].contradictions():
                raise OviError(contradiction)
            _warn_of_missing(indexes[name])
        weights.append(weight)
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        missing = [name for name, weight in zip(indexes, weights) if weight is None]
        raise OviError(f"data.sets: {', '.join(missing)} has no weight, though others have: give all sets one, or none")
    first, *others = indexes
    for name in others:
        differences = indexes[first].differences(indexes[name])
        if differences:
            raise OviError(
                f"data.sets: {first} and {name} cannot be mixed, their latents differ: {'; '.join(differences)}"
            )
    return Mixture(indexes, tuple(given) or None)


def _warn_of_missing(index: ShardIndex) -> None:
    """Tell what is wrong with a set's shards.

    Raises:
        OviError: when none is right.
    """
    problems, count = index.problems(), sum(map(len, index.splits.values()))
    if not problems:
        return
    if len(problems) == count:
        raise OviError(problems[0])
    warn(
        f"{len(problems)} of {count} shards are missing or not whole, and what they lack is left out (data.strict=true "
        f"stops instead): {'; '.join(problems[:3])}{'; ...' if len(problems) > 3 else ''}",
        stacklevel=2,
    )


def _entries(sets: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    if isinstance(sets, Mapping):
        return {str(name): entry for name, entry in sets.items()}
    if isinstance(sets, str):
        raise OviError(
            f"data.sets takes a list of folders or {{name: {{path, weight}}}}; for one set, data.path={sets}"
        )
    named = {str(place): place for place in sets}
    if len(named) < len(sets):
        raise OviError(f"data.sets names a folder twice: {', '.join(map(str, sets))}; give it a weight instead")
    return named


def _entry(name: str, entry: Any) -> tuple[str, float | None]:
    if isinstance(entry, str):
        return entry, None
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str) or set(entry) - {"path", "weight"}:
        raise OviError(f"data.sets.{name}: needs a path, and may have a weight; got {entry!r}")
    weight = entry.get("weight")
    if weight is not None and (not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < 1e9):
        raise OviError(f"data.sets.{name}.weight must be a positive number, got {weight!r}")
    return entry["path"], weight
