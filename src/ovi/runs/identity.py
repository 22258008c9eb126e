"""What makes two runs the same run: a checksum of all settings that decide a result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

HASH_LENGTH = 16

_DECIDE_NOTHING = (
    "name",
    "label",
    "variant",
    "sweep",
    "resume",
    "logger",
    "hydra",
    "codec_paths",
    "generation",  # what of it counts stands again where it is used, under callbacks.joint_eval.generator
    "data.num_workers",
    "data.cache_dir",
    "data.cache_gb",
    "data.codec_paths",
    "trainer.accelerator",
    "trainer.default_root_dir",
    "trainer.log_every_n_steps",
    "trainer.num_sanity_val_steps",
    "trainer.profiler",
    "trainer.fast_dev_run",
    "trainer.barebones",
    "trainer.detect_anomaly",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.enable_checkpointing",
    "callbacks.progress",
    "callbacks.throughput",
    "callbacks.learning_rate",
    "callbacks.checkpoint",
    "callbacks.dashboard",
    "callbacks.joint_eval.cache_dir",
    "callbacks.joint_eval.consumers",
    "callbacks.joint_eval.generator.passes_at_once",
)
_WITHOUT_SAYING = {"trainer.devices": ("auto", 1, "1"), "trainer.num_nodes": (1, "1"), "trainer.strategy": ("auto",)}
"""Settings that count only at other values than these: two devices see batches twice as large."""


def config_hash(config: Mapping[str, Any]) -> str:
    """Checksum of a run's resolved settings, 16 hex digits; equal for runs that must give the same result.

    Left out: names, folders of runs and caches, loggers, progress, checkpoints, processes that read data, which device,
    what a run continues. The seed counts; so does all that is measured, for a run without a metric has another result.

    Args:
        config: composed from ``conf/train.yaml`` and resolved, as a dictionary or as read from ``config.yaml``.
    """
    text = json.dumps(_plain(deciding(config)), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]


def deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that decide its result."""

    def kept(inner: Mapping[str, Any], path: str) -> dict[str, Any]:
        out = {}
        for key, value in inner.items():
            where = f"{path}.{key}" if path else str(key)
            if where in _DECIDE_NOTHING or _goes_without_saying(where, value):
                continue
            out[str(key)] = kept(value, where) if isinstance(value, Mapping) else value
        return out

    return kept(config, "")


def _goes_without_saying(where: str, value: Any) -> bool:
    one_device = where == "trainer.devices" and isinstance(value, list | tuple) and len(value) == 1  # whichever it is
    return one_device or value in _WITHOUT_SAYING.get(where, ())


def _plain(value: Any) -> Any:
    """Whole floats as integers and tuples as lists: YAML does not keep them apart."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
