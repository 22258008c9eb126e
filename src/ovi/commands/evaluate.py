"""``ovi evaluate``: clips of any model, or of a checkpoint, against real ones; a json and a table."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from ovi.commands.clip_sources import (
    Clips,
    Counterpart,
    FileClips,
    GeneratedClips,
    Reading,
    RealClips,
    ShardClips,
    files_in,
    names_in,
)
from ovi.commands.hydra_app import run
from ovi.commands.pairing import paired
from ovi.commands.processes import device_of, gathered, joined, shared
from ovi.commands.prompt_table import FILE_COLUMNS, Prompt, captions_for, read_prompt_table
from ovi.data.media import MediaError, probe
from ovi.errors import OviError

RESULT, TABLE = "evaluation.json", "evaluation.md"


def main(argv: list[str]) -> None:
    """Compose ``conf/evaluate.yaml`` and measure."""
    run("evaluate", evaluate, argv)


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Measure as configured; several processes (torchrun) share the clips.

    Returns:
        What ``evaluation.json`` holds.

    Raises:
        OviError: for clips, prompts or metrics that cannot be had or do not fit.
    """
    from rich.console import Console

    from ovi.metrics.suite import MetricSuite

    began = time.perf_counter()
    device = device_of(config.device)
    with joined(device) as place:
        # Paths and errors may hold [brackets]: nothing printed here is markup.
        console = Console(quiet=place[0] != 0, markup=False, emoji=False, highlight=False)

        def warn(sentence: str) -> None:
            console.print(sentence, style="yellow", soft_wrap=True)

        generated, real, reading = _sides(config, device, warn)
        count, num_real = _count(generated, config.num_clips), _count(real, config.num_real) if real is not None else 0
        cache = Path(config.cache_dir).expanduser() if config.cache_dir and real is not None else None
        suite = MetricSuite(
            instantiate(config.get("metrics") or {}, _convert_="all"),
            fps=reading.fps,
            sample_rate=reading.sample_rate,
            warn=warn,
            cache=cache,
            real_set=shared(lambda: real.describe(num_real)) if real is not None and cache is not None else None,
            num_real=num_real if real is not None else None,
            by_clip=True,
        )
        if not suite.names:
            raise OviError("no metric is on: choose some, for instance +metric@metrics.fvd=fvd (`ovi list metric`)")
        needs = suite.needing_real
        if real is None and needs:
            raise OviError(
                f"{', '.join(needs)} hold clips against real ones: set real=FOLDER, or switch them off "
                f"({' '.join(f'metrics.{name}=null' for name in needs)})"
            )
        if device.type == "mps":
            warn("metrics are measured on the CPU: MPS has no float64")
        suite.to("cpu" if device.type == "mps" else device)
        if suite.wants_counterpart:
            generated.counterpart = _counterpart(config, generated, real, warn)
        if real is not None and suite.wants_real:
            _feed(suite, real, num_real, place, console, "real")
        _feed(suite, generated, count, place, console, "generated")
        if isinstance(generated, GeneratedClips) and generated.keep and place[0] == 0:
            generated.write_list(count)
        figures = suite.figures()
        left_out = gathered(generated.rejected)
        if not figures.num_generated:
            why = f"; the first: {left_out[0]['error']}" if left_out else ""
            raise OviError(f"none of the {len(generated)} generated clips could be measured{why}")
        left_out += gathered(real.rejected if real is not None else [])
        result = {
            **asdict(figures),
            "rejected": left_out,
            "reading": asdict(reading),
            "metrics": suite.identities,
            "generated_from": str(config.generated or config.checkpoint),
            "real_from": None if config.real is None else str(config.real),
            "seconds": time.perf_counter() - began,
            "command": " ".join(["ovi", *sys.argv[1:]]),
        }
        if place[0] == 0:
            write_result(Path(config.out), result)
            console.print(_rich_table(result))
            for record in left_out[:5]:
                console.print(f"left out: {record['error']}", soft_wrap=True)
            console.print(f"{figures.num_generated} clips measured; see {Path(config.out) / RESULT}", soft_wrap=True)
        if not suite.names:
            name, why = next(iter(figures.failed.items()))
            raise OviError(f"every metric failed; {name}: {why}. All are in {Path(config.out) / RESULT}")
    return result


