"""One figure of two variants, difference by difference: the same seed, the same prompt, the same noise."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ovi.errors import OviError
from ovi.runs.comparable import pairs_by_seed, same_length
from ovi.runs.intervals import NOTHING, Interval, crossed_interval, interval_of_mean, sign_flip_p
from ovi.runs.run import Run

if TYPE_CHECKING:
    import pandas as pd

STAGE = "val/"


@dataclass(frozen=True)
class Paired:
    """The difference a - b of one figure, and how far it can be trusted.

    Clips of one training are not independent of it: what holds for the clips of two trainings need not hold for the
    next two. Both are told apart.

    Attributes:
        tag: of the figure.
        better: ``lower`` or ``higher``, or None.
        names: of both sides.
        mean_a, mean_b: means over the pairs.
        difference: mean of a - b over the pairs.
        over_trainings: its interval for other seeds, and other prompts where there are figures by clip; the ends are
            NaN with one seed.
        over_clips: its interval for other prompts, given these very trainings; NaN without figures by clip.
        num_seeds: trainings on each side.
        num_pairs: clips by seeds that rest on both; 0 without figures by clip.
        num_undefined: pairs left out because the figure is not defined for a's clip, for b's (of either side).
        p_flips: chance of such a difference, were the sign of each seed's arbitrary: assumes nothing else, and cannot
            be below 2 / 2^seeds.
        p: of ``over_trainings``, with one seed of ``over_clips``; as corrected for several figures, if it was.
        level: of confidence.
    """

    tag: str
    better: str | None
    names: tuple[str, str]
    mean_a: float
    mean_b: float
    difference: float
    over_trainings: Interval
    over_clips: Interval
    num_seeds: int
    num_pairs: int
    num_undefined: tuple[int, int]
    p_flips: float
    p: float
    level: float = 0.95

    @property
    def interval(self) -> Interval:
        """The one that decides: over trainings where there are several, else over clips."""
        return self.over_trainings if self.num_seeds > 1 else self.over_clips

    @property
    def real(self) -> bool:
        """Whether the difference is real at the level, for what ``scope`` says."""
        # The two may disagree by a hair where the interval is a bootstrap's and p comes of flipped signs.
        return self.p < 1 - self.level and not self.interval.low <= 0 <= self.interval.high

    @property
    def scope(self) -> str:
        """What the decision holds for."""
        if self.num_seeds == 1:
            return "over clips, given these two trainings"
        return f"over trainings ({self.num_seeds} seeds){' and clips' if self.num_pairs else ''}"

    @property
    def verdict(self) -> str:
        """The conclusion in a sentence."""
        a, percent = self.names[0], f"{100 * self.level:g} %"
        if math.isnan(self.difference):
            return "no difference can be told: no pair has the figure on both sides"
        if math.isnan(self.p):
            alone = self.num_seeds == 1 and not self.num_pairs
            why = "one training a side, no figures by clip" if alone else "all pairs differ by the same"
            return f"no difference can be told: {why} ({self.difference:+.4g})"
        low, high = self.interval.low, self.interval.high
        size, ends = abs(self.difference), sorted((abs(low), abs(high)))
        if not self.real:
            hint = ""
            if self.num_seeds > 1 and self.over_clips.p < 1 - self.level:
                hint = "; between these very trainings there is one, more seeds may show whether it lasts"
            return f"no difference can be told {self.scope}: {self.difference:+.4g} [{low:.4g}, {high:.4g}]{hint}"
        way = "lower" if self.difference < 0 else "higher"
        judged = "" if self.better is None else f" ({'better' if way == self.better else 'worse'})"
        return (
            f"{a} is {way}{judged} by {size:.4g} [{ends[0]:.4g}, {ends[1]:.4g}]; "
            f"real at the {percent} level {self.scope}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON: NaN becomes None."""
        ways = {name: getattr(self, name) for name in ("over_trainings", "over_clips")}
        plain = {
            "tag": self.tag,
            "better": self.better,
            "a": self.names[0],
            "b": self.names[1],
            "mean_a": self.mean_a,
            "mean_b": self.mean_b,
            "difference": self.difference,
            **{name: {**vars(way)} for name, way in ways.items()},
            "seeds": self.num_seeds,
            "pairs": self.num_pairs,
            "undefined_a": self.num_undefined[0],
            "undefined_b": self.num_undefined[1],
            "p_flips": self.p_flips,
            "p": self.p,
            "level": self.level,
            "real": self.real,
            "scope": self.scope,
            "verdict": self.verdict,
        }
        return _without_nan(plain)


