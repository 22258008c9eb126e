"""Many runs as one table, a row each; several processes may add rows to one at the same time."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovi.data.claims import Claims
from ovi.data.files import whole_file
from ovi.errors import OviError
from ovi.runs.run import Run, find_runs

if TYPE_CHECKING:
    import pandas as pd

PARQUET, CSV, LOCK = "results.parquet", "results.csv", ".results.lock"

COSTS = ("steps", "seconds", "train_seconds", "flops", "flops_per_step", "parameters", "peak_memory_gb")
VARIANT = "variant."
_WORDS = ("run", "label", "status", "config_hash")
_of_this_process = threading.Lock()  # the file's lock keeps processes apart, not threads


def row_of(run: Run) -> dict[str, Any]:
    """A run as one row: run, label, variant.<key> ..., seed, status, config_hash, its costs, then its final figures by
    tag. What it does not say is not there."""
    row: dict[str, Any] = {"run": run.name, "label": run.label}
    row |= {f"{VARIANT}{key}": value for key, value in run.variant.items()}
    row |= {"seed": run.seed, "status": run.state, "config_hash": run.config_hash}
    row |= {name: run.summary[name] for name in COSTS if run.summary.get(name) is not None}
    return row | run.metrics


def table_of(runs: Iterable[Run]) -> pd.DataFrame:
    """The table of some runs, rows as ``row_of`` gives them; what one does not say is NaN."""
    return _frame([row_of(run) for run in runs])


def metric_tags(table: pd.DataFrame) -> list[str]:
    """Columns of a table that hold figures."""
    known = {*_WORDS, "seed", *COSTS}
    return [str(c) for c in table.columns if c not in known and not str(c).startswith(VARIANT)]


def append_row(folder: str | Path, row: Mapping[str, Any]) -> None:
    """Add a row to ``results.parquet`` and ``results.csv`` of a folder; one of the same ``run`` is replaced.

    Two runs may have the same settings: a training, and one that measures it, or two trials of a search.

    Both files are whole at any moment, and no row is lost when several processes add theirs at once.

    Raises:
        OviError: when the table there is damaged, or cannot be written.
    """
    import pandas as pd

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _of_this_process:
        claims = Claims(folder / LOCK)
        try:
            with claims.waiting_for("results"):
                table = _read_files(folder)
                rows = [] if table is None else table.to_dict("records")
                rows = [r for r in rows if r.get("run") != row["run"]]
                table = _frame([*rows, dict(row)])
                with whole_file(folder / PARQUET) as file:
                    table.to_parquet(file, index=False)
                with whole_file(folder / CSV) as file:
                    file.write(table.to_csv(index=False).encode())
        except (ValueError, TypeError, pd.errors.ParserError) as error:
            raise OviError(f"{folder / PARQUET}: the row cannot be added ({error})") from error
        finally:
            claims.close()


def read_table(path: str | Path) -> pd.DataFrame:
    """A table of runs: a .parquet or .csv file, a folder that has one, or made of the run folders in it.

    Raises:
        OviError: when there is neither, or the file is damaged.
    """
    path = Path(path)
    if path.is_file():
        return _frame(_read(path).to_dict("records"))
    if path.is_dir() and (table := _read_files(path)) is not None:
        return table
    runs, problems = find_runs(path)
    if not runs:
        raise OviError(f"{path}: no runs there{'; '.join(['', *problems[:3]])}")
    return table_of(runs)


def _read_files(folder: Path) -> pd.DataFrame | None:
    for name in (PARQUET, CSV):
        if (folder / name).is_file():
            return _frame(_read(folder / name).to_dict("records"))
    return None


def _read(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    except Exception as error:  # pandas and pyarrow raise many kinds for damaged files
        raise OviError(
            f"{path}: is no table of runs ({type(error).__name__}: {error}). Remove it: it can be made again from the "
            "run folders"
        ) from error


def _read_csv(path: Path) -> pd.DataFrame:
    """Words stay words, whatever they look like: a config hash may be all digits, a setting ``null`` or ``NA``."""
    import pandas as pd

    words = {c: "str" for c in pd.read_csv(path, nrows=0).columns if c in _WORDS or c.startswith(VARIANT)}
    return pd.read_csv(path, dtype=words, keep_default_na=False, na_values=[""])


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a table: names first, then what sets variants apart, costs and figures; numbers as numbers."""
    import pandas as pd

    keys = list(dict.fromkeys(key for row in rows for key in row))
    variants = [key for key in keys if key.startswith(VARIANT)]
    first = ["run", "label", *variants, "seed", "status", "config_hash", *COSTS]
    figures = sorted(key for key in keys if key not in first)
    table = pd.DataFrame(rows, columns=[c for c in (*first, *figures) if c in keys])
    for column in table.columns:
        if column in _WORDS or column in variants:
            words = [None if _missing(value) else str(value) for value in table[column]]
            table[column] = pd.Series(words, index=table.index, dtype="str")
        else:
            table[column] = pd.to_numeric(table[column], errors="coerce")
    return table


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
