"""What varies in a sweep: axes, their labels and overrides, and the variants that they make."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ovi.commands.hints import did_you_mean
from ovi.commands.sweeping.arguments import key_of, merged
from ovi.errors import OviError

ALL = "all"

Options = Callable[[str], Sequence[str]]
"""A config group's name -> its entries; none where there is no such group."""


@dataclass(frozen=True)
class Variant:
    """One setting of what varies.

    Args:
        label: its name.
        overrides: what makes it.
    """

    label: str
    overrides: tuple[str, ...]

    @property
    def settings(self) -> dict[str, str]:
        """Its values by key."""
        return {key_of(o): o.partition("=")[2] for o in self.overrides}

    @property
    def slug(self) -> str:
        """Its label as part of a folder's name."""
        return re.sub(r"[^\w.=+-]+", "-", self.label).strip("-.") or "variant"


def variants_of(axes: Mapping[str, Any], options: Options, groups: Sequence[str], *, crossed: bool) -> list[Variant]:
    """The variants of a sweep.

    Args:
        axes: by name, as ``conf/sweep.yaml`` describes them.
        options: entries of config groups.
        groups: names of config groups, for messages.
        crossed: every combination of the axes; else one axis at a time.

    Raises:
        OviError: for an axis without values, a label twice, or a group or entry that does not exist.
    """
    lists = [_axis(str(name), given, options, groups) for name, given in axes.items() if given is not None]
    if not lists:
        raise OviError("there is nothing to vary: choose a sweep, or give axes={...} (`ovi sweep --help`)")
    if crossed:
        made = [
            Variant("/".join(v.label for v in row), tuple(merged(*(v.overrides for v in row))))
            for row in itertools.product(*lists)
        ]
        _check_apart(lists)
    else:
        made = [variant for row in lists for variant in row]
    slugs: dict[str, str] = {}
    for variant in made:
        if variant.slug in slugs:
            raise OviError(f"axes: the labels {slugs[variant.slug]!r} and {variant.label!r} cannot be told apart")
        slugs[variant.slug] = variant.label
    return made


def _check_apart(lists: Sequence[Sequence[Variant]]) -> None:
    """Axes that set one key cannot be crossed."""
    keys = [{key for variant in row for key in variant.settings} for row in lists]
    for one, other in itertools.combinations(keys, 2):
        if one & other:
            raise OviError(f"axes: two of them set {', '.join(sorted(one & other))}: they cannot be crossed")


def _axis(name: str, given: Any, options: Options, groups: Sequence[str]) -> list[Variant]:
    if isinstance(given, Mapping):
        made = [Variant(str(label), _overrides(name, label, words)) for label, words in given.items()]
    elif given == ALL:
        made = [Variant(entry, (f"{name}={entry}",)) for entry in _entries(name, options, groups)]
    elif isinstance(given, Sequence) and not isinstance(given, str):
        entries = options(name.partition("@")[0])
        if entries or "/" in name:
            made = [_entry(name, value, options, groups) for value in given]
        else:
            short = name.rpartition(".")[2]
            made = [Variant(f"{short}={_shown(value)}", (f"{name}={literal(value)}",)) for value in given]
    else:
        raise OviError(
            f"axes.{name} is {{LABEL: [OVERRIDES], ...}}, a list of values, or `all` for a config group; got {given!r}"
        )
    if not made:
        raise OviError(f"axes.{name} has no values: give some, or leave it out with axes.{name}=null")
    labels = [variant.label for variant in made]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise OviError(f"axes.{name} has {twice!r} twice: every label names one variant")
    return made


def _overrides(axis: str, label: Any, words: Any) -> tuple[str, ...]:
    if isinstance(words, Mapping):
        return tuple(f"{key}={literal(value)}" for key, value in words.items())
    words = [words] if isinstance(words, str) else words
    if not isinstance(words, Sequence) or not all(isinstance(w, str) and ("=" in w or w[:1] == "~") for w in words):
        raise OviError(f"axes.{axis}.{label} is {{KEY: VALUE, ...}} or a list of overrides, [] for none; got {words!r}")
    return tuple(words)


def _entries(group: str, options: Options, groups: Sequence[str]) -> Sequence[str]:
    entries = options(group.partition("@")[0])
    if not entries:
        raise OviError(f"axes: no config group {group!r}.{did_you_mean(group, groups)} `ovi list` shows them")
    return entries


def _entry(group: str, name: Any, options: Options, groups: Sequence[str]) -> Variant:
    entries = _entries(group, options, groups)
    if str(name) not in entries:
        raise OviError(f"axes: no {group} is called {name!r}.{did_you_mean(str(name), entries)} "
                       f"There are: {', '.join(entries)}")  # fmt: skip
    return Variant(str(name), (f"{group}={name}",))


def literal(value: Any) -> str:
    """A value as Hydra's overrides write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(map(literal, value)) + "]"
    text = str(value)
    if re.fullmatch(r"[A-Za-z_./][\w./:%+-]*", text) and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    return quoted(text)


def quoted(text: str) -> str:
    """Words in quotes, as Hydra's overrides read them: a backslash counts as such unless a quote follows."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), text) + "'"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else literal(value).strip("'")
