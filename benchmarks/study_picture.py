"""The picture of a sweep's results: every training a dot, a bar for the mean, one panel a figure.

``python benchmarks/study_picture.py benchmarks/results/study_fusion_alignment.csv docs/study.png``
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PANELS = {
    "val/impact_offset_ms": "mean |offset| of impacts (ms)",
    "val/impact_offset_match_rate": "impacts that have a sound",
    "val/loss_video": "video loss",
    "val/loss_audio": "audio loss",
}
FUSION, ALIGNMENT = "variant.model/fusion", "variant.model/rope_alignment"
COLOURS = {"seconds": "#1b6ca8", "none": "#d1495b"}
WORDS = {"seconds": "shared clock", "none": "unaligned"}


def picture(table: pd.DataFrame) -> Figure:
    """Panels side by side; strategies down, alignments by colour.

    Args:
        table: as ``ovi sweep sweep=fusion_alignment`` writes ``results.csv``.
    """
    fusions = list(dict.fromkeys(table[FUSION].fillna("none")))
    figure = Figure(figsize=(11, 0.62 * len(fusions) + 1.3), dpi=110, layout="constrained")
    for axis, (tag, title) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items()):
        for row, fusion in enumerate(fusions):
            for side, alignment in zip((-0.16, 0.16), COLOURS):
                chosen = (table[FUSION].fillna("none") == fusion) & (table[ALIGNMENT].fillna("none") == alignment)
                values = table[chosen][tag].dropna()
                axis.plot(values, [row + side] * len(values), "o", color=COLOURS[alignment], alpha=0.55, markersize=5)
                axis.plot([values.mean()] * 2, [row + side - 0.13, row + side + 0.13], color=COLOURS[alignment], lw=2.5)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
        for edge in ("top", "right", "left"):
            axis.spines[edge].set_visible(False)
    first = figure.axes[0]
    first.set_yticks(range(len(fusions)), fusions)
    first.invert_yaxis()
    first.set_xlim(left=0)
    handles = [first.plot([], [], "o", color=colour, label=WORDS[name])[0] for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def main() -> None:
    """Draw the file named first into the one named second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="results.csv of a sweep")
    parser.add_argument("picture", type=Path, help="png to write")
    arguments = parser.parse_args()
    # Names such as "null" are no missing values.
    figure = picture(pd.read_csv(arguments.results, keep_default_na=False, na_values=[""]))
    FigureCanvasAgg(figure)
    figure.savefig(arguments.picture)


if __name__ == "__main__":
    main()
