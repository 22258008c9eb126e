"""Generates clips in validation, measures them beside real ones, and hands them to whoever shows them."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn

from ovi.data.batch import LatentBatch
from ovi.data.media import Clip
from ovi.errors import OviError
from ovi.generate import Generator, decoded
from ovi.metrics.clip_metric import MeasuredClip, planted_truth
from ovi.metrics.suite import Figures, MetricFactory, MetricSuite
from ovi.training.datamodule import ShardsDataModule
from ovi.twin import TwinDiT

RECORD = "metrics.jsonl"
CLIP_RECORD = "clips.jsonl"


@dataclass(frozen=True)
class ValidationClip:
    """A clip of the validation set, generated anew from its caption, or real (decoded from its latents)."""

    index: int
    clip: Clip
    caption: str
    real: bool
    extra: dict[str, Any]


class Consumer(Protocol):
    """Takes the clips of one round, one at a time, and reports once all have come."""

    def consume(self, clip: ValidationClip, trainer: L.Trainer) -> None: ...

    def report(self, trainer: L.Trainer, module: L.LightningModule) -> None: ...


class JointEvalCallback(L.Callback):
    """Generates clips from the prompts of the validation set at the end of a validation round, and measures them.

    It sees the weights that validation sees: averaged ones if there are any. Clip i has the prompt of sample i (from
    the start again when there are fewer) and noise of (the generator's seed, i) alone; rank r of R makes clips r,
    r + R, ...: figures do not depend on the number of ranks. Clips pass one at a time, whatever their number.

    Real clips are decoded from their latents, so that both sides went through the same decoder. Their statistics are
    measured in the first round, or read from ``cache_dir`` where any run before has measured the same.

    Figures go to ``val/<tag>``, those of the real clips (for distances: one half of them against the other) to
    ``val_real/<tag>``, one line a round to ``metrics.jsonl`` in the run's folder, and one line a generated clip to
    ``clips.jsonl``, with the figures of the metrics that average over clips: what a paired test wants. A metric that
    fails is reported once and off from then on; training goes on.

    A distance falls with the number of clips: at half as many generated as real ones (the default) its floor, taken of
    two halves, rests on as many clips as the figure itself.

    Args:
        generator: how clips are generated: solver, steps, guidance, seed.
        metrics: by name, builds a metric from (fps, sample_rate); None switches one off.
        consumers: by name, what else is done with the clips; None switches one off.
        num_clips: clips generated in a round, over all ranks.
        num_real: real clips that stand for the data, from the first on; None for the whole validation set.
        every_n_steps: at the first validation this many steps after the last round; None: at each validation.
        every_n_epochs: likewise in epochs.
        cache_dir: folder for statistics of real clips; None measures them in every run.

    Raises:
        OviError: for counts below 1; when training begins: for a metric that cannot be built.
    """

    def __init__(
        self,
        *,
        generator: Generator,
        metrics: Mapping[str, MetricFactory | None] | None = None,
        consumers: Mapping[str, Consumer | None] | None = None,
        num_clips: int = 8,
        num_real: int | None = 16,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        counts = {
            "num_clips": num_clips,
            "num_real": num_real,
            "every_n_steps": every_n_steps,
            "every_n_epochs": every_n_epochs,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise OviError(f"callbacks.joint_eval.{name} must be at least 1, got {value}")
        self.generator, self.factories = generator, dict(metrics or {})
        self.consumers = [c for c in (consumers or {}).values() if c is not None]
        self.num_clips, self.num_real = num_clips, num_real
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self._suite: MetricSuite | None = None
        self._shown_real = False
        self._last: tuple[int, int] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = _data(trainer)
        if not data.has_validation:
            return
        if not data.validation_numbers:
            rank_zero_warn("clips are not generated in validation: no sample of it has both pictures and sound")
            return
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            rank_zero_warn("clips are not generated in validation: weights in shards cannot be run by one rank alone")
            return
        try:
            _ = data.codecs  # now, and not hours later
        except OviError as error:
            raise OviError(
                f"validation generates clips, which the set's codecs decode: {error}; or train without, "
                "callbacks.joint_eval=null"
            ) from error
        clock = data.index.clock
        real = len(data.validation_numbers)
        num_real = real if self.num_real is None else min(self.num_real, real)
        self._suite = MetricSuite(
            self.factories,
            fps=clock.fps,
            sample_rate=clock.sample_rate,
            warn=rank_zero_warn,
            cache=self.cache_dir,
            real_set={"shards": _digest(data), "num_real": num_real},
            num_real=num_real,
            by_clip=True,
        )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._suite is None or trainer.sanity_checking or not self._due(trainer):
            return
        self._last = trainer.global_step, trainer.current_epoch
        began, suite, codecs, found = time.perf_counter(), self._suite, _data(trainer).codecs, None
        # No process may wait for another in here: each step that could fail is one process's own.
        why = self._attempt(lambda: self._round(trainer, pl_module, suite))
        if not _any_process(why):
            found = suite.figures()
            why = self._attempt(lambda: self._report(trainer, pl_module, found, time.perf_counter() - began))
        suite.to("cpu")  # networks of metrics take no memory from training
        codecs.video.to("cpu"), codecs.audio.to("cpu")
        reason = _any_process(why)
        if reason:
            rank_zero_warn(f"generating and measuring clips failed and is off from now on ({reason})")
            self._suite = None

    @staticmethod
    def _attempt(step: Callable[[], None]) -> str | None:
        """Why a step failed, if it did: no figure is worth a run."""
        try:
            step()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _report(self, trainer: L.Trainer, module: L.LightningModule, found: Figures, elapsed: float) -> None:
        for consumer in self.consumers:
            consumer.report(trainer, module)
        self._log(module, found, elapsed)
        if trainer.is_global_zero:
            folder, record = Path(trainer.default_root_dir), asdict(found)
            of_clips = [{"step": trainer.global_step, **clip} for clip in record.pop("clips")]
            append_record(folder / CLIP_RECORD, *of_clips)
            record = {"step": trainer.global_step, "epoch": trainer.current_epoch, "seconds": elapsed, **record}
            append_record(folder / RECORD, record)

    def _due(self, trainer: L.Trainer) -> bool:
        if self._last is None or self._last[0] == trainer.global_step:
            return True
        steps, epochs = (now - last for now, last in zip((trainer.global_step, trainer.current_epoch), self._last))
        return steps >= (self.every_n_steps or 0) and epochs >= (self.every_n_epochs or 0)

    def _round(self, trainer: L.Trainer, module: L.LightningModule, suite: MetricSuite) -> None:
        """Have this process's share of the clips measured and shown."""
        suite.to(module.device)
        codecs = _data(trainer).codecs
        codecs.video.to(module.device), codecs.audio.to(module.device)
        for clip in self._real(trainer, suite):
            if suite.wants_real and (self.num_real is None or clip.index < self.num_real):
                suite.add(_measured(clip))
            if not self._shown_real and clip.index < self.num_clips:
                self._show(clip, trainer)
        self._shown_real = True
        for clip, real_waveform in self._generated(trainer, module, suite.wants_counterpart):
            suite.add(_measured(clip, real_waveform))
            self._show(clip, trainer)

    def _show(self, clip: ValidationClip, trainer: L.Trainer) -> None:
        for consumer in self.consumers:
            consumer.consume(clip, trainer)

    def _real(self, trainer: L.Trainer, suite: MetricSuite) -> Iterator[ValidationClip]:
        """This rank's share of the real clips that anyone still wants."""
        data, shown = _data(trainer), 0 if self._shown_real or not self.consumers else self.num_clips
        most = len(data.validation_numbers)
        measured = (most if self.num_real is None else self.num_real) if suite.wants_real else 0
        count = min(most, max(shown, measured))
        for i, sample in _share(data, range(count), trainer):
            (clip,) = decoded(data.codecs, sample.video, sample.audio)
            yield ValidationClip(i, clip, sample.captions[0], real=True, extra=sample.extra[0])

    def _generated(
        self, trainer: L.Trainer, module: L.LightningModule, with_real_sound: bool
    ) -> Iterator[tuple[ValidationClip, Any]]:
        """This rank's share of the generated clips, each with the sound of its real counterpart if asked for."""
        data = _data(trainer)
        mine = _share(data, range(self.num_clips), trainer)
        while True:
            pending = [pair for _, pair in zip(range(self.generator.batch_size), mine)]
            if not pending:
                return
            texts = [sample.text[0].to(module.device) for _, sample in pending]
            first = pending[0][1]
            shapes = (tuple(first.video.shape[1:]), tuple(first.audio.shape[1:]))
            numbers = [i for i, _ in pending]
            network = _InPrecision(cast(TwinDiT, module.model), trainer)
            clips = self.generator.clips(network, data.codecs, shapes, texts, numbers)
            for (i, sample), clip in zip(pending, clips):
                sound = None
                if with_real_sound:
                    sound = decoded(data.codecs, sample.video, sample.audio)[0].waveform
                yield ValidationClip(i, clip, sample.captions[0], real=False, extra=sample.extra[0]), sound

    def _log(self, module: L.LightningModule, found: Figures, elapsed: float) -> None:
        # Over all ranks already.
        for stage, figures in (("val", found.generated), ("val_real", found.real)):
            for tag, value in figures.items():
                module.log(f"{stage}/{tag}", float(value))
        module.log("val/num_clips", float(found.num_generated))
        if found.num_unusable:
            module.log("val/num_unusable_clips", float(found.num_unusable))
        module.log("val/joint_eval_s", elapsed, rank_zero_only=True)

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last}  # a continued run has a folder of its own, which wants the real clips again

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        last = state_dict["last"]
        self._last = None if last is None else (int(last[0]), int(last[1]))