def write_result(out: Path, result: dict[str, Any]) -> None:
    """Write ``evaluation.json`` and ``evaluation.md``, each whole or not at all."""
    from ovi.commands.record import without_nan
    from ovi.data.files import whole_file, write_json

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RESULT, without_nan(json.loads(json.dumps(result, default=str))))
    rows = [("figure", "generated", "real"), ("---", "---:", "---:"), *table(result)]
    with whole_file(out / TABLE) as file:
        file.write("".join(f"| {' | '.join(row)} |\n" for row in rows).encode())


def table(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(tag, generated, real) of all figures; of a distance the real side is one half of the real set to the other."""
    tags = list(dict.fromkeys([*result["generated"], *result["real"]]))
    return [(tag, _shown(result["generated"].get(tag)), _shown(result["real"].get(tag))) for tag in tags]


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    if math.isnan(value):
        return "undefined"
    return f"{value:.0f}" if abs(value) < 1e9 and value == round(value) else f"{value:.4g}"


def _rich_table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    shown = Table("figure", "generated", "real")
    for row in table(result):
        shown.add_row(*row)
    return shown


# --- what is measured ------------------------------------------------------------------------------------------------


Warn = Callable[[str], None]


def _sides(config: DictConfig, device: Any, warn: Warn) -> tuple[Clips, RealClips | None, Reading]:
    if bool(config.generated) == bool(config.checkpoint):
        raise OviError("say what is to be measured: generated=FOLDER of video files, or checkpoint=RUN, one of them")
    if config.generated:
        folder = Path(config.generated)
        files = files_in(folder, "generated")
        reading = _reading(config, files)
        prompts = _prompts_of_files(config.prompts, folder, files, warn)
        return FileClips(folder, files, reading, False, prompts), _real(config, reading, device, warn), reading
    return _from_checkpoint(config, device, warn)


def _from_checkpoint(config: DictConfig, device: Any, warn: Warn) -> tuple[Clips, RealClips | None, Reading]:
    from ovi.attention import use_attention
    from ovi.commands.restore import restore

    restored = restore(config.checkpoint, config.get("codec_paths"))
    record, clock = restored.record, restored.codecs.clock
    num_frames, height, width = (config[name] or record[name] for name in ("num_frames", "height", "width"))
    for name, rate, unit in (("fps", clock.fps, "fps"), ("sample_rate", clock.sample_rate, "Hz")):
        if config[name] not in (None, rate):
            raise OviError(f"{name}={config[name]}: the checkpoint generates at {rate:g} {unit}; leave {name} away")
    reading = Reading(
        clock.fps,
        clock.sample_rate,
        num_frames,
        height,
        width,
        variable_frame_rate=config.variable_frame_rate,
        without_sound=config.without_sound,
    )
    real = _real(config, reading, device, warn)
    if config.prompts is not None:
        prompts = dict(enumerate(read_prompt_table(config.prompts)))
    elif isinstance(real, ShardClips):
        prompts = real.prompts(None if config.num_clips is None else _count(real, config.num_clips))
        if not prompts:
            raise OviError(f"real={config.real}: none of its clips can be read; the first: {real.rejected[0]['error']}")
    else:
        raise OviError("a checkpoint needs prompts: set prompts=FILE (.csv, .jsonl or .txt), or real=FOLDER of shards")
    use_attention(restored.model, instantiate(config.attention, _convert_="all"))
    if config.compile:
        restored.model.compile_layers()
    keep = Path(config.out) / "clips" if config.keep_clips else None
    if keep is not None:
        shared(lambda: _check_unused(keep))
        keep.mkdir(parents=True, exist_ok=True)
    generator = instantiate(config.generation, _convert_="all")
    return GeneratedClips(restored, generator, prompts, device, (num_frames, height, width), keep), real, reading


def _check_unused(folder: Path) -> None:
    there = sum(1 for _ in folder.glob("*.mp4"))
    if there:
        raise OviError(
            f"{folder}: holds {there} clips of another run: set out= to another folder, remove them, or keep no clips "
            "with keep_clips=false"
        )


def _reading(config: DictConfig, files: list[Path]) -> Reading:
    given = {name: config[name] for name in ("num_frames", "height", "width", "variable_frame_rate", "without_sound")}
    fps, sample_rate = config.fps, config.sample_rate
    for file in files:
        if fps and sample_rate:
            break
        try:
            info = probe(file)
        except MediaError:  # is left out, with its reason, when its turn comes
            continue
        fps, sample_rate = fps or info.fps, sample_rate or info.sample_rate
    if not fps:
        raise OviError(f"none of the {len(files)} files of generated={config.generated} says its frame rate; set fps=")
    # Where no file has sound, there is none to be heard at any rate.
    return Reading(fps=float(fps), sample_rate=int(sample_rate or 16000), **given)


def _real(config: DictConfig, reading: Reading, device: Any, warn: Warn) -> RealClips | None:
    from ovi.codecs.bundle import Codecs  # noqa: F401  (the registries of codecs fill as it is imported)
    from ovi.data.index import INDEX, ShardIndex

    if config.real is None:
        return None
    folder = Path(config.real)
    if not (folder / INDEX).is_file():
        files = files_in(folder, "real")
        return FileClips(folder, files, reading, True, _prompts_of_files(None, folder, files, warn))
    index = ShardIndex.load(folder)
    codecs = index.codecs(config.get("codec_paths"), text=False)
    clock = codecs.clock
    if (clock.fps, clock.sample_rate) != (reading.fps, reading.sample_rate):
        raise OviError(
            f"real={folder} holds clips of {clock.fps:g} fps and {clock.sample_rate} Hz, the others are read at "
            f"{reading.fps:g} fps and {reading.sample_rate} Hz: set fps={clock.fps:g} sample_rate={clock.sample_rate}"
        )
    if not index.num_samples("val"):
        raise OviError(f"real={folder} has no validation samples: encode again with val_fraction")
    clips = ShardClips(index, codecs, device)
    if not len(clips):
        raise OviError(f"real={folder} has no validation sample with pictures and sound: encode clips that have both")
    return clips


def _counterpart(config: DictConfig, generated: Clips, real: RealClips | None, warn: Warn) -> Counterpart | None:
    """Where the sound of the real clip of the same prompt comes from: files by their names, shards by their numbers."""
    if isinstance(generated, GeneratedClips):
        return real.sound if isinstance(real, ShardClips) and config.prompts is None else None
    if not (isinstance(generated, FileClips) and isinstance(real, FileClips)):
        return None
    names, place = generated.names, {name: number for number, name in enumerate(real.names)}
    pairs = paired(names, place, of=f"generated={config.generated}", to=f"real={config.real}")
    if len(pairs) < len(names):
        warn(f"{len(names) - len(pairs)} of {len(names)} files have no counterpart of their name in real={config.real}")
    return lambda number: real.sound(place[pairs[names[number]]]) if names[number] in pairs else None


def _prompts_of_files(given: str | None, folder: Path, files: list[Path], warn: Warn) -> dict[str, Prompt]:
    path = Path(given) if given is not None else None
    if path is None:
        beside = [folder / name for name in ("captions.jsonl", "captions.csv", "samples.jsonl", "prompts.csv")]
        path = next((file for file in beside if file.is_file()), None)
    if path is None:
        return {}
    found = captions_for(names_in(folder, files), read_prompt_table(path), path, folder)
    if given is not None and not found:
        raise OviError(
            f"prompts={path}: none of its prompts is of a file in {folder}; its column {' or '.join(FILE_COLUMNS)} "
            f"holds paths in that folder, such as {names_in(folder, files[:1])[0]!r}"
        )
    if len(found) < len(files):
        warn(f"{len(files) - len(found)} of {len(files)} files have no prompt in {path}")
    return found


def _count(clips: Clips, limit: int | None) -> int:
    if limit is not None and limit < 1:
        raise OviError(f"num_clips and num_real must be at least 1, got {limit}")
    return len(clips) if limit is None else min(limit, len(clips))


def _feed(suite: Any, clips: Clips, count: int, place: tuple[int, int], console: Any, what: str) -> None:
    from rich.progress import track

    numbers = list(range(count))[place[0] :: place[1]]
    for clip in track(clips(numbers), what, total=len(numbers), console=console, disable=place[0] != 0):
        suite.add(clip)


__all__ = ["evaluate", "main", "table", "write_result"]
