"""Flow matching of a twin as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ovi.data.batch import LatentBatch
from ovi.errors import OviError
from ovi.flow import Density, NoiseLevels, Sigma, Timesteps, joint_errors, shared, uniform, weighted_mean
from ovi.guidance import no_text
from ovi.training.freezing import freeze
from ovi.twin import TwinDiT

OptimizerFactory = Callable[[Iterable[torch.nn.Parameter]], Optimizer]
ScheduleFactory = Callable[..., LRScheduler]


class TwinModule(L.LightningModule):
    """Trains a twin on latent batches.

    Noise, noise levels and dropped prompts are drawn from (seed, batches so far, rank) alone: two runs with the same
    seed see the same draws whatever their model, and a resumed run continues with the very draws it would have made.

    A batch of one modality trains that modality's tower: the other's place is held by a single token that nothing of
    crosses from, and its loss counts nothing.

    Validation draws one noise level for both modalities, as sampling has it, whatever the timesteps of training, and
    drops nothing: its losses compare runs that differ in these.

    Args:
        model: the twin.
        optimizer: builds the optimizer from the trainable parameters.
        schedule: builds the learning rate schedule, called with the optimizer and ``num_training_steps``; None is flat.
        density: how likely each noise level is.
        timesteps: how the noise levels of both modalities go together, and which losses count.
        video_weight: of the video loss (published: 0.85).
        audio_weight: of the audio loss (published: 0.15).
        text_dropout: share of samples trained without text, for classifier-free guidance.
        exchange_dropout: share of samples trained with both gates of the exchange at 0, for guidance away from that.
        frozen: parts of the model that are not trained, as ``freeze`` takes them.
        seed: of all draws.
        record: plain data kept in every checkpoint under ``ovi``, enough to build the model and codecs again.

    Raises:
        OviError: for a dropout that is no share, knobs of density and timesteps that make no sense, or a frozen part
            that is nowhere.
    """

    def __init__(
        self,
        model: TwinDiT,
        *,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        density: Density = uniform,
        timesteps: Timesteps = shared,
        video_weight: float = 0.85,
        audio_weight: float = 0.15,
        text_dropout: float = 0.1,
        exchange_dropout: float = 0.0,
        frozen: Sequence[str] = (),
        seed: int = 0,
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, share in (("text_dropout", text_dropout), ("exchange_dropout", exchange_dropout)):
            if not 0 <= share <= 1:
                raise OviError(f"flow.{name} is a share of samples, 0 to 1, got {share}")
        timesteps(1, torch.Generator(), density, (1, 1))  # knobs that make no sense show now, not in the first step
        freeze(model, frozen)
        self.model = model
        self.optimizer, self.schedule = optimizer, schedule
        self.density, self.timesteps = density, timesteps
        self.video_weight, self.audio_weight = video_weight, audio_weight
        self.text_dropout, self.exchange_dropout = text_dropout, exchange_dropout
        self.seed, self.record = seed, record

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        draws = self._draws(1, self._batches_so_far(batch_idx))
        batch, levels, options = self._prepared(batch, self.timesteps, draws)
        options |= {"text_dropout": self.text_dropout, "exchange_dropout": self.exchange_dropout}
        errors = self._errors(batch, levels, draws, **options)
        if batch.skipped:
            self.log("train/skipped_samples", float(len(batch.skipped)), on_step=True, reduce_fx="sum")
        return self._log("train", errors, levels)

    def validation_step(self, batch: LatentBatch, batch_idx: int) -> dict[str, Any]:
        """Log the losses; returns what they are made of, ``errors`` of (video, audio) [B] and ``levels``."""
        draws = self._draws(2, batch_idx)
        batch, levels, options = self._prepared(batch, shared, draws)
        errors = self._errors(batch, levels, draws, **options)
        self._log("val", errors, levels)
        return {"errors": errors, "levels": levels}

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.model.parameters() if p.requires_grad])
        if self.schedule is None:
            return optimizer
        schedule = self.schedule(optimizer, num_training_steps=self._num_training_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _num_training_steps(self) -> int:
        """Optimizer steps of the whole run. The train loader has no length, so Lightning cannot count an epoch's.

        Raises:
            OviError: when neither the trainer's steps nor its epochs say when a run ends.
        """
        trainer: Any = self.trainer
        steps, batches = trainer.max_steps, getattr(trainer.datamodule, "num_train_batches", None)
        if batches is None:
            steps = trainer.estimated_stepping_batches
        elif trainer.max_epochs is not None and trainer.max_epochs > 0:
            if isinstance(trainer.limit_train_batches, int):
                batches = min(batches, trainer.limit_train_batches)
            of_epochs = math.ceil(batches / trainer.accumulate_grad_batches) * trainer.max_epochs
            steps = min(steps, of_epochs) if steps > 0 else of_epochs
        if not 0 < steps < math.inf:
            raise OviError(
                f"optim.schedule must know how many steps the run takes, and with trainer.max_steps="
                f"{trainer.max_steps} and trainer.max_epochs={trainer.max_epochs} it has no end: set trainer.max_steps"
            )
        return int(steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.record is not None:
            checkpoint["ovi"] = self.record

    def _prepared(
        self, batch: LatentBatch, timesteps: Timesteps, draws: torch.Generator
    ) -> tuple[LatentBatch, NoiseLevels, dict[str, Any]]:
        """A batch of both modalities with its noise levels; where one is missing, with a token in its place."""
        has_video, has_audio = batch.has_video, batch.has_audio
        alone = not (has_video and has_audio)
        if not has_video:
            batch = replace(batch, video=batch.video.new_zeros(*batch.video.shape[:2], *self._video_patch))
        if not has_audio:
            batch = replace(batch, audio=batch.audio.new_zeros(len(batch), 1, batch.audio.shape[2]))
        # What is alone cannot be conditioned on the other.
        chosen = shared if alone else timesteps
        levels = chosen(len(batch), draws, self.density, self._num_tokens(batch))
        if alone:
            nothing = torch.zeros_like(levels.video_weight)
            levels = replace(levels, **{"audio_weight" if has_video else "video_weight": nothing})
        return batch, levels, {"alone": alone}

    @property
    def _video_patch(self) -> tuple[int, int, int]:
        size: tuple[int, int, int] = self.model.video.patch_embedding.size  # type: ignore[union-attr, assignment]
        return size

    def _errors(
        self,
        batch: LatentBatch,
        levels: NoiseLevels,
        draws: torch.Generator,
        *,
        text_dropout: float = 0.0,
        exchange_dropout: float = 0.0,
        alone: bool = False,
    ) -> tuple[Tensor, Tensor]:
        size, device = len(batch), batch.video.device
        # Drawn on the host, so that a run repeats on any device.
        dropped = torch.rand(size, generator=draws) < text_dropout
        text = [no_text(t) if drop else t for t, drop in zip(batch.text, dropped.tolist())]
        noise = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=draws)))
        options: dict[str, Any] = {}
        if exchange_dropout:
            gate = (torch.rand(size, generator=draws) >= exchange_dropout).float().to(device)
            options = {"a2v": gate, "v2a": gate}
        if alone:
            options = {"a2v": 0.0, "v2a": 0.0}
        if batch.audio_mask is not None:
            options["audio_mask"] = batch.audio_mask

        # Weights in low precision ("bf16-true") want their inputs so; the flow itself is computed in float32.
        dtype = next(self.model.parameters()).dtype
        text = [t.to(dtype) for t in text]

        def network(video: Tensor, audio: Tensor, sigma: Sigma) -> tuple[Tensor, Tensor]:
            v, a = self.model(video.to(dtype), audio.to(dtype), sigma, text, text, **options)
            return v.float(), a.float()

        sigma = levels.video.to(device), levels.audio.to(device)
        return joint_errors(network, batch.video, batch.audio, sigma, generator=noise, audio_mask=batch.audio_mask)

    def _num_tokens(self, batch: LatentBatch) -> tuple[int, int]:
        video, audio = self.model.video.patch_embedding, self.model.audio.patch_embedding
        return math.prod(video.grid(batch.video)), math.prod(audio.grid(batch.audio))

    def _log(self, stage: str, errors: tuple[Tensor, Tensor], levels: NoiseLevels) -> Tensor:
        weights = levels.video_weight, levels.audio_weight
        video, audio = (weighted_mean(e, w.to(e.device)) for e, w in zip(errors, weights))
        loss = self.video_weight * video + self.audio_weight * audio
        size, validating = len(weights[0]), stage == "val"
        logged = [("loss", loss, size)]
        # A modality that no sample of the batch is trained on has no loss to show; its 0 would pass for a good one.
        # Ranks reduce their values of an epoch in the order they were logged in: in validation every batch logs all,
        # what is missing with no weight, and the mean is NaN where no batch had any.
        for name, value, weight in (("loss_video", video, weights[0]), ("loss_audio", audio, weights[1])):
            if validating or weight.any():
                logged.append((name, value, size if weight.any() else 0))
        for name, value, counted in logged:
            # Lightning averages the ranks' sums of batch sizes: whole numbers would be cut to whole numbers there.
            weight_of_batch: Any = float(counted)
            self.log_dict({f"{stage}/{name}": value}, batch_size=weight_of_batch, sync_dist=validating, prog_bar=True)
        return loss

    def _batches_so_far(self, batch_idx: int) -> int:
        """Training batches before this one; Lightning's own numbers depend on where a checkpoint was written."""
        if self._trainer is None:
            return batch_idx
        return int(self.trainer.fit_loop.epoch_loop.total_batch_idx)

    def _draws(self, stage: int, batch_idx: int) -> torch.Generator:
        """A host generator that depends on nothing but its arguments, the seed and the rank."""
        state = 0
        for part in (self.seed, stage, batch_idx, self.global_rank):
            state = (state * 1_000_003 + part + 1) % (2**63)
        return torch.Generator().manual_seed(state)