def append_record(path: Path, *records: Mapping[str, Any]) -> None:
    """Add a line of JSON a record to a file; figures that are not finite become null, which every reader of JSON
    knows."""
    lines = [json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(lines))


def tensorboard(trainer: L.Trainer) -> Any | None:
    """The run's TensorBoard writer on the main process; None elsewhere or without that logger."""
    from lightning.pytorch.loggers import TensorBoardLogger

    if not trainer.is_global_zero:
        return None
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def _data(trainer: L.Trainer) -> ShardsDataModule:
    return trainer.datamodule  # type: ignore[attr-defined, no-any-return]


def _share(data: ShardsDataModule, numbers: Iterable[int], trainer: L.Trainer) -> Iterator[tuple[int, LatentBatch]]:
    """(clip number, validation sample) of this rank, the set being gone through again when it is short.

    A damaged sample is left out, and said.
    """
    total = len(data.validation_numbers)
    for number in list(numbers)[trainer.global_rank :: trainer.world_size]:
        try:
            yield number, data.validation_sample(number % total)
        except OviError as error:
            if data.strict:
                raise
            rank_zero_warn(f"no clip {number} in validation: {error}")


def _measured(clip: ValidationClip, real_waveform: Any = None) -> MeasuredClip:
    return MeasuredClip(
        clip.clip.frames,
        clip.clip.waveform,
        number=clip.index,
        real=clip.real,
        caption=clip.caption,
        truth=planted_truth(clip.extra),
        real_waveform=real_waveform,
    )


