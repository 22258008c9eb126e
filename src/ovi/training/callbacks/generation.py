"""Generates clips in validation and hands them to whoever measures or shows them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import lightning as L

from ovi.data.batch import LatentBatch
from ovi.data.media import Clip
from ovi.generate import Generator, decoded
from ovi.training.datamodule import ShardsDataModule
from ovi.twin import TwinDiT


@dataclass(frozen=True)
class ValidationClip:
    """A clip of the validation set, generated anew from its caption, or real (decoded from its latents)."""

    index: int
    clip: Clip
    caption: str
    real: bool
    extra: dict[str, Any]


class Consumer(Protocol):
    """Takes the clips of one validation round, one at a time, and reports once all have come."""

    def consume(self, clip: ValidationClip, trainer: L.Trainer) -> None: ...

    def report(self, trainer: L.Trainer, module: L.LightningModule) -> None: ...


class GenerationCallback(L.Callback):
    """Generates clips from the first prompts of the validation set, at the end of each validation round.

    Every rank generates its share; a clip depends on the generator's seed and its number alone. The real counterparts
    pass once, in the first round, as the floor of every figure.

    Args:
        generator: how clips are generated.
        consumers: by name, what is done with the clips; None switches one off.
        num_clips: how many, over all ranks.
    """

    def __init__(self, *, generator: Generator, consumers: Mapping[str, Consumer | None], num_clips: int = 8) -> None:
        self.generator, self.num_clips = generator, num_clips
        self.consumers = [c for c in consumers.values() if c is not None]
        self._real_done = False

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self.consumers:
            return
        started = time.perf_counter()
        data: ShardsDataModule = trainer.datamodule  # type: ignore[attr-defined]
        samples = data.first_validation_samples(self.num_clips)
        mine = list(range(trainer.global_rank, len(samples), trainer.world_size))
        clips = self._generated(pl_module, data, samples, mine)
        if not self._real_done:
            clips = [*self._real(data, samples, mine), *clips]  # type: ignore[assignment]
            self._real_done = True
        for clip in clips:
            for consumer in self.consumers:
                consumer.consume(clip, trainer)
        for consumer in self.consumers:
            consumer.report(trainer, pl_module)
        pl_module.log("val/generation_s", time.perf_counter() - started, rank_zero_only=True)

    def _generated(
        self, module: L.LightningModule, data: ShardsDataModule, samples: list[LatentBatch], indices: list[int]
    ) -> Iterable[ValidationClip]:
        texts = [samples[i].text[0].to(module.device) for i in indices]
        if not texts:
            return
        shapes = (tuple(samples[0].video.shape[1:]), tuple(samples[0].audio.shape[1:]))
        clips = self.generator.clips(cast(TwinDiT, module.model), data.codecs, shapes, texts, indices)
        for i, clip in zip(indices, clips):
            yield ValidationClip(i, clip, samples[i].captions[0], real=False, extra=samples[i].extra[0])

    def _real(self, data: ShardsDataModule, samples: list[LatentBatch], indices: list[int]) -> Iterable[ValidationClip]:
        for i in indices:
            sample = samples[i]
            (clip,) = decoded(data.codecs, sample.video, sample.audio)
            yield ValidationClip(i, clip, sample.captions[0], real=True, extra=sample.extra[0])

    def state_dict(self) -> dict[str, Any]:
        return {"real_done": self._real_done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._real_done = bool(state_dict["real_done"])


def tensorboard(trainer: L.Trainer) -> Any | None:
    """The run's TensorBoard writer on the main process; None elsewhere or without that logger."""
    from lightning.pytorch.loggers import TensorBoardLogger

    if not trainer.is_global_zero:
        return None
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


__all__ = ["Consumer", "GenerationCallback", "ValidationClip", "tensorboard"]
