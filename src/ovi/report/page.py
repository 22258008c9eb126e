"""The report as one HTML page that needs no server, no network and no other file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from ovi.data.files import whole_file
from ovi.errors import OviError
from ovi.report.attention import maps_of, scale_of
from ovi.report.curves import thinned
from ovi.report.provenance import mixed, provenance, swept, why
from ovi.report.ranking import (
    INTERVALS,
    choose_metrics,
    companion,
    costs_of,
    finished_table,
    rank,
    ranked_tags,
    too_narrow,
)
from ovi.report.samples import EMBED, LINK, MEDIA, NONE, Samples, check_size, data_uri_body, link_to, samples_of
from ovi.runs.intervals import AUTO, METHODS
from ovi.runs.run import FINISHED, PRUNED, STATUSES, Run
from ovi.runs.statistics import direction

_SCRIPTS = ("table.js", "plots.js", "player.js", "page.js")
_DIRECTIONS = {"video_hears_audio": "Video hears audio", "audio_sees_video": "Audio sees video"}


def write_page(
    runs: Sequence[Run],
    out: Path,
    *,
    problems: Sequence[str] = (),
    metrics: Sequence[str] = (),
    title: str | None = None,
    media: str = EMBED,
    max_mb: float = 100.0,
    prompts: int | None = 8,
    curve_points: int = 160,
    intervals: str = AUTO,
) -> Path:
    """Write the report of some runs.

    Args:
        runs: finished or not.
        out: the page.
        problems: what could not be read, a sentence each; the page tells.
        metrics: to rank by, the first being shown first; empty for those with a direction that all runs have.
        title: of the page; None for one made of the sweep's name.
        media: ``embed`` puts clips into the page, ``link`` leaves them where they are, ``none`` shows none.
        max_mb: the most that embedded clips may take.
        prompts: shown; None for all.
        curve_points: of a learning curve.
        intervals: of means over seeds: ``auto``, ``t`` or ``bootstrap``.

    Returns:
        The path written.

    Raises:
        OviError: without any runs, for a figure no run has or none in common, for clips larger than ``max_mb``, or
            values outside these.
    """
    if media not in MEDIA:
        raise OviError(f"media must be one of {', '.join(MEDIA)}, got {media!r}")
    if intervals not in METHODS:
        raise OviError(f"intervals must be one of {', '.join(METHODS)}, got {intervals!r}")
    for name, value in (("prompts", prompts), ("curve_points", curve_points), ("max_mb", max_mb)):
        if value is not None and not value > 0:
            raise OviError(f"{name} must be above 0, got {value:g}")
    if not runs:
        raise OviError("there are no runs to report")
    runs = sorted(runs, key=lambda run: (run.label, run.seed, run.name))
    # What can be refused is, before anything long begins.
    table = finished_table(runs)
    # Without any figure there are still curves and clips to see.
    main = choose_metrics(table, metrics)[0] if len(table) and (metrics or ranked_tags(table)) else None
    samples = Samples() if media == NONE else samples_of(runs, most_prompts=prompts)
    if media == EMBED:
        check_size(samples, max_mb)
    content = {
        **_figures(runs, table, main, intervals),
        "curves": thinned({str(i): run.curves() for i, run in enumerate(runs)}, most=curve_points),
        "prompts": [
            {"number": p.number, "caption": p.caption, "clips": p.clips, "real": p.real} for p in samples.prompts
        ],
    }
    if media == LINK:
        content["links"] = [link_to(file, out) for file in samples.files]
    page = _render(
        title=title or _title(runs),
        runs=[_row(i, run) for i, run in enumerate(runs)],
        statuses={name: sum(run.state == name for run in runs) for name in (*STATUSES, PRUNED)},
        problems=[*problems, *mixed(runs), *too_narrow(table, intervals), *samples.notes],
        swept=swept(runs),
        facts=provenance(runs),
        num_variants=len(content["variants"]),
        main=main,
        maps=_maps(runs),
        has_curves=bool(content["curves"]),
        has_samples=bool(samples.prompts),
        embedded=_bodies(samples.files) if media == EMBED else [],
        content=_json(content),
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OviError(f"out={out}: its folder cannot be made ({error.strerror})") from error
    with whole_file(out) as file:
        for piece in page:
            file.write(piece.encode("utf-8", "replace"))
    return out


def _figures(runs: Sequence[Run], table: Any, main: str | None, intervals: str) -> dict[str, Any]:
    labels = list(dict.fromkeys(run.label for run in runs))
    tags = ranked_tags(table) if len(table) else []
    if main is not None and main not in tags:
        tags.insert(0, main)
    columns = [str(c) for c in table.columns]
    place = {label: i for i, label in enumerate(labels)}
    settings = swept(runs)
    return {
        "main": main,
        "variants": [
            {
                "label": label,
                "values": next({k: run.variant.get(k, "-") for k in settings} for run in runs if run.label == label),
                "costs": costs_of(table, label) if len(table) else {},
            }
            for label in labels
        ],
        "runs": [
            {
                "variant": place[run.label],
                "name": run.name,
                "seed": run.seed,
                "status": run.state,
                "metrics": {tag: run.metrics[tag] for tag in tags if tag in run.metrics},
                "costs": {k: run.summary.get(k) for k in ("steps", "train_seconds", "flops")},
            }
            for run in runs
        ],
        "tags": [
            {
                "tag": tag,
                "direction": direction(tag),
                "coverage": companion(tag, columns, "coverage"),
                "real": _real(table, tag),
                "rows": (rows := [{**row, "variant": place[row["label"]]} for row in rank(table, tag, intervals)]),
                "intervals": sorted({INTERVALS[row["interval"]] for row in rows if row["interval"] in INTERVALS}),
            }
            for tag in tags
        ],
    }


def _real(table: Any, tag: str) -> float | None:
    """The figure of the real clips: for a distance its floor."""
    of_real = tag.replace("val/", "val_real/", 1)
    if of_real == tag or of_real not in table or table[of_real].isna().all():
        return None
    return float(table[of_real].mean())


def _row(number: int, run: Run) -> dict[str, Any]:
    return {
        "number": number,
        "name": run.name,
        "label": run.label,
        "seed": run.seed,
        "status": run.state,
        "why": why(run),
        "steps": run.summary.get("steps"),
        "seconds": run.summary.get("seconds"),
        "config_hash": run.config_hash[:10],
    }


def _maps(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Attention of one run a variant, by direction, on one scale."""
    chosen: dict[str, tuple[int, Run]] = {}
    found: dict[str, Any] = {}
    for number, run in sorted(enumerate(runs), key=lambda pair: (pair[1].state != FINISHED, pair[0])):
        if run.label not in chosen and (maps := maps_of(run)):
            chosen[run.label], found[run.label] = (number, run), maps
    groups = []
    for direction_, heading in _DIRECTIONS.items():
        mine = {label: maps[direction_] for label, maps in found.items() if direction_ in maps}
        if not mine:
            continue
        top = scale_of(list(mine.values()))
        pictures = [
            {
                "label": label,
                "run": chosen[label][0],
                "seed": chosen[label][1].seed,
                "uri": picture.uri(top),
                "diagonal": picture.diagonal,
                "ms": picture.ms,
                "uniform_ms": picture.uniform_ms,
                "step": picture.step,
                "down": [float(picture.down[0]), float(picture.down[-1])],
                "across": [float(picture.across[0]), float(picture.across[-1])],
            }
            for label, picture in sorted(mine.items(), key=lambda item: item[1].ms)
        ]
        attends, attended = direction_.split("_")[0], direction_.split("_")[2]
        groups.append({"heading": heading, "attends": attends, "attended": attended, "top": top, "pictures": pictures})
    return groups


