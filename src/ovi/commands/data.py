"""``ovi data``: look at a set of latent shards, whether it is whole and what was left out of it."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovi.commands.hints import did_you_mean
from ovi.errors import OviError

if TYPE_CHECKING:
    from ovi.data.reading.check import Report

USAGE = """ovi data check FOLDER [KEY=VALUE ...]     is a set of latent shards what its index says? exits 1 if not

  FOLDER            as `ovi encode` wrote it, or its URL
  show=20           findings that are printed; all are counted
  out=FILE.json     everything found, for machines
  strict=true       stop at the first shard with damage
  cache_dir=FOLDER  where shards of a URL are copied to (.cache/ovi/shards in the home folder, as in training)
  cache_gb=100      the most that these copies take

ovi data report FOLDER [out=FILE]         what the stages of `ovi encode` measured, kept and rejected, as histograms

  out=FOLDER/report.html   .html, one page with its pictures inside, or .png
"""

TASKS = {"check": "ovi.commands.data:check", "report": "ovi.commands.data_report:report"}
"""What `ovi data` can do: the function that takes the remaining words."""


def main(argv: list[str]) -> None:
    """Run ``ovi data TASK ...``.

    Raises:
        OviError: for an unknown task, or words that it does not take.
        SystemExit: with code 1 when a check found damage.
    """
    if not argv or set(argv) & {"-h", "--help", "help"}:
        print(USAGE, end="")
        return
    task, *words = argv
    if task not in TASKS:
        raise OviError(f"ovi data has no {task!r}.{did_you_mean(task, TASKS)} It has: {', '.join(TASKS)}")
    module, function = TASKS[task].split(":")
    getattr(importlib.import_module(module), function)(words)


def check(words: list[str]) -> None:
    """Check a set, print what was found, and exit 1 if anything was."""
    readers: dict[str, Callable[[str], Any]] = {
        "show": int,
        "out": Path,
        "strict": _flag,
        "cache_dir": str,
        "cache_gb": float,
    }
    folders, settings = parse("data check", words, readers)
    if len(folders) != 1:
        raise OviError(f"ovi data check takes one folder, got {', '.join(folders) or 'none'}\n{USAGE}")
    report = run_check(folders[0], **settings)
    if report.all_findings:
        raise SystemExit(1)


def parse(command: str, words: list[str], readers: dict[str, Callable[[str], Any]]) -> tuple[list[str], dict[str, Any]]:
    """Words without ``=``, and ``KEY=VALUE`` words by key.

    Raises:
        OviError: for an unknown key or a value that it does not take.
    """
    plain, settings = [], {}
    for word in words:
        key, equals, value = word.lstrip("-").partition("=")
        if not equals or ("/" in key and key not in readers):
            plain.append(word)
            continue
        if key not in readers:
            raise OviError(f"ovi {command} does not take {word!r}.{did_you_mean(key, readers)}\n{USAGE}")
        try:
            settings[key] = readers[key](value)
        except ValueError:
            raise OviError(f"ovi {command}: {key} cannot be {value!r}\n{USAGE}") from None
    return plain, settings


def run_check(
    folder: str,
    *,
    show: int = 20,
    out: Path | None = None,
    strict: bool = False,
    cache_dir: str | None = None,
    cache_gb: float = 100.0,
) -> Report:
    """Check a set with a progress bar, and print a table.

    Raises:
        OviError: when the folder has no readable index.
    """
    from rich.console import Console
    from rich.progress import Progress

    from ovi.data.files import write_json
    from ovi.data.index import ShardIndex
    from ovi.data.reading.check import check_set
    from ovi.data.reading.remote import ShardCache, default_cache

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    index = ShardIndex.load(folder, verify=False)
    cache = ShardCache(cache_dir or default_cache(), int(cache_gb * 1e9))
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("check", total=None)
        report = check_set(
            index,
            cache,
            strict=strict,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    _print(console, report, show)
    if out is not None:
        write_json(out, report.to_dict())
    return report


def _print(console: Any, report: Report, show: int) -> None:
    from rich.table import Table

    table = Table(title=report.folder, title_justify="left", show_edge=False)
    for name in ("split", "shards", "samples", "MB", "findings"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split in dict.fromkeys(shard.split for shard in report.shards):
        mine = [shard for shard in report.shards if shard.split == split]
        size = sum(shard.num_bytes for shard in mine) / 1e6
        counts = len(mine), sum(shard.num_samples for shard in mine), sum(len(shard.findings) for shard in mine)
        table.add_row(split, f"{counts[0]}", f"{counts[1]}", f"{size:,.1f}", f"{counts[2]}")
    console.print(table)
    findings = report.all_findings
    for finding in findings[:show]:
        console.print(f"{finding.kind:>9}  {finding.where}: {finding.message}", markup=False, soft_wrap=True)
    if len(findings) > show:
        console.print(f"... and {len(findings) - show} more; show=N prints them, out=FILE.json keeps them")
    counted = Counter(finding.kind for finding in findings)
    said = ", ".join(f"{count} {kind}" for kind, count in counted.most_common())
    console.print(f"damaged: {said}" if findings else "whole: every sample is what the index says")


def _flag(value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ValueError(value)
    return value.lower() == "true"
