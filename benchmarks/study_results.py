"""A study of fusions and alignments as results to keep: its table, what was compared, and the README's rows.

``python benchmarks/study_results.py runs/study benchmarks/results/study_fusion_alignment`` writes STEM.csv and
STEM.json from a folder that ``ovi sweep sweep=fusion_alignment`` has written, and prints a row for every strategy.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from machine import machine, packages
from ovi.commands.compare import compare, to_dict
from ovi.commands.record import git_state
from ovi.data.files import whole_file, write_json
from ovi.runs.intervals import holm, interval_of_mean
from setting import PRESETS

OFFSET, MATCHED = "val/impact_offset_ms", "val/impact_offset_match_rate"
"""The figure chosen beforehand, and the one that says of how many impacts there is a sound at all."""
SHARED, UNALIGNED, ALONE = "seconds", "none", "none"
_LEFT_OUT = ("attention_blocks/", "val_sigma")


def narrow(results: Path) -> pd.DataFrame:
    """The sweep's table without figures by block and by noise level, in the order of labels and seeds."""
    # Names such as "null" are no missing values.
    table = pd.read_csv(results, keep_default_na=False, na_values=[""])
    kept = [column for column in table.columns if not column.startswith(_LEFT_OUT)]
    return table[kept].sort_values(["label", "seed"], ignore_index=True)


def strategies(table: pd.DataFrame) -> list[str]:
    """Fusions trained with and without a shared clock, best first by the offset with one."""
    there: dict[str, set[str]] = {}
    for label in table["label"]:
        fusion, _, alignment = label.partition("/")
        there.setdefault(fusion, set()).add(alignment)
    both = [fusion for fusion, alignments in there.items() if {SHARED, UNALIGNED} <= alignments]
    return sorted(both, key=lambda fusion: figures(table, fusion, SHARED, OFFSET).mean())


def figures(table: pd.DataFrame, fusion: str, alignment: str, tag: str) -> pd.Series:
    """A figure of every training of one variant."""
    return table.loc[table["label"] == f"{fusion}/{alignment}", tag]


def comparisons(folder: Path, fusions: list[str]) -> dict[str, Any]:
    """By question and strategy: is the offset another with a shared clock, and another than without an exchange?

    Beside each p value stands the one corrected for the number of strategies asked about.
    """
    asked = {
        "shared clock against unaligned": {f: (f"{f}/{SHARED}", f"{f}/{UNALIGNED}") for f in fusions},
        "against no exchange, shared clock": {f: (f"{f}/{SHARED}", f"{ALONE}/{SHARED}") for f in fusions if f != ALONE},
    }
    found: dict[str, Any] = {}
    for question, pairs in asked.items():
        results = {f: to_dict(compare(f"{folder}:{a}", f"{folder}:{b}", tags=[OFFSET])) for f, (a, b) in pairs.items()}
        corrected = holm([result["figures"][0]["p"] for result in results.values()])
        found[question] = {f: {**results[f], "p_of_all": p} for f, p in zip(results, corrected)}
    return found


def row(table: pd.DataFrame, fusion: str) -> str:
    """A strategy's row of the README: with a shared clock, then without one."""
    cells = [f"`{fusion}`"]
    for alignment in (SHARED, UNALIGNED):
        offset = figures(table, fusion, alignment, OFFSET)
        interval = interval_of_mean(offset)
        cells.append(f"{offset.mean():.0f} ± {(interval.high - interval.low) / 2:.0f} ms")
    cells.append(" / ".join(f"{figures(table, fusion, a, MATCHED).mean():.0%}" for a in (SHARED, UNALIGNED)))
    cells += [
        " / ".join(f"{figures(table, fusion, a, f'val/loss_{kind}').mean():.3f}" for a in (SHARED, UNALIGNED))
        for kind in ("video", "audio")
    ]
    cells.append(f"{figures(table, fusion, SHARED, 'flops').mean() / 1e12:.1f} TFLOP")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Write both files and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the sweep")
    parser.add_argument("stem", type=Path, help="where STEM.csv and STEM.json go")
    parser.add_argument("--command", action="append", default=[], help="that made the folder; may be given again")
    arguments = parser.parse_args()
    table = narrow(arguments.folder / "results.csv")
    fusions = strategies(table)
    with whole_file(arguments.stem.with_suffix(".csv")) as file:
        file.write(table.to_csv(index=False).encode())
    write_json(
        arguments.stem.with_suffix(".json"),
        {
            "commands": arguments.command,
            "machine": machine(PRESETS["smoke"]),
            "packages": packages(),
            "git": git_state(),
            "chosen beforehand": OFFSET,
            "comparisons": comparisons(arguments.folder, fusions),
        },
    )
    for fusion in fusions:
        Console(markup=False, soft_wrap=True).print(row(table, fusion))


if __name__ == "__main__":
    main()
