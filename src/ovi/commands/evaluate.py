"""``ovi evaluate``: clips of any model, or of a checkpoint, against real ones; a json and a table."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from ovi.commands.clip_sources import Clips, FileClips, GeneratedClips, Reading, ShardClips, files_in
from ovi.commands.hydra_app import run
from ovi.commands.prompt_table import Prompt, captions_for, read_prompt_table
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
    with _processes() as (rank, world_size):
        console = Console(quiet=rank != 0)
        generated, real, reading = _sides(config)
        suite = MetricSuite(
            instantiate(config.get("metrics") or {}, _convert_="all"),
            fps=reading.fps,
            sample_rate=reading.sample_rate,
            warn=lambda sentence: console.print(f"[yellow]{sentence}[/yellow]"),
            cache=Path(config.cache_dir).expanduser() if config.cache_dir else None,
            real_set={"set": real.describe(), "num_real": config.num_real} if real else None,
        )
        if not suite.names:
            raise OviError("no metric is on: choose some, for instance +metric@metrics.fvd=fvd (`ovi list metric`)")
        needs = suite.needing_real
        if real is None and needs:
            raise OviError(
                f"{', '.join(needs)} hold clips against real ones: set real=FOLDER, or switch them off "
                f"({' '.join(f'metrics.{name}=null' for name in needs)})"
            )
        suite.to(_device(config.device))
        if real is not None and suite.wants_real:
            _feed(suite, real, _count(real, config.num_real), (rank, world_size), console, "real")
        _feed(suite, generated, _count(generated, config.num_clips), (rank, world_size), console, "generated")
        figures = suite.figures()
        rejected = _gathered([*generated.rejected, *(real.rejected if real else [])])
        if not figures.num_generated:
            why = f"; the first: {rejected[0]['error']}" if rejected else ""
            raise OviError(f"none of the {len(generated)} generated clips could be measured{why}")
        result = {
            **asdict(figures),
            "rejected": rejected,
            "reading": asdict(reading),
            "metrics": suite.identities,
            "generated_from": str(config.generated or config.checkpoint),
            "real_from": None if config.real is None else str(config.real),
            "seconds": time.perf_counter() - began,
            "command": " ".join(["ovi", *sys.argv[1:]]),
        }
        if rank == 0:
            write_result(Path(config.out), result)
            console.print(_rich_table(result))
            for record in rejected[:5]:
                console.print(f"left out: {record['error']}")
            console.print(f"{figures.num_generated} clips measured; see {Path(config.out) / RESULT}")
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
    return "undefined" if math.isnan(value) else f"{value:.4g}" if value != round(value) else f"{value:.0f}"


def _rich_table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    shown = Table("figure", "generated", "real")
    for row in table(result):
        shown.add_row(*row)
    return shown


# --- what is measured ------------------------------------------------------------------------------------------------


def _sides(config: DictConfig) -> tuple[Clips, Clips | None, Reading]:
    if bool(config.generated) == bool(config.checkpoint):
        raise OviError("say what is to be measured: generated=FOLDER of video files, or checkpoint=RUN, one of them")
    if config.generated:
        files = files_in(config.generated, "generated")
        reading = _reading(config, files[0])
        real, sounds = _real(config, reading)
        prompts = _prompts_of_files(config.prompts, Path(config.generated), files)
        counterpart = (lambda file: sounds(file.stem)) if sounds else None
        return FileClips(files, reading, False, prompts, counterpart), real, reading
    return _from_checkpoint(config)


def _from_checkpoint(config: DictConfig) -> tuple[Clips, Clips | None, Reading]:
    from ovi.attention import use_attention
    from ovi.commands.restore import restore

    restored = restore(config.checkpoint)
    record, clock = restored.record, restored.codecs.clock
    num_frames, height, width = (config[name] or record[name] for name in ("num_frames", "height", "width"))
    if config.fps is not None and config.fps != clock.fps:
        raise OviError(f"fps={config.fps}: the checkpoint generates at {clock.fps:g} fps; leave fps away")
    reading = Reading(
        clock.fps,
        clock.sample_rate,
        num_frames,
        height,
        width,
        variable_frame_rate=config.variable_frame_rate,
        without_sound=config.without_sound,
    )
    real, _ = _real(config, reading)
    counterpart = None
    if config.prompts is not None:
        prompts = read_prompt_table(config.prompts)
    elif isinstance(real, ShardClips):
        samples = real.about(range(_count(real, config.num_clips)))
        prompts = [Prompt(caption, "", extra) for caption, extra in samples]
        counterpart = real.sound
    else:
        raise OviError("a checkpoint needs prompts: set prompts=FILE (.csv, .jsonl or .txt), or real=FOLDER of shards")
    use_attention(restored.model, instantiate(config.attention, _convert_="all"))
    if config.compile:
        restored.model.compile_layers()
    keep = Path(config.out) / "clips" if config.keep_clips else None
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    generator = instantiate(config.generation, _convert_="all")
    clips = GeneratedClips(
        restored, generator, prompts, _device(config.device), (num_frames, height, width), keep, counterpart
    )
    return clips, real, reading


def _reading(config: DictConfig, first: Path) -> Reading:
    from ovi.data.media import probe

    info = probe(first)
    given = {name: config[name] for name in ("num_frames", "height", "width", "variable_frame_rate", "without_sound")}
    fps = config.fps or info.fps
    if not fps:
        raise OviError(f"{first}: does not say its frame rate; set fps=")
    return Reading(fps=float(fps), sample_rate=int(config.sample_rate), **given)


def _real(config: DictConfig, reading: Reading) -> tuple[Clips | None, Any]:
    """The real side, and for files a function from a name to the sound of the real clip of that name."""
    from ovi.codecs.bundle import Codecs  # noqa: F401  (the registries of codecs fill as it is imported)
    from ovi.data.index import INDEX, ShardIndex

    if config.real is None:
        return None, None
    folder = Path(config.real)
    if not (folder / INDEX).is_file():
        files = files_in(folder, "real")
        by_stem = {file.stem: file for file in files}

        def sound(stem: str) -> Any:
            return reading.read(by_stem[stem]).waveform if stem in by_stem else None

        return FileClips(files, reading, True, _prompts_of_files(None, folder, files)), sound
    index = ShardIndex.load(folder)
    codecs = index.codecs()
    clock = codecs.clock
    if (clock.fps, clock.sample_rate) != (reading.fps, reading.sample_rate):
        raise OviError(
            f"real={folder} holds clips of {clock.fps:g} fps and {clock.sample_rate} Hz, the others are read at "
            f"{reading.fps:g} fps and {reading.sample_rate} Hz: set fps={clock.fps:g} sample_rate={clock.sample_rate}"
        )
    if not index.num_samples("val"):
        raise OviError(f"real={folder} has no validation samples: encode again with val_fraction")
    return ShardClips(index, codecs), None


def _prompts_of_files(given: str | None, folder: Path, files: list[Path]) -> dict[str, Prompt]:
    path = Path(given) if given is not None else None
    if path is None:
        beside = [folder / name for name in ("captions.jsonl", "captions.csv", "samples.jsonl", "prompts.csv")]
        path = next((file for file in beside if file.is_file()), None)
    if path is None:
        return {}
    return captions_for([file.name for file in files], read_prompt_table(path), path)


def _count(clips: Clips, limit: int | None) -> int:
    if limit is not None and limit < 1:
        raise OviError(f"num_clips and num_real must be at least 1, got {limit}")
    return len(clips) if limit is None else min(limit, len(clips))


def _feed(suite: Any, clips: Clips, count: int, place: tuple[int, int], console: Any, what: str) -> None:
    from rich.progress import track

    numbers = list(range(count))[place[0] :: place[1]]
    for clip in track(clips(numbers), what, total=len(numbers), console=console, disable=place[0] != 0):
        suite.add(clip)


def _device(given: str) -> Any:
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return (found or torch.device("cpu")) if given == "auto" else torch.device(given)


@contextlib.contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """(rank, number of processes) as torchrun says, joined for the time of the block."""
    import torch
    import torch.distributed as dist

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or dist.is_initialized():
        yield (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield dist.get_rank(), world_size
    finally:
        dist.destroy_process_group()


def _gathered(records: list[dict[str, str]]) -> list[dict[str, str]]:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return records
    everyone: list[list[dict[str, str]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, records)
    return [record for records in everyone for record in records]


__all__ = ["evaluate", "main", "table", "write_result"]
