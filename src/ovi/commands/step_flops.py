"""Operations of a training step, counted without computing."""

from __future__ import annotations

from typing import Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig

from ovi.commands.cost import Size, count_step
from ovi.data.index import LatentShapes
from ovi.data.reading.plan import shapes_to_buckets
from ovi.training.freezing import freeze


def step_flops(config: DictConfig, data: Any) -> float:
    """Floating-point operations of one optimizer step on one process, forward and backward, batches of all its parts.

    Prompts count as long as they may be. Where batches are of several shapes it is the mean of the first epoch's.

    Args:
        config: of ``ovi train``.
        data: its data module.
    """
    import torch

    with torch.device("meta"):
        model = instantiate(config.model, _convert_="all")(data.layout)
        if config.get("adapter") is not None:
            instantiate(config.adapter, _convert_="all")(model)
    freeze(model, list(config.optim.get("frozen") or ()))
    patch = model.video.patch_embedding.size
    total = 0.0
    shares = _shares(data)
    for (shapes, batch), share in shares.items():
        size = Size(
            data.layout,
            (shapes.video[1], shapes.video[2], shapes.video[3]) if shapes.video[1] else patch,
            shapes.audio[0] or 1,
            data.layout.text_len,
            batch,
        )
        total += share * count_step(model, size)
    return total / sum(shares.values()) * (config.trainer.get("accumulate_grad_batches") or 1)


def _shares(data: Any) -> dict[tuple[LatentShapes, int], int]:
    """How many batches of the first epoch are of each (shapes, samples)."""
    indexes = [index for index in data.mixture.indexes.values() if index.num_samples("train")]
    rows = [[shard.shapes for shard in index.shards("train")] for index in indexes]
    numbers, kinds = shapes_to_buckets(rows)
    counts = [shard.num_samples for index in indexes for shard in index.shards("train")]
    of_shard = [number for row in numbers for number in row]
    batches = data.train_plan.batches(0)
    first = np.searchsorted(np.cumsum(counts), batches.samples[batches.bounds[:-1]], side="right")
    sizes = np.diff(batches.bounds)
    found: dict[tuple[LatentShapes, int], int] = {}
    for shard, size in zip(first.tolist(), sizes.tolist()):
        key = (kinds[of_shard[shard]], size)
        found[key] = found.get(key, 0) + 1
    return found


__all__ = ["step_flops"]