def _digest(data: ShardsDataModule) -> str:
    """Checksum of everything that decides the decoded validation clips, of all sets."""
    content = [
        {"codecs": index.content["codecs"], "shards": [shard.sha256 for shard in index.splits.get("val", ())]}
        for index in data.mixture.indexes.values()
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _InPrecision:
    """A twin run as the trainer runs it: its autocast and types inside, float32 outside."""

    def __init__(self, model: TwinDiT, trainer: L.Trainer) -> None:
        self.model, self.precision = model, trainer.precision_plugin

    def __call__(
        self, video: torch.Tensor, audio: torch.Tensor, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with self.precision.forward_context():
            # Noise levels and gates stay exact; the twin casts what it makes of them.
            v, a = self.model(
                self.precision.convert_input(video), self.precision.convert_input(audio), *args, **options
            )
        return v.float(), a.float()

    def encode_text(self, video: list[torch.Tensor], audio: list[torch.Tensor]) -> Any:
        """Prompts as the twin's blocks want them."""
        with self.precision.forward_context():
            return self.model.encode_text(
                [self.precision.convert_input(t) for t in video], [self.precision.convert_input(t) for t in audio]
            )


def _any_process(why: str | None) -> str | None:
    """The first reason that any process gives; all must ask."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return why
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, why)
    return next((f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason), None)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["Consumer", "JointEvalCallback", "ValidationClip", "append_record", "tensorboard"]
