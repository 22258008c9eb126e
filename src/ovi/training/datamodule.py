"""Latent shards to a Lightning Trainer."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from ovi.codecs.bundle import Codecs
from ovi.data.batch import LatentBatch
from ovi.data.index import ShardIndex
from ovi.data.shards import LatentDataset, collate
from ovi.errors import OviError
from ovi.layout import LatentLayout


class ShardsDataModule(L.LightningDataModule):
    """Serves the latent shards of one folder, as ``ovi encode`` writes them.

    The order of samples in an epoch depends on the seed, the epoch and the number of loading processes alone. The
    Trainer must ask for a new loader every epoch (``reload_dataloaders_every_n_epochs=1``), so that each has its own.

    Args:
        path: folder with an ``index.json``.
        batch_size: samples per rank and step.
        val_batch_size: samples per rank and validation step; None takes ``batch_size``.
        num_workers: loading processes per rank; 0 loads in the training process.
        shuffle_buffer: samples held to shuffle from.
        seed: of the order.

    Raises:
        OviError: when the folder holds no whole set of shards, or a count is below 1.
    """

    def __init__(
        self,
        *,
        path: str,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        shuffle_buffer: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or (val_batch_size is not None and val_batch_size < 1):
            raise OviError(
                f"data.batch_size and data.val_batch_size must be at least 1, got {batch_size}, {val_batch_size}"
            )
        self.index = ShardIndex.load(path)
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.num_workers, self.shuffle_buffer, self.seed = num_workers, shuffle_buffer, seed

    @cached_property
    def codecs(self) -> Codecs:
        """The codecs that encoded the set."""
        return self.index.codecs()

    @cached_property
    def layout(self) -> LatentLayout:
        """What the latents look like to a network."""
        shapes, text = self.index.latent_shapes, self.codecs.text
        return LatentLayout(shapes["video"][0], shapes["audio"][1], text.text_dim, text.text_len, self.index.clock)

    @property
    def has_validation(self) -> bool:
        """Whether the set has samples to validate on."""
        return self.index.num_samples("val") > 0

    def train_dataloader(self) -> DataLoader[Any]:
        trainer: Any = self.trainer
        if trainer is not None and not trainer.reload_dataloaders_every_n_epochs and trainer.max_epochs != 1:
            raise OviError(
                "every epoch would repeat the first one's order: set trainer.reload_dataloaders_every_n_epochs=1"
            )
        world_size = trainer.world_size if trainer is not None else 1
        dataset = LatentDataset(
            self.index,
            "train",
            shuffle=True,
            seed=self.seed,
            epoch=trainer.current_epoch if trainer is not None else 0,
            buffer=self.shuffle_buffer,
            even=world_size > 1,
            rank=trainer.global_rank if trainer is not None else 0,
            world_size=world_size,
        )
        # Whole batches only, unless the set is too small to fill one.
        drop_last = dataset.num_batches(self.batch_size, num_workers=self.num_workers, drop_last=True) > 0
        return self._loader(dataset, self.batch_size, drop_last=drop_last)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if not self.has_validation:
            rank_zero_warn(
                f"{self.index.folder} has no validation samples: no validation, no generated clips. "
                "Encode more files, or set val_fraction"
            )
            return []
        rank = self.trainer.global_rank if self.trainer is not None else 0
        world_size = self.trainer.world_size if self.trainer is not None else 1
        dataset = LatentDataset(self.index, "val", shuffle=False, even=world_size > 1, rank=rank, world_size=world_size)
        return self._loader(dataset, self.val_batch_size, drop_last=False)

    def first_validation_samples(self, count: int) -> list[LatentBatch]:
        """The first samples of the validation set in their stored order, as batches of one; the same on every rank."""
        dataset = LatentDataset(self.index, "val", shuffle=False, rank=0, world_size=1)
        return [collate([sample]) for sample, _ in zip(dataset, range(count))]

    def _loader(self, dataset: LatentDataset, batch_size: int, *, drop_last: bool) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=batch_size,
            num_workers=self.num_workers,
            collate_fn=collate,
            drop_last=drop_last,
            multiprocessing_context="spawn" if self.num_workers else None,
        )
