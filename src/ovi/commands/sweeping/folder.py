"""A sweep's folder: what the sweep is, and how far each of its runs has come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ovi.commands.sweeping.variants import Variant
from ovi.data.claims import Claims
from ovi.data.files import whole_file
from ovi.errors import OviError
from ovi.runs.identity import deciding
from ovi.runs.run import FINISHED, IDENTITY, Run, load_run

DEFINITION, LOCK = "sweep.yaml", ".lock"
ABSENT = "absent"
MOST_DIFFERENCES = 8


@dataclass(frozen=True)
class Point:
    """A run of a sweep.

    Args:
        variant: what it is of the sweep.
        seed: of it.
        config_hash: of its configuration.
        config: what of its configuration decides its result.
    """

    variant: Variant
    seed: int
    config_hash: str
    config: Mapping[str, Any] = field(repr=False, default_factory=dict)

    @property
    def run_id(self) -> str:
        """Its folder's name."""
        return f"{self.variant.slug}_seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.variant.label}, seed {self.seed}"


class SweepFolder:
    """The folder of a sweep.

    Args:
        path: of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def of(self, point: Point) -> Path:
        """The folder of a run."""
        return self.path / point.run_id

    def define(self, definition: Mapping[str, Any]) -> None:
        """Write what the sweep is, or see that this is the sweep that lies there: more seeds and variants extend it.

        Args:
            definition: ``base``, which must stay, and ``seeds`` and ``variants``, which may grow.

        Raises:
            OviError: when another sweep lies there, naming what differs.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        claims = Claims(self.path / LOCK)
        try:
            with claims.waiting_for("definition"):
                self._define(dict(definition))
        finally:
            claims.close()

    def _define(self, definition: dict[str, Any]) -> None:
        file = self.path / DEFINITION
        if file.is_file():
            before = _read(file)
            wrong = differences(before.get("base", {}), definition["base"])
            if wrong:
                raise OviError(
                    f"{self.path} holds another sweep: {_some(wrong)}. Choose another name=, or sweep as before"
                )
            now = definition.get("data", {})
            changed = [path for path, checksum in before.get("data", {}).items() if now.get(path, checksum) != checksum]
            if changed:
                raise OviError(
                    f"{self.path}: {', '.join(changed)} was encoded anew since this sweep began, so its runs would not "
                    "compare with new ones. Choose another name="
                )
            definition["seeds"] = sorted({*before.get("seeds", []), *definition["seeds"]})
            definition["variants"] = {**before.get("variants", {}), **definition["variants"]}
        elif any(self.path.glob(f"*/{IDENTITY}")):
            raise OviError(f"{self.path} holds runs of something else than a sweep: choose another name=")
        with whole_file(file) as stream:
            stream.write(OmegaConf.to_yaml(OmegaConf.create(definition)).encode())

    def run(self, point: Point) -> Run | None:
        """What lies there of a run; None where nothing does.

        Raises:
            OviError: when it was made with other settings, naming them.
        """
        folder = self.of(point)
        if not (folder / IDENTITY).is_file():
            return None
        run = load_run(folder)
        if run.config_hash != point.config_hash:
            wrong = differences(deciding(run.config), point.config)
            raise OviError(
                f"{folder} was made with other settings: {_some(wrong) or 'its files were changed'}. Give the variant "
                "another label, remove the folder, or choose another name="
            )
        return run

    def status(self, point: Point) -> str:
        """How far a run has come: a status of ``ovi.runs``, or absent."""
        run = self.run(point)
        return ABSENT if run is None else run.status

    def collect(self, points: list[Point]) -> None:
        """See that every finished run has its row in the table: who finished it may have been killed before."""
        from ovi.runs.table import append_row, read_table, row_of

        try:
            table = read_table(self.path)
            there = set(zip(table.run, table.config_hash))
        except (OviError, AttributeError):
            there = set()
        if not any((self.path / name).is_file() for name in ("results.parquet", "results.csv")):
            there = set()
        # The same settings may be of two runs: a training, and one that measures it as it is.
        for point in points:
            run = self.run(point)
            if run is not None and run.status == FINISHED and (run.name, point.config_hash) not in there:
                append_row(self.path, row_of(run))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings in which two configurations differ, each as ``key: A, now B``."""
    old, new = dict(_flat(before)), dict(_flat(now))
    keys = list(dict.fromkeys([*old, *new]))
    return [
        f"{key}: {old.get(key, 'absent')}, now {new.get(key, 'absent')}" for key in keys if old.get(key) != new.get(key)
    ]


def _some(wrong: list[str]) -> str:
    more = len(wrong) - MOST_DIFFERENCES
    return "; ".join(wrong[:MOST_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")


def _flat(content: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            yield from _flat(value, where)
        else:
            yield where, list(value) if isinstance(value, tuple) else value


def _read(file: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # yaml raises many kinds
        raise OviError(f"{file}: cannot be read ({error}). Remove it: the runs beside it stay") from error
    if not isinstance(content, dict) or not isinstance(content.get("base"), dict):
        raise OviError(f"{file}: is no sweep. Remove it: the runs beside it stay")
    return {str(key): value for key, value in content.items()}
