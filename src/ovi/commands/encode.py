"""``ovi encode``: clips with sound to latent shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ovi.commands.hydra_app import run

if TYPE_CHECKING:
    from ovi.data.encode import EncodeSummary


def main(argv: list[str]) -> None:
    """Compose ``conf/encode.yaml`` and encode."""
    run("encode", encode_source, argv)


def encode_source(config: DictConfig) -> EncodeSummary:
    """Encode as configured, with a progress bar and a closing table.

    Raises:
        OviError: for a source, codecs or sizes that do not fit.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ovi.codecs.base import AUDIO_CODECS, TEXT_ENCODERS, VIDEO_CODECS
    from ovi.codecs.bundle import Codecs
    from ovi.data.encode import encode

    registries = {"video": VIDEO_CODECS, "audio": AUDIO_CODECS, "text": TEXT_ENCODERS}
    nodes = OmegaConf.to_container(config.codec, resolve=True)
    assert isinstance(nodes, dict)
    codecs = Codecs.build({kind: registries[kind].spec(nodes[kind]) for kind in registries}, fps=config.fps)
    settings = ("num_frames", "height", "width", "shard_size", "val_fraction", "dtype", "fit_clips", "clips_per_file")
    more = ("variable_frame_rate", "num_workers", "overwrite")
    columns = (TextColumn("{task.description:>7}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console()
    with Progress(*columns, console=console) as bar:
        tasks = {stage: bar.add_task(stage, total=None, visible=False) for stage in ("fit", "encode")}
        summary = encode(
            instantiate(config.source, _convert_="all"),
            codecs,
            config.out,
            **{name: config[name] for name in settings + more},
            on_progress=lambda stage, done, total: bar.update(tasks[stage], completed=done, total=total, visible=True),
        )
    counts = ", ".join(f"{count} {split}" for split, count in summary.num_samples.items())
    console.print(f"{summary.index.parent}: {counts} samples, {summary.num_new} encoded now in {summary.seconds:.1f} s")
    if summary.num_captioned < summary.num_files:
        console.print(f"{summary.num_files - summary.num_captioned} of {summary.num_files} files have no caption")
    if summary.rejected:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(summary.rejected.items()))
        console.print(f"left out: {reasons}; see {summary.index.parent / 'rejected.jsonl'}")
    return summary
