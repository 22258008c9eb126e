"""Attention over time of a run as small pictures, from the numbers that training keeps."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ovi.runs.jsonl import read_lines
from ovi.runs.run import Run

FOLDER, RECORD = "attention", "maps.jsonl"
HEIGHT, WIDTH = 120, 180


@dataclass(frozen=True)
class MapPicture:
    """The mean map of a run in one direction.

    Attributes:
        direction: ``video_hears_audio`` or ``audio_sees_video``.
        step: of the drawing.
        ms: expected distance in time between what attends and what is attended.
        uniform_ms: the same of even attention.
        times_even: [Tq, Tk], 1 where attention is even, NaN where nothing was attended.
        down: edges of the rows in seconds, [Tq + 1].
        across: edges of the columns in seconds, [Tk + 1].
    """

    direction: str
    step: int
    ms: float
    uniform_ms: float
    times_even: np.ndarray
    down: np.ndarray
    across: np.ndarray

    def uri(self, top: float) -> str:
        """The map as a picture of equal seconds a pixel, white at ``top`` times even attention."""
        from matplotlib import colormaps
        from PIL import Image

        rows, columns = (
            np.searchsorted(edges[1:-1], np.linspace(edges[0], edges[-1], count, endpoint=False), side="right")
            for edges, count in ((self.down, HEIGHT), (self.across, WIDTH))
        )
        picture = self.times_even[np.ix_(rows, columns)]
        coloured = (colormaps["magma"](np.nan_to_num(picture) / top)[..., :3] * 255).astype(np.uint8)
        coloured[np.isnan(picture)] = 150
        encoded = io.BytesIO()
        Image.fromarray(coloured).quantize(64).save(encoded, format="png", optimize=True)
        return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()

    @property
    def diagonal(self) -> list[float]:
        """Where the instant that attends is the instant attended: x1, y1, x2, y2 in shares of the picture."""
        start, end = max(self.across[0], self.down[0]), min(self.across[-1], self.down[-1])
        ends = [
            [float((t - edges[0]) / (edges[-1] - edges[0])) for edges in (self.across, self.down)] for t in (start, end)
        ]
        return [round(x, 4) for x in (*ends[0], *ends[1])]


def maps_of(run: Run) -> dict[str, MapPicture]:
    """The last drawing of each direction; none for a run that kept no numbers."""
    last = {record["direction"]: record for record in read_lines(run.folder / FOLDER / RECORD) if _whole(record)}
    return {direction: _picture(record) for direction, record in last.items()}


def scale_of(maps: Sequence[MapPicture]) -> float:
    """The top of one scale for several maps, in times even: a flat map must not look like a sharp one."""
    tops = [float(np.nanquantile(m.times_even, 0.995)) for m in maps if not np.isnan(m.times_even).all()]
    return max(2.0, *tops) if tops else 2.0


def _whole(record: dict[str, Any]) -> bool:
    return record.keys() >= {"direction", "step", "ms", "uniform_ms", "query_times", "key_times", "shares", "real"}


def _picture(record: dict[str, Any]) -> MapPicture:
    keys, real = np.array(record["key_times"], float), np.array(record["real"], bool)
    shares = np.array([np.full(len(keys), np.nan) if row is None else row for row in record["shares"]], float)
    return MapPicture(
        record["direction"],
        int(record["step"]),
        float(record["ms"]),
        float(record["uniform_ms"]),
        shares * int(real.sum()),
        _edges(np.array(record["query_times"], float)),
        _edges(keys),
    )


def _edges(times: np.ndarray) -> np.ndarray:
    middles = [(a + b) / 2 for a, b in pairwise(times)]
    half = (times[-1] - times[-2]) / 2 if len(times) > 1 else max(float(times[0]), 0.01)
    return np.array([max(0.0, times[0] - half), *middles, times[-1] + half])
