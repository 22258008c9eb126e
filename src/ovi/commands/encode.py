"""``ovi encode``: clips with sound to latent shards."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ovi.commands.hydra_app import run
from ovi.errors import OviError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn

    from ovi.codecs.bundle import Codecs
    from ovi.data.encode import EncodeSummary


def main(argv: list[str]) -> None:
    """Compose ``conf/encode.yaml`` and encode."""
    run("encode", encode_source, argv)


def encode_source(config: DictConfig, console: Console | None = None) -> EncodeSummary:
    """Encode as configured, with a progress bar and a closing table.

    Args:
        config: composed from ``conf/encode.yaml``.
        console: where both go; None is the terminal.

    Raises:
        OviError: for a source, codecs or sizes that do not fit.
    """
    from rich.console import Console
    from rich.progress import Progress

    from ovi.data.encode import encode
    from ovi.data.launchers.ray import Ray
    from ovi.data.reading.remote import join

    codecs = _codecs(config)
    codecs.to(_device(config.device))
    settings = ("num_frames", "height", "width", "sizes", "lengths", "incomplete", "shard_size", "val_fraction")
    more = ("dtype", "batch_size", "fit_clips", "clips_per_file", "variable_frame_rate", "num_workers")
    places = ("overwrite", "grow", "scratch_dir", "scratch_gb", "patience_s")
    rank, world_size = config.rank, config.world_size
    if rank is None or world_size is None:
        found = place_among_processes(os.environ)
        rank, world_size = found[0] if rank is None else rank, found[1] if world_size is None else world_size
    launcher = instantiate(config.launcher, _convert_="all")
    if isinstance(launcher, Ray):
        _quiet_ray()
    console = console or Console()
    with Progress(*_columns(), console=console) as bar:
        tasks = {stage: bar.add_task(stage, total=None, visible=False) for stage in ("cut", "look", "fit", "encode")}
        summary = encode(
            instantiate(config.source, _convert_="all"),
            codecs,
            config.out,
            **{name: _plain(config[name]) for name in (*settings, *more, *places)},
            rank=rank,
            world_size=world_size,
            stages=_specs(config.get("stages")),
            wiring=_wiring(config),
            launcher=launcher,
            on_progress=lambda stage, done, total: bar.update(tasks[stage], completed=done, total=total, visible=True),
        )
    counts = ", ".join(f"{count} {split}" for split, count in summary.num_samples.items())
    console.print(f"{summary.folder}: {counts} samples, {summary.num_new} encoded now in {summary.seconds:.1f} s")
    if summary.num_captioned < summary.num_files:
        console.print(f"{summary.num_files - summary.num_captioned} of {summary.num_files} files have no caption")
    if summary.rejected:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(summary.rejected.items()))
        console.print(f"left out: {reasons}; see {join(summary.folder, 'rejected.jsonl')}")
    return summary


def place_among_processes(environment: Mapping[str, str]) -> tuple[int, int]:
    """Rank and number of the processes started together, as torchrun or SLURM say it; (0, 1) where neither does.

    Tasks of a SLURM array count from 0 whatever the array's first number and step; where each starts several processes
    with srun, these count within it. In a job script itself SLURM's number of tasks says nothing: one process runs.

    Args:
        environment: variables by name.

    Raises:
        OviError: for numbers that cannot be read, or array numbers that are not evenly spaced.
    """

    def number(name: str, default: int | None = None) -> int:
        given = environment.get(name, default)
        try:
            return int(given)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise OviError(f"{name}={given} is no number: set rank and world_size") from None

    if "RANK" in environment and "WORLD_SIZE" in environment:
        return number("RANK"), number("WORLD_SIZE")
    rank, world_size = 0, 1
    if "SLURM_ARRAY_TASK_ID" in environment:
        task, first = number("SLURM_ARRAY_TASK_ID"), number("SLURM_ARRAY_TASK_MIN", 0)
        step, world_size = max(1, number("SLURM_ARRAY_TASK_STEP", 1)), number("SLURM_ARRAY_TASK_COUNT")
        rank, rest = divmod(task - first, step)
        if rest or not 0 <= rank < world_size:
            raise OviError(
                f"task {task} of a SLURM array of {world_size} from {first} in steps of {step}: its place among them "
                f"cannot be told; give the array as FIRST-LAST, or set rank and world_size"
            )
    if "SLURM_STEP_ID" in environment:
        processes = number("SLURM_NTASKS", 1)
        rank, world_size = rank * processes + number("SLURM_PROCID", 0), world_size * processes
    return rank, world_size


def _codecs(config: DictConfig) -> Codecs:
    """Those of the codec groups, or another set's with its statistics.

    Raises:
        OviError: for codecs that cannot be built, or a set of another frame rate.
    """
    from ovi.codecs.bundle import REGISTRIES, Codecs
    from ovi.data.index import ShardIndex

    if config.codecs_of is not None:
        index = ShardIndex.load(config.codecs_of, verify=False)
        if index.clock.fps != config.fps:
            raise OviError(
                f"codecs_of={config.codecs_of}: that set has {index.clock.fps:g} frames per second, fps is "
                f"{config.fps:g}: set fps={index.clock.fps:g}"
            )
        return index.codecs(config.codec_paths)
    nodes = OmegaConf.to_container(config.codec, resolve=True)
    assert isinstance(nodes, dict)
    return Codecs.build({kind: REGISTRIES[kind].spec(nodes[kind]) for kind in REGISTRIES}, fps=config.fps)


def _columns() -> tuple[ProgressColumn, ...]:
    """Files or clips done by all processes together, their rate, and the time that the rest will take."""
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.1f}/s")

    return TextColumn("{task.description:>7}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn()


def _device(given: str) -> Any:
    """The device of the codecs; among several processes of one machine each takes the accelerator of its number."""
    import torch

    if given != "auto":
        return torch.device(given)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return torch.device(found.type, number % torch.accelerator.device_count())


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _quiet_ray() -> None:
    """Ray's own settings, unless the user has made others: no tokens for a cluster of one's own, nothing sent home."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


def _specs(nodes: DictConfig | None) -> dict[str, Any]:
    """Registry specs of the stages in their order."""
    from ovi.data.stages.base import STAGES

    plain = OmegaConf.to_container(nodes, resolve=True) if nodes is not None else {}
    assert isinstance(plain, dict)
    return {str(label): None if node is None else STAGES.spec(node) for label, node in plain.items()}


def _wiring(config: DictConfig) -> dict[str, Any]:
    """What stages are given by the code: how to tell sound from picture, and who writes captions."""
    wiring = {"estimator": instantiate(config.sync_estimator, _convert_="all")}
    if config.get("lip_estimator") is not None:
        wiring["lip_estimator"] = instantiate(config.lip_estimator, _convert_="all")
    if config.get("captioner") is not None:
        wiring["captioner"] = instantiate(config.captioner, _convert_="all")
    return wiring
