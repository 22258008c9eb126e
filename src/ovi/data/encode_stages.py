"""The stages of an encoding: those the user asked for, and those that its other settings need among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ovi.data.forms import Forms
from ovi.data.stages import nearest_size, windows  # noqa: F401  (registers stages that are put in here)
from ovi.data.stages.chosen import ChosenStages, level_of
from ovi.errors import OviError


def said_once(
    stages: Mapping[str, Mapping[str, Any] | None], name: str, given: Any, unsaid: Any, stage: tuple[str, str]
) -> Any:
    """A setting of the encoding that a knob of a stage may say in its place.

    Raises:
        OviError: when both say it, and not the same.
    """
    for label, spec in stages.items():
        if spec is None or spec["name"] != stage[0]:
            continue
        value = spec.get("knobs", {}).get(stage[1])
        if value is not None and given not in (unsaid, value):
            raise OviError(f"{name}={given}, but stages.{label}.{stage[1]}={value}: set one")
        return given if value is None else value
    return given


def chosen_stages(
    stages: Mapping[str, Mapping[str, Any] | None],
    wiring: Mapping[str, Any],
    clips_per_file: int | None,
    variable_frame_rate: str,
    forms: Forms,
    incomplete: str,
) -> tuple[ChosenStages, str]:
    """The stages with ``windows`` among them, which makes clips of a form out of files: behind the last of level "file"
    unless the user put it somewhere; ``incomplete`` ahead of all and ``nearest_size`` behind those of level "file",
    where they are needed. Then how variable frame rates are taken, which both may say.

    Raises:
        OviError: when ``windows`` is told otherwise than the encoding.
    """
    specs = {label: dict(spec) for label, spec in stages.items() if spec is not None}
    said, names = forms.settings(), {spec["name"] for spec in specs.values()}
    if "windows" not in names:
        settings = {"max_clips": clips_per_file, "variable_frame_rate": variable_frame_rate}
        specs = _behind_files(specs, "windows", settings)
    if "sizes" in said and "nearest_size" not in names:
        specs = _behind_files(specs, "nearest_size", {"sizes": said["sizes"]})
    if incomplete != "reject" and "incomplete" not in names:
        specs = {"incomplete": {"name": "incomplete", "knobs": {"keep": incomplete}}, **specs}
    label = next(label for label, spec in specs.items() if spec["name"] == "windows")
    knobs = dict(specs[label].get("knobs", {}))
    if "lengths" in said:
        knobs["lengths"] = said["lengths"]
    if clips_per_file is not None and knobs.get("max_clips") not in (None, clips_per_file):
        raise OviError(f"clips_per_file={clips_per_file}, but stages.{label}.max_clips={knobs['max_clips']}: set one")
    knobs["max_clips"] = knobs.get("max_clips") if clips_per_file is None else clips_per_file
    if "resample" in (knobs.get("variable_frame_rate"), variable_frame_rate):
        knobs["variable_frame_rate"] = variable_frame_rate = "resample"
    specs[label] = {**specs[label], "knobs": knobs}
    return ChosenStages(specs, wiring), variable_frame_rate


def _behind_files(specs: Mapping[str, dict[str, Any]], name: str, knobs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages with one more behind the last of level "file"."""
    files = {label: spec for label, spec in specs.items() if level_of(spec["name"]) == "file"}
    others = {label: spec for label, spec in specs.items() if label not in files}
    return {**files, name: {"name": name, "knobs": knobs}, **others}
