"""Flow matching of a twin as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ovi.data.batch import LatentBatch
from ovi.flow import Timesteps, joint_errors, uniform
from ovi.guidance import no_text
from ovi.twin import TwinDiT

OptimizerFactory = Callable[[Iterable[torch.nn.Parameter]], Optimizer]
ScheduleFactory = Callable[..., LRScheduler]


class TwinModule(L.LightningModule):
    """Trains a twin on latent batches.

    Noise, noise levels and dropped prompts are drawn from (seed, epoch, batch, rank) alone: two runs with the same seed
    see the same draws whatever their model, and a resumed run continues with the very draws it would have made.

    Args:
        model: the twin.
        optimizer: builds the optimizer from the trainable parameters.
        schedule: builds the learning rate schedule, called with the optimizer and ``num_training_steps``; None is flat.
        timesteps: draws noise levels, shared by both modalities.
        video_weight: of the video loss (published: 0.85).
        audio_weight: of the audio loss (published: 0.15).
        text_dropout: share of samples trained without text, for classifier-free guidance.
        seed: of all draws.
        record: plain data kept in every checkpoint under ``ovi``, enough to build the model and codecs again.
    """

    def __init__(
        self,
        model: TwinDiT,
        *,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        timesteps: Timesteps = uniform,
        video_weight: float = 0.85,
        audio_weight: float = 0.15,
        text_dropout: float = 0.1,
        seed: int = 0,
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer, self.schedule, self.timesteps = optimizer, schedule, timesteps
        self.video_weight, self.audio_weight = video_weight, audio_weight
        self.text_dropout, self.seed, self.record = text_dropout, seed, record

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        draws = self._draws(1, self.current_epoch, batch_idx)
        video, audio = self._errors(batch, draws, drop_text=True)
        return self._log("train", video.mean(), audio.mean(), len(batch))

    def validation_step(self, batch: LatentBatch, batch_idx: int) -> None:
        video, audio = self._errors(batch, self._draws(2, 0, batch_idx), drop_text=False)
        self._log("val", video.mean(), audio.mean(), len(batch))

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.model.parameters() if p.requires_grad])
        if self.schedule is None:
            return optimizer
        schedule = self.schedule(optimizer, num_training_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.record is not None:
            checkpoint["ovi"] = self.record

    def _errors(self, batch: LatentBatch, draws: torch.Generator, *, drop_text: bool) -> tuple[Tensor, Tensor]:
        size = len(batch)
        # Drawn on the host, so that a run repeats on any device.
        sigma = self.timesteps(size, draws).to(batch.video.device)
        dropped = torch.rand(size, generator=draws) < (self.text_dropout if drop_text else 0.0)
        text = [no_text(t) if drop else t for t, drop in zip(batch.text, dropped.tolist())]
        noise = torch.Generator(batch.video.device).manual_seed(int(torch.randint(2**62, (), generator=draws)))

        def network(video: Tensor, audio: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            return self.model(video, audio, sigma, text, text)

        return joint_errors(network, batch.video, batch.audio, sigma, generator=noise)

    def _log(self, stage: str, video: Tensor, audio: Tensor, batch_size: int) -> Tensor:
        loss = self.video_weight * video + self.audio_weight * audio
        values = {f"{stage}/loss": loss, f"{stage}/loss_video": video, f"{stage}/loss_audio": audio}
        self.log_dict(values, batch_size=batch_size, sync_dist=stage == "val", prog_bar=True)
        return loss

    def _draws(self, stage: int, epoch: int, batch_idx: int) -> torch.Generator:
        """A host generator that depends on nothing but its arguments, the seed and the rank."""
        state = 0
        for part in (self.seed, stage, epoch, batch_idx, self.global_rank):
            state = (state * 1_000_003 + part + 1) % (2**63)
        return torch.Generator().manual_seed(state)