def _title(runs: Sequence[Run]) -> str:
    sweeps = list(dict.fromkeys(run.sweep for run in runs if run.sweep))
    if len(sweeps) == 1:
        return f"Sweep: {sweeps[0]}"
    names = list(dict.fromkeys(run.folder.resolve().parent.name for run in runs))
    return f"Runs: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"


def _bodies(media: Sequence[Path]) -> Iterator[str]:
    for file in media:
        yield data_uri_body(file)


def _render(**values: Any) -> Iterator[str]:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    # Captions and labels are a user's text: everything is escaped but what is marked as ours.
    environment = Environment(
        loader=PackageLoader("ovi.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    ours = files("ovi.report") / "templates"
    style = (ours / "page.css").read_text(encoding="utf-8")
    # In a function of its own, so that no name of ours meets one of the library.
    own = "\n".join((ours / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    scripts = [_inline(get_plotlyjs()), _inline(f'"use strict";\n(() => {{\n{own}\n}})();')]
    template = environment.get_template("page.html.j2")
    return template.generate(
        **values,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        style=Markup(style),
        scripts=[Markup(script) for script in scripts],
        allowed=Markup(" ".join(_allowed(script) for script in scripts)),
    )


def _inline(script: str) -> str:
    """A script that ends where it ends, and whose checksum a browser finds as we do."""
    return script.replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script")


def _allowed(script: str) -> str:
    """What a content security policy calls one script: whatever else is slipped into the page does not run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _json(content: Any) -> Any:
    """Data for a script element: no text in it can end the element."""
    from markupsafe import Markup

    text = json.dumps(_without_nan(content), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value
