"""Which way a figure gets better, as the metric that gives it says."""

from __future__ import annotations

import importlib
import pkgutil
from fnmatch import fnmatchcase
from functools import cache

import ovi.metrics
from ovi.metrics.clip_metric import METRICS, ClipMetric, Direction

_LOSSES = ("loss", "loss_*", "train/loss", "train/loss_*", "val/loss", "val/loss_*", "val_sigma/*")
_COSTS = ("seconds", "train_seconds", "flops", "flops_per_step", "parameters", "peak_memory_gb")
_WAITING = ("train/data_wait_share", "train/validation_share")
_SPEEDS = ("train/samples_per_s", "train/latent_positions_per_s")


def direction(tag: str) -> Direction:
    """Which way a figure gets better.

    Args:
        tag: as TensorBoard and the tables of runs have it, such as ``val/av_offset_xcorr_ms`` or ``val/loss``; a
            metric's own tag without its stage; or a cost, such as ``seconds``.

    Returns:
        ``lower`` or ``higher``; None where neither is better, as of a count, or no metric says.
    """
    for way, patterns in (("lower", (*_LOSSES, *_COSTS, *_WAITING)), ("higher", _SPEEDS)):
        if any(fnmatchcase(tag, pattern) for pattern in patterns):
            return way  # type: ignore[return-value]
    own = tag.removeprefix("val/").removeprefix("val_real/")
    if "/" in own:
        return None
    _load_metrics()
    for name in METRICS:
        kind = METRICS[name]
        if not (isinstance(kind, type) and issubclass(kind, ClipMetric)):
            continue
        try:
            return kind.direction(own)
        except KeyError:
            continue
    return None


@cache
def _load_metrics() -> None:
    """Have every metric of ours registered; plug-ins are by whoever uses them."""
    for module in pkgutil.walk_packages(ovi.metrics.__path__, "ovi.metrics."):
        importlib.import_module(module.name)
