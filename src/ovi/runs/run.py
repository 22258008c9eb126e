"""A run, read from its folder; what is large is read when it is asked for."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovi.errors import OviError
from ovi.runs.alive import is_alive
from ovi.runs.identity import config_hash
from ovi.runs.jsonl import read_lines

if TYPE_CHECKING:
    import pandas as pd

FINISHED, RUNNING, FAILED, STOPPED = STATUSES = ("finished", "running", "failed", "stopped")
PRUNED = "pruned"
IDENTITY, CONFIG, SUMMARY, FAILURE = "run.json", "config.yaml", "summary.json", "failed.json"
ROUNDS, CLIPS, CURVES, CURVES_FILE = "metrics.jsonl", "clips.jsonl", "curves", "metrics.csv"

_OF_TRAINING = {"model", "data", "trainer"}
_TIME = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d.*")
_STEP = re.compile(r"step_(\d+)")
_ATTENTION = re.compile(r"step_(\d+)_(.+)\.png")


@dataclass(frozen=True)
class Run:
    """A run of ``ovi train``, finished or not.

    Attributes:
        folder: of the run.
        status: ``finished``, ``running``, ``failed`` or ``stopped``.
        label: of its variant in a sweep; of a plain run its name.
        variant: what sets it apart in its sweep, values by override key; {} for a plain run.
        seed: of the training.
        config: its resolved settings; {} where they are not written yet.
        config_hash: of all settings that decide its result.
        summary: content of ``summary.json``; {} while it has not finished.
        sweep: the sweep it is of, if any.
        failure: content of ``failed.json``; {} where it has not failed.
    """

    folder: Path
    status: str
    label: str
    variant: dict[str, str]
    seed: int
    config: dict[str, Any]
    config_hash: str
    summary: dict[str, Any]
    sweep: str | None
    failure: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its folder; where that is a time, with the folder above."""
        name = self.folder.name
        return f"{self.folder.parent.name}/{name}" if _TIME.fullmatch(name) else name

    @property
    def state(self) -> str:
        """The status in words; of a run that a search has ended early ``pruned``: its figures are no final ones."""
        return PRUNED if self.status == FINISHED and "pruned" in self.summary else self.status

    @property
    def metrics(self) -> dict[str, float]:
        """The final figures by tag, such as ``val/loss``; NaN where a figure is not defined. {} while unfinished."""
        return {tag: _number(value) for tag, value in self.summary.get("metrics", {}).items()}

    def rounds(self) -> list[dict[str, Any]]:
        """The validation rounds so far: lines of ``metrics.jsonl``."""
        return read_lines(self.folder / ROUNDS)

    def curves(self) -> pd.DataFrame:
        """Everything logged over the steps, columns step, tag, value; of a run without curves, its validation rounds.

        Where a run was continued in its folder, a step that was taken twice counts as the second time.
        """
        import pandas as pd

        # Where a run was continued in its folder, what was logged before lies in curves_1, curves_2, ...
        files = sorted(self.folder.glob(f"{CURVES}_*/{CURVES_FILE}"), key=lambda f: (len(f.parent.name), f.parent.name))
        files.append(self.folder / CURVES / CURVES_FILE)
        parts = [long for file in files if not (long := _curves_of(file)).empty]
        if not parts:
            rows = [
                (line.get("step"), f"{stage}/{tag}", _number(value))
                for line in self.rounds()
                for stage, kind in (("val", "generated"), ("val_real", "real"))
                for tag, value in line.get(kind, {}).items()
            ]
            parts = [pd.DataFrame(rows, columns=["step", "tag", "value"]).dropna()]
        table = pd.concat(parts, ignore_index=True).drop_duplicates(["step", "tag"], keep="last")
        return table.astype({"step": int}).sort_values(["tag", "step"], ignore_index=True)

    def clips(self) -> pd.DataFrame:
        """Figures of every generated clip of every round, columns step, number, caption, tag, value (NaN: undefined).

        Empty for a run that kept none.
        """
        import pandas as pd

        rows = [
            (line["step"], line["number"], line.get("caption", ""), tag, _number(value))
            for line in read_lines(self.folder / CLIPS)
            for tag, value in line.get("figures", {}).items()
        ]
        table = pd.DataFrame(rows, columns=["step", "number", "caption", "tag", "value"])
        return table.drop_duplicates(["step", "number", "tag"], keep="last", ignore_index=True)

    def samples(self) -> dict[int, Path]:
        """The generated clips of the last round that has any, mp4 files by clip number."""
        of_steps = {}
        for folder in (self.folder / "samples").glob("step_*"):
            if match := _STEP.fullmatch(folder.name):
                of_steps[int(match[1])] = folder
        return next((found for step in sorted(of_steps, reverse=True) if (found := _numbered(of_steps[step]))), {})

    def real_samples(self) -> dict[int, Path]:
        """The real clips of the same prompts, mp4 files by clip number."""
        return _numbered(self.folder / "samples" / "real")

    def attention(self) -> dict[str, Path]:
        """Pictures of the attention in time by direction, each of the last step that has one."""
        found: dict[str, tuple[int, Path]] = {}
        for file in (self.folder / "attention").glob("step_*.png"):
            if match := _ATTENTION.fullmatch(file.name):
                step, direction = int(match[1]), match[2]
                found[direction] = max(found.get(direction, (-1, file)), (step, file))
        return {direction: file for direction, (_, file) in sorted(found.items())}


