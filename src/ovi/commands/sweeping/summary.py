"""What a sweep says: at its beginning what is there already, at its end what came out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ovi.commands.kernel import in_notebook
from ovi.errors import OviError
from ovi.runs.run import PRUNED

if TYPE_CHECKING:
    from ovi.commands.sweeping.folder import Point
    from ovi.commands.sweeping.plan import Plan

MOST_FIGURES = 6


class Console:
    """The terminal."""

    def __init__(self) -> None:
        from rich.console import Console as Terminal

        # Labels may hold [brackets]: nothing printed here is markup. A notebook gets plain text: it keeps every update.
        no = False if in_notebook() else None
        width = None if sys.stdout.isatty() else 140
        self.terminal = Terminal(
            markup=False, emoji=False, highlight=False, width=width, force_jupyter=no, force_terminal=no
        )

    def say(self, sentence: str) -> None:
        """Print a sentence."""
        self.terminal.print(sentence, soft_wrap=True)

    @contextmanager
    def status(self, sentence: str) -> Iterator[None]:
        """Show a sentence while something is done."""
        with self.terminal.status(sentence):
            yield


def announce(plan: Plan, points: list[Point], statuses: dict[str, str], console: Console, what: str) -> None:
    """Say how many runs there are, what is done of them, and what failed before and is tried again."""
    counts = Counter(statuses.values())
    known = {
        "finished": "finished",
        "running": "running elsewhere",
        "stopped": "interrupted",
        "failed": "failed before",
    }
    there = [f"{counts[status]} {words}" for status, words in known.items() if counts[status]]
    how = plan.how
    by = f"{how.launcher}, {how.n_jobs} at a time" if how.n_jobs > 1 else how.launcher
    by += f", {how.threads} threads each" if how.threads else ""
    console.say(f"{plan.folder.path}: {len(points)} {what}{''.join(f', {t}' for t in there)}; {by}")
    for point in points:
        if statuses[point.run_id] == "failed":
            run = plan.folder.run(point)
            why = str(run.failure.get("error", "")) if run is not None else ""
            console.say(f"tried again: {point}: failed with: {why.splitlines()[0] if why else 'unknown'}")


def conclude(plan: Plan, points: list[Point], failed: dict[str, str], console: Console) -> Any:
    """Print the table, the failures and where everything is; returns the table of results.

    Raises:
        OviError: when a run failed.
    """
    from ovi.runs.table import read_table

    statuses = {point.run_id: plan.folder.status(point) for point in points}
    table = None
    if any(status == "finished" for status in statuses.values()):
        table = read_table(plan.folder.path)
        table = table[table.run.isin([point.run_id for point in points])]
        console.terminal.print(_shown(plan, table))
        if plan.objective.tag not in table:
            from ovi.runs.table import metric_tags

            console.say(
                f"objective.tag={plan.objective.tag}: no run has such a figure, so variants stand in no order. There "
                f"are: {', '.join(tag for tag in metric_tags(table) if tag.startswith('val/')) or 'none'}"
            )
    counts = Counter(statuses.values())
    left = [f"{n} {status}" for status, n in counts.items() if status not in ("finished", "failed")]
    if left:
        console.say(f"not finished: {', '.join(left)}")
    console.say(f"results: {plan.folder.path / 'results.csv'} and .parquet; runs: {plan.folder.path}/*")
    if failed:
        of_id = {point.run_id: str(point) for point in points}
        lines = [f"  {of_id.get(run, run)}: {why.splitlines()[0]}" for run, why in failed.items()]
        raise OviError(
            f"{len(failed)} of {len(points)} runs failed:\n" + "\n".join(lines) + "\n"
            f"{plan.folder.path}/<run>/failed.json has the tracebacks. The same command tries them again"
            + (", each once, and then draws others" if plan.searches else "")
        )
    return table


def _shown(plan: Plan, table: Any) -> Any:
    from rich.table import Table

    tag, rising = plan.objective.tag, plan.objective.direction == "minimize"
    figures = _figures(table, tag)
    # Figures of runs that were ended early are shown where a variant has no others, and marked.
    whole = table[table.status != PRUNED]
    table = table[(table.status != PRUNED) | ~table.label.isin(whole.label)]
    groups = table.groupby("label", sort=False)
    means = groups[figures].mean()
    if tag in means:
        means = means.sort_values(tag, ascending=rising, na_position="last")
    shown = Table(title=f"{plan.name}: mean and standard deviation over seeds")
    shown.add_column("variant")
    for title in ("seeds", "steps", *(f.removeprefix("val/") for f in figures), "parameters", "train s"):
        shown.add_column(title, justify="right", overflow="fold")
    for label in means.index:
        rows = groups.get_group(label)
        mark = " (pruned)" if (rows.status == PRUNED).any() else ""
        shown.add_row(
            f"{label}{mark}",
            str(len(rows)),
            f"{rows.steps.mean():.0f}",
            *(_spread(rows[f]) for f in figures),
            f"{rows.parameters.mean() / 1e6:.2f} M",
            f"{rows.train_seconds.mean():.0f}" if "train_seconds" in rows else "",
        )
    return shown


def _figures(table: Any, tag: str) -> list[str]:
    """The figures worth a column: the objective, the losses, then what else was measured, counts left out."""
    own = [c for c in table.columns if str(c).startswith("val/") and not _is_count(str(c))]
    first = [c for c in (tag, "val/loss_video", "val/loss_audio") if c in table.columns]
    rest = [c for c in own if c not in first and c != "val/loss" and "/sigma" not in c]
    return list(dict.fromkeys([*first, *rest]))[:MOST_FIGURES]


def _is_count(tag: str) -> bool:
    return tag.endswith(("_n", "_coverage", "num_clips", "num_unusable_clips", "joint_eval_s")) or "loss_s" in tag


def _spread(values: Any) -> str:
    known = values.dropna()
    if not len(known):
        return "undefined"
    spread = f" ±{known.std():.2g}" if len(known) > 1 else ""
    return f"{known.mean():.4g}{spread}"
