"""Latent shards to a Lightning Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import cached_property
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from ovi.codecs.bundle import Codecs
from ovi.data.batch import LatentBatch
from ovi.data.index import LatentShapes, ShardIndex
from ovi.data.reading.buckets import batch_sizes
from ovi.data.reading.loader import LatentLoader, RankBatches, SkippedSamples, warm_up
from ovi.data.reading.mixture import load_mixture
from ovi.data.reading.order import Stream
from ovi.data.reading.plan import Position, ReadingPlan, shapes_to_buckets
from ovi.data.reading.remote import ShardCache, default_cache
from ovi.data.shards import LatentShards
from ovi.errors import OviError
from ovi.layout import LatentLayout


class ShardsDataModule(L.LightningDataModule):
    """Serves the latent shards of a folder as ``ovi encode`` writes them, or a mixture of several, here or elsewhere.

    Every epoch holds every sample once, in an order that follows from the seed and the epoch alone: not from the
    number of loading processes, and from the number of ranks only in who reads what. All samples of a batch have one
    shape; what remains of a shape when its whole batches are made is left out of that epoch (another remainder each
    time), unless it fills not even one batch. Ranks make equally many steps: up to one batch fewer than there are ranks
    is left out. Validation leaves nothing out.

    A checkpoint keeps the position. A run continued from it goes on with the very next batch: on any number of loading
    processes; on another number of ranks, too, where the batches done divide by it, else up to that many batches come a
    second time. Where the data or what forms the batches has changed, the epoch begins anew, with a warning.

    Args:
        path: folder with an ``index.json``, or its URL (``s3://``, ``file://`` and whatever fsspec has).
        sets: instead of ``path``, several: a list of folders, or ``{name: {path, weight}}``. With weights, a set gives
            that share of every epoch's samples, and all of its samples come equally often over the epochs.
        batch_size: the most samples per rank and step; None leaves it to ``token_budget``.
        val_batch_size: the same in validation; None takes ``batch_size``.
        token_budget: the most latent positions per rank and step, video and audio together, before patching.
        num_workers: loading processes per rank; 0 loads in the training process.
        shuffle_buffer: samples, in whole shards, that are shuffled among themselves.
        resampled: draw shards with replacement instead of each sample once an epoch.
        samples_per_epoch: drawn from all sets together; None takes as many as there are.
        strict: stop at a damaged sample or shard, instead of leaving it out, counting it and naming it in a warning.
        cache_dir: where shards from elsewhere are copied to; None is ``.cache/ovi`` in the home folder.
        cache_gb: the most that these copies take, in units of 10^9 bytes.
        codec_paths: where the codecs' weights lie on this machine, ``{video, audio, text}``; what is absent or None is
            where it lay when the set was encoded. Only validation that decodes needs them.
        seed: of the order.

    Raises:
        OviError: when a folder holds no whole set of shards, sets do not agree, or a number makes no sense.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        sets: Mapping[str, Any] | Sequence[str] | None = None,
        batch_size: int | None = 8,
        val_batch_size: int | None = None,
        token_budget: int | None = None,
        num_workers: int = 0,
        shuffle_buffer: int = 1024,
        resampled: bool = False,
        samples_per_epoch: int | None = None,
        strict: bool = False,
        cache_dir: str | None = None,
        cache_gb: float = 100.0,
        codec_paths: Mapping[str, str | None] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {"batch_size": batch_size, "val_batch_size": val_batch_size, "token_budget": token_budget}
        counts |= {"samples_per_epoch": samples_per_epoch, "shuffle_buffer": shuffle_buffer}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise OviError(f"data.{name} must be at least 1, got {count}")
        if num_workers < 0 or cache_gb <= 0:
            raise OviError(f"data.num_workers from 0, data.cache_gb above 0; got {num_workers}, {cache_gb}")
        self.mixture = load_mixture(path, sets, strict=strict)
        self.index = self.mixture.first
        self.batch_size, self.val_batch_size, self.token_budget = batch_size, val_batch_size, token_budget
        self.num_workers, self.shuffle_buffer, self.seed = num_workers, shuffle_buffer, seed
        self.resampled, self.samples_per_epoch, self.strict = resampled, samples_per_epoch, strict
        self.cache_dir, self.cache_gb, self.codec_paths = cache_dir, cache_gb, codec_paths
        self.skipped = SkippedSamples()
        # Where the current iteration began, and the trainer's count of steps then; None before the first one.
        self._began = Position()
        self._before: int | None = None
        if num_workers:
            warm_up()

    @cached_property
    def codecs(self) -> Codecs:
        """The codecs that encoded the set, to decode with; no text encoder is built, prompts are embedded already."""
        return self.index.codecs(self.codec_paths, text=False)

    @cached_property
    def layout(self) -> LatentLayout:
        """What the latents look like to a network."""
        return self.index.layout(self.codec_paths)

    @property
    def has_validation(self) -> bool:
        """Whether the set has samples to validate on."""
        return bool(self._indexes("val"))

    def dataset(self, split: str) -> LatentShards:
        """The samples of a split of all sets."""
        cache = ShardCache(self.cache_dir or default_cache(), int(self.cache_gb * 1e9))
        indexes = self._indexes(split) or [self.index]  # which then says that it has none
        return LatentShards(indexes, split, strict=self.strict, cache=cache)

    @cached_property
    def train_plan(self) -> ReadingPlan:
        """The batches of every training epoch."""
        plan, sizes = self._plan("train", shuffle=True), self.batch_size
        weights = self.mixture.weights
        if weights is not None and len(plan.streams) < len(weights):
            empty = [name for name, index in self.mixture.indexes.items() if not index.num_samples("train")]
            raise OviError(f"data.sets: {', '.join(empty)} has a weight but no training sample")
        made = self._batch_sizes("train", sizes, self.token_budget)
        return replace(plan, batch_sizes=made, weights=weights, num_samples=self.samples_per_epoch)

    @property
    def num_train_batches(self) -> int:
        """Batches of each rank in a training epoch."""
        return self.train_plan.num_batches(self._ranks()[1])

    @cached_property
    def val_plan(self) -> ReadingPlan:
        """The batches of validation: the same every time."""
        made = self._batch_sizes("val", self.val_batch_size or self.batch_size, self.token_budget)
        return replace(self._plan("val", shuffle=False), batch_sizes=made, train=False)

    def setup(self, stage: str) -> None:
        # A checkpoint's state comes after this; that of an earlier fit does not count.
        self._began, self._before = Position(), None

    def train_dataloader(self) -> DataLoader[Any]:
        rank, world_size = self._ranks()
        batches = RankBatches(self.train_plan, rank=rank, world_size=world_size, position=self._begin)
        # Its length is not the trainer's to know: it would end a continued epoch by its own count.
        return self._loader("train", batches, sized=False)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if not self.has_validation:
            rank_zero_warn(
                f"{self.index.folder} has no validation samples: no validation, no generated clips. "
                "Encode more files, or set val_fraction"
            )
            return []
        rank, world_size = self._ranks()
        batches = RankBatches(self.val_plan, rank=rank, world_size=world_size, position=Position)
        return self._loader("val", batches)

    @cached_property
    def validation_numbers(self) -> list[int]:
        """Numbers, in the validation set, of the samples that have the first whole one's shape, in their stored order:
        what clips are generated from. Samples of sound or pictures alone are passed over."""
        shapes = [shard.shapes for shard in self._validation.shards for _ in range(shard.num_samples)]
        whole = next((shape for shape in shapes if shape.whole), None)
        return [number for number, shape in enumerate(shapes) if whole is not None and shape == whole]

    @cached_property
    def _validation(self) -> LatentShards:
        return self.dataset("val")

    def validation_sample(self, place: int) -> LatentBatch:
        """One of ``validation_numbers`` by its place among them, as a batch of one in float32; the same on every rank.

        Raises:
            OviError: when it is damaged.
        """
        sample = self._validation[self.validation_numbers[place]]
        about = dict(sample.about)
        caption = str(about.pop("caption", ""))
        one = LatentBatch(sample.video[None], sample.audio[None], [sample.text], [caption], [sample.key], [about])
        return one.to("cpu")

    def first_validation_samples(self, count: int) -> list[LatentBatch]:
        """The first that can be read of ``validation_numbers``."""
        batches: list[LatentBatch] = []
        for place in range(len(self.validation_numbers)):
            if len(batches) == count:
                break
            try:
                batches.append(self.validation_sample(place))
            except OviError:
                if self.strict:
                    raise
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Where reading is, for a checkpoint."""
        return {**asdict(self._where()), "plan": self.train_plan.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the state was taken."""
        where = Position(**{f.name: state_dict[f.name] for f in fields(Position)})
        if state_dict["plan"] != self.train_plan.fingerprint:
            rank_zero_warn(
                f"the data, or what forms its batches (batch_size, token_budget, shuffle_buffer, weights, seed), is "
                f"not what the checkpoint was made with: epoch {where.epoch} begins anew"
            )
            where = replace(where, batch=0)
        self._began, self._before = where, None

    @property
    def shapes(self) -> list[LatentShapes]:
        """The different shapes of all samples, of training and validation."""
        shards = (
            shard for split in ("train", "val") for index in self._indexes(split) for shard in index.shards(split)
        )
        return list(dict.fromkeys(shard.shapes for shard in shards))

    def _indexes(self, split: str) -> list[ShardIndex]:
        return [index for index in self.mixture.indexes.values() if index.num_samples(split)]

    def _plan(self, split: str, *, shuffle: bool) -> ReadingPlan:
        indexes = self._indexes(split) or [self.index]
        buckets, _ = shapes_to_buckets([[shard.shapes for shard in index.shards(split)] for index in indexes])
        streams = tuple(
            Stream(
                tuple(shard.num_samples for shard in index.shards(split)),
                seed=self.seed,
                window=self.shuffle_buffer,
                shuffle=shuffle,
                replace=shuffle and self.resampled,
                name=number,
            )
            for number, index in enumerate(indexes)
        )
        return ReadingPlan(streams, buckets, ())

    def _batch_sizes(self, split: str, batch_size: int | None, token_budget: int | None) -> tuple[int, ...]:
        _, shapes = shapes_to_buckets(
            [[shard.shapes for shard in index.shards(split)] for index in self._indexes(split) or [self.index]]
        )
        tokens = [kind.num_positions for kind in shapes]
        return tuple(batch_sizes(tokens, batch_size=batch_size, token_budget=token_budget))

    def _ranks(self) -> tuple[int, int]:
        trainer: Any = self.trainer
        if trainer is None:
            return 0, 1
        if trainer.world_size > 1 and getattr(trainer._accelerator_connector, "use_distributed_sampler", False):
            raise OviError(
                "the data module shares samples among ranks itself: set trainer.use_distributed_sampler=false"
            )
        return trainer.global_rank, trainer.world_size

    def _loader(self, split: str, batches: RankBatches, *, sized: bool = True) -> LatentLoader:
        trainer: Any = self.trainer
        return LatentLoader(
            self.dataset(split),
            batches,
            num_workers=self.num_workers,
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
            skipped=self.skipped,
            sized=sized,
        )

    # The trainer's own numbers of epochs and batches are no guide: how they go on after a checkpoint depends on the
    # moment it was saved at. The count of all steps ever made only grows, and by one a batch.

    def _where(self) -> Position:
        """The first batch that no step was made on."""
        began = self._began.on(self._ranks()[1])
        done = began.batch + (0 if self._before is None else self._num_steps() - self._before)
        if done < self.train_plan.num_batches(began.world_size):
            return replace(began, batch=done)
        return replace(began, epoch=began.epoch + 1, batch=0)

    def _begin(self) -> Position:
        """Where the iteration that begins now starts."""
        self._began, self._before = self._where(), self._num_steps()
        return self._began

    def _num_steps(self) -> int:
        trainer: Any = self.trainer
        return 0 if trainer is None else int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)