def load_run(folder: str | Path) -> Run:
    """Read a run.

    Raises:
        OviError: when the folder holds none, or a file of it is damaged: it is named.
    """
    folder = Path(folder)
    # Looked at first: a run that ends in between has written its summary by then.
    running = is_alive(folder)
    config = _read_config(folder / CONFIG)
    identity, summary, failure = (_read_json(folder / name) for name in (IDENTITY, SUMMARY, FAILURE))
    if not identity and not config.keys() >= _OF_TRAINING:
        raise OviError(f"{folder}: no run of `ovi train` lies there (it would hold {IDENTITY} or {CONFIG})")
    if not isinstance(summary.get("metrics", {}), dict):
        raise OviError(f"{folder / SUMMARY}: its metrics are no figures by tag. Remove the folder, or train again")
    seed = identity.get("seed", config.get("seed", 0))
    hashed = identity.get("config_hash") or (config_hash(config) if config else "")
    return Run(
        folder=folder,
        status=RUNNING if running else _status(summary, failure),
        label=str(identity.get("label") or _label(folder)),
        variant={str(k): str(v) for k, v in (identity.get("variant") or {}).items()},
        seed=int(seed if seed is not None else 0),
        config=config,
        config_hash=str(hashed),
        summary=summary,
        sweep=identity.get("sweep"),
        failure=failure,
    )


def find_runs(*paths: str | Path) -> tuple[list[Run], list[str]]:
    """All runs in some folders, at any depth, and what could not be read and why, a sentence each.

    Args:
        paths: folders of runs, of sweeps, or of many; a pattern such as ``runs/*/ovi_seed*`` counts as what it matches.

    Raises:
        OviError: for a path that does not exist.
    """
    runs: dict[str, Run] = {}
    problems = []
    for path in paths:
        for root in _matching(Path(path)):
            for folder in _run_folders(root):
                key = os.path.realpath(folder)
                if key in runs:
                    continue
                try:
                    runs[key] = load_run(folder)
                except OviError as error:
                    problems.append(str(error))
    return list(runs.values()), list(dict.fromkeys(problems))


def _matching(path: Path) -> list[Path]:
    if path.exists():
        return [path]
    if any(sign in str(path) for sign in "*?["):
        anchor = Path(path.anchor) if path.anchor else Path()
        found = sorted(anchor.glob(str(path.relative_to(path.anchor) if path.anchor else path)))
        if found:
            return found
    raise OviError(f"{path}: there is no such folder of runs")


def _run_folders(root: Path) -> Iterator[Path]:
    """Folders that look like runs, from a folder downwards; what lies inside of a run is its own."""
    for place, folders, files in os.walk(root):
        if IDENTITY in files or (CONFIG in files and (SUMMARY in files or "versions.json" in files)):
            folders[:] = [f for f in folders if _holds_runs(Path(place, f))]
            yield Path(place)
        folders[:] = sorted(f for f in folders if not f.startswith("."))


def _holds_runs(folder: Path) -> bool:
    return folder.name not in ("samples", "checkpoints", "tensorboard", "curves", "attention")


def _status(summary: dict[str, Any], failure: dict[str, Any]) -> str:
    if summary:
        return FINISHED
    return FAILED if failure else STOPPED


def _label(folder: Path) -> str:
    folder = Path(os.path.abspath(folder))
    name = folder.parent.name if _TIME.fullmatch(folder.name) else folder.name
    return re.sub(r"_seed\d+$", "", name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise OviError(f"{path}: cannot be read ({error}). Remove the run's folder, or train it again") from error
    if not isinstance(content, dict):
        raise OviError(f"{path}: holds no names and values. Remove the run's folder, or train it again")
    return content


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise OviError(f"{path}: cannot be read ({error}). Remove the run's folder, or train it again") from error
    return content if isinstance(content, dict) else {}


def _curves_of(file: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        wide = pd.read_csv(file, on_bad_lines="skip", low_memory=False)
    except (OSError, pd.errors.EmptyDataError, pd.errors.ParserError):  # only just begun, or being rewritten
        return pd.DataFrame()
    if "step" not in wide:
        return pd.DataFrame()
    long = wide.melt(id_vars="step", var_name="tag", value_name="value")
    long = long[long.tag != "epoch"].assign(
        step=pd.to_numeric(long.step, errors="coerce"), value=pd.to_numeric(long.value, errors="coerce")
    )
    return long.dropna()


def _numbered(folder: Path) -> dict[int, Path]:
    return {int(file.stem): file for file in sorted(folder.glob("*.mp4")) if file.stem.isdigit()}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
