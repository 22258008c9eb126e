"""Makes TensorBoard's pages for comparing runs: settings beside final figures, variants side by side in a chart."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from ovi.metrics.directions import direction
from ovi.registry import REGISTRIES, UnknownNameError
from ovi.training.callbacks.joint_eval import tensorboard
from ovi.training.callbacks.throughput import Throughput

LOSSES = ("train/loss", "val/loss", "val/loss_video", "val/loss_audio")
SPEEDS = ("train/samples_per_s", "train/latent_positions_per_s", "train/data_wait_share", "train/validation_share")
SYNC = ("val/av_*", "val/impact_*", "val/desync_*", "val/lse_*", "val/planted_*")
DISTANCES = ("val/fvd_*", "val/fd_*", "val/kd_*", "val/fad_*", "val/kad_*")


class Dashboard(L.Callback):
    """Writes what TensorBoard's pages HPARAMS and CUSTOM SCALARS show, into the run's own event file.

    HPARAMS has a row a run: its variant in a sweep, the knobs named here, and the last value of each validation figure
    that has a better way. CUSTOM SCALARS has charts of losses, synchronisation, distances, other figures, attention in
    time and speed, each with a line a run.

    Both are written after the first validation, when it is known which figures there are.

    Args:
        knobs: settings shown of every run, as paths into ``config.yaml``; a component shows its name. Those that a run
            does not have are left out.
    """

    def __init__(self, *, knobs: Sequence[str] = ()) -> None:
        self.knobs = tuple(knobs)
        self._written = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._write(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)
        self._end(trainer, "STATUS_SUCCESS")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end(trainer, "STATUS_FAILURE")

    def _write(self, trainer: L.Trainer) -> None:
        writer = tensorboard(trainer)
        if writer is None or self._written:
            return
        self._written = True
        tags = {*trainer.callback_metrics, *trainer.logged_metrics}
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        speeds = SPEEDS if any(isinstance(callback, Throughput) for callback in callbacks) else ()
        with self._guarded():
            settings = shown_settings(Path(trainer.default_root_dir), self.knobs)
            _write_hparams(writer, settings, [tag for tag in sorted(tags) if tag.startswith("val/") and direction(tag)])
            writer.add_custom_scalars(layout([*tags, *speeds]))
            writer.flush()

    def _end(self, trainer: L.Trainer, status: str) -> None:
        writer = tensorboard(trainer)
        if writer is not None and self._written:
            with self._guarded():
                writer._get_file_writer().add_summary(_session_end(status))
                writer.flush()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a page of TensorBoard is not worth a run
            rank_zero_warn(f"TensorBoard's pages for comparing runs are not written ({type(error).__name__}: {error})")


def layout(tags: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """The charts for some tags, as ``SummaryWriter.add_custom_scalars`` wants them: category, title, tags.

    The same tags always give the same charts: TensorBoard puts those of all runs together, and drops what is there
    twice.
    """
    figures = sorted(tag for tag in tags if tag.startswith("val/") and direction(tag) and tag not in LOSSES)
    groups: dict[str, list[str]] = {
        "losses": [tag for tag in LOSSES if tag in tags],
        "synchronisation": [tag for tag in figures if _is_of(tag, SYNC)],
        "distances": [tag for tag in figures if _is_of(tag, DISTANCES)],
        "other figures": [tag for tag in figures if not _is_of(tag, (*SYNC, *DISTANCES))],
        "attention in time": sorted(tag for tag in tags if tag.startswith("attention/") and tag.endswith("_ms")),
        "speed": [tag for tag in SPEEDS if tag in tags],
    }
    # Tags are patterns to TensorBoard, which match at the beginning.
    return {
        title: {tag.removeprefix("val/"): ["Multiline", [f"{re.escape(tag)}$"]] for tag in of_group}
        for title, of_group in groups.items()
        if of_group
    }


def shown_settings(folder: Path, knobs: Sequence[str]) -> dict[str, str | float]:
    """A run's variant and some of its settings, from ``run.json`` and ``config.yaml`` in its folder."""
    import yaml

    file = folder / "run.json"
    identity = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file = folder / "config.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found: dict[str, str | float] = {"label": str(identity["label"])} if identity.get("label") else {}
    found |= {str(key): _shown(value) for key, value in (identity.get("variant") or {}).items()}
    for knob in knobs:
        value: Any = config
        for part in knob.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        # A sweep calls a group by its path with slashes.
        if value is not None and knob.replace(".", "/") not in found:
            found[knob] = _shown(value)
    return found


def _shown(value: Any) -> str | float:
    if isinstance(value, Mapping):
        return _component(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    return value


def _component(node: Mapping[str, Any]) -> str:
    for registry in REGISTRIES.values():
        try:
            return str(registry.spec(node)["name"])
        except UnknownNameError:
            continue
    return str(node.get("_target_", dict(node))).rpartition(".")[2]


def _is_of(tag: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(tag, pattern) for pattern in patterns)


def _write_hparams(writer: Any, settings: Mapping[str, str | float], tags: Sequence[str]) -> None:
    # As SummaryWriter.add_hparams does it, but into this run's file instead of a run of its own, and without values:
    # the page shows the last one logged under each tag.
    from torch.utils.tensorboard.summary import hparams

    experiment, start, _ = hparams(dict(settings), dict.fromkeys(tags, 0.0))
    for summary in (experiment, start):
        writer._get_file_writer().add_summary(summary)


def _session_end(status: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.Status.Value(status), end_time_secs=time.time())
    content = plugin_data_pb2.HParamsPluginData(session_end_info=end, version=metadata.PLUGIN_DATA_VERSION)
    value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=metadata.create_summary_metadata(content))
    return Summary(value=[value])