def paired(
    a: Sequence[Run],
    b: Sequence[Run],
    tag: str,
    *,
    names: tuple[str, str] = ("a", "b"),
    level: float = 0.95,
    allow: Collection[str] = (),
) -> Paired:
    """Compare one figure of two variants over the same seeds and, where they are kept, the same clips.

    With several seeds the interval says what other trainings would give (and other prompts, where there are figures by
    clip): ``intervals.crossed_interval``. With one seed it is over clips alone, and holds for these two trainings only.

    Args:
        a, b: finished runs of either side, one a seed; seeds on one side only are left out.
        tag: of a final figure, such as ``val/av_offset_xcorr_ms``; ``val/`` may be left away.
        names: of the sides, for words.
        level: of confidence, 0..1.
        allow: what may differ between the runs: ``data``, ``generator``, ``steps``.

    Raises:
        OviError: for runs that cannot be compared (see ``comparable.pairs_by_seed``), clips of other prompts, or a
            figure that none of them has.
    """
    from ovi.metrics.directions import direction

    if not 0 < level < 1:
        raise OviError(f"level is a confidence between 0 and 1, got {level}")
    pairs = pairs_by_seed(a, b, names=names, allow=allow)
    by_clip = [(_last_round(x, tag), _last_round(y, tag)) for x, y in pairs]
    own, full = tag.removeprefix(STAGE), tag if "/" in tag else STAGE + tag
    if all(len(x) and len(y) for x, y in by_clip):
        values, undefined = _clip_differences(pairs, by_clip, allow)
    else:
        values, undefined = np.empty((2, len(pairs), 0)), (0, 0)
    if values.size:
        known = np.isfinite(values).all(0)
        values = np.where(known, values, np.nan)
        sides = [_mean_of_means(side) for side in values]
        differences = values[0] - values[1]
        trainings = _row_means(differences)
        over_trainings = crossed_interval(differences, level=level)
        over_clips = interval_of_mean(_row_means(differences.T), level=level)
        num_pairs = int(known.sum())
    else:
        both = np.array([[run.metrics.get(full, run.metrics.get(own, math.nan)) for run in pair] for pair in pairs])
        if not np.isfinite(both).any(0).all():
            lacking = names[int(np.isfinite(both).any(0)[0])]
            raise OviError(f"metric={tag}: no run of {lacking} has this figure; its runs have {_tags_of(a, b)}")
        both[~np.isfinite(both).all(1)] = np.nan
        sides = [float(np.nanmean(side)) if np.isfinite(side).any() else math.nan for side in both.T]
        trainings = both[:, 0] - both[:, 1]
        over_trainings, over_clips, num_pairs = interval_of_mean(trainings, level=level), NOTHING, 0
    num_seeds = int(np.isfinite(trainings).sum())
    return Paired(
        tag=full,
        better=direction(full),
        names=names,
        mean_a=sides[0],
        mean_b=sides[1],
        difference=float(np.nanmean(trainings)) if num_seeds else math.nan,
        over_trainings=over_trainings if num_seeds > 1 else NOTHING,
        over_clips=over_clips,
        num_seeds=num_seeds,
        num_pairs=num_pairs,
        num_undefined=undefined,
        p_flips=sign_flip_p(trainings),
        p=over_trainings.p if num_seeds > 1 else over_clips.p,
        level=level,
    )


def shared_tags(a: Sequence[Run], b: Sequence[Run]) -> list[str]:
    """Final figures with a better way that every run of both sides has, those of training left out."""
    from ovi.metrics.directions import direction

    runs = [*a, *b]
    if not runs:
        return []
    common = set.intersection(*({tag for tag, v in run.metrics.items() if math.isfinite(v)} for run in runs))
    return sorted(tag for tag in common if tag.startswith(STAGE) and direction(tag) is not None)


def _last_round(run: Run, tag: str) -> pd.DataFrame:
    clips = run.clips()
    clips = clips[clips.tag.isin((tag, tag.removeprefix(STAGE)))]
    return clips[clips.step == clips.step.max()].set_index("number") if len(clips) else clips


def _clip_differences(
    pairs: Sequence[tuple[Run, Run]], by_clip: Sequence[tuple[pd.DataFrame, pd.DataFrame]], allow: Collection[str]
) -> tuple[np.ndarray, tuple[int, int]]:
    """Values [2, seeds, clips] of the clips that all runs made, NaN where undefined."""
    first_run, first = pairs[0][0], by_clip[0][0]
    for pair, tables in zip(pairs, by_clip):
        for run, table in zip(pair, tables):
            _check_prompts(first_run, first, run, table, allow)
    numbers = sorted(set.intersection(*(set(table.index) for tables in by_clip for table in tables)))
    values = np.array([[tables[side].loc[numbers, "value"].to_numpy(float) for tables in by_clip] for side in (0, 1)])
    undefined = (~np.isfinite(values)).sum((1, 2))
    return values, (int(undefined[0]), int(undefined[1]))


def _check_prompts(first_run: Run, first: pd.DataFrame, run: Run, table: pd.DataFrame, allow: Collection[str]) -> None:
    steps = [int(t.step.iloc[0]) for t in (first, table)]
    last = [steps[0] == first_run.summary.get("steps"), steps[1] == run.summary.get("steps")]
    # Runs of one budget end at other steps; the clips of their ends are pairs all the same.
    alike = steps[0] == steps[1] or (all(last) and same_length(first_run, run))
    if not alike and "steps" not in allow:
        raise OviError(
            f"the last clips of {first_run.folder} are of step {steps[0]}, those of {run.folder} of step {steps[1]}. "
            "allow=steps compares them all the same"
        )
    shared = first.index.intersection(table.index)
    if not len(shared):
        raise OviError(f"{first_run.folder} and {run.folder} have no clip number in common")
    other = first.loc[shared, "caption"] != table.loc[shared, "caption"]
    if other.any():
        number = other.idxmax()
        raise OviError(
            f"{first_run.folder} and {run.folder} were given other prompts: clip {number} is "
            f"{first.loc[number, 'caption']!r} in one and {table.loc[number, 'caption']!r} in the other. Only clips of "
            "the same prompts are pairs"
        )


def _row_means(values: np.ndarray) -> np.ndarray:
    """Means over the last axis without NaN; NaN where there is nothing else."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0).sum(-1) / known.sum(-1))


def _mean_of_means(values: np.ndarray) -> float:
    rows = _row_means(values)
    rows = rows[np.isfinite(rows)]
    return float(rows.mean()) if len(rows) else math.nan


def _tags_of(a: Sequence[Run], b: Sequence[Run]) -> str:
    return ", ".join(sorted({tag for run in (*a, *b) for tag in run.metrics if tag.startswith(STAGE)})) or "none"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
