"""Batches handed over: their memory is used again when nobody holds them, and never before."""

import gc
import pickle
import struct
import tarfile
import warnings
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch.multiprocessing  # teaches ForkingPickler tensors

from latent_sets import write_set
from ovi.data.reading.blocks import BlockPool, _arrived
from ovi.data.reading.loader import LatentLoader, RankBatches
from ovi.data.reading.order import Stream
from ovi.data.reading.plan import ReadingPlan
from ovi.data.shards import LatentShards
from ovi.errors import OviError


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"), {"train": [10] * 4, "val": []})


def loader_for(index, workers):
    stream = Stream(tuple(shard.num_samples for shard in index.shards("train")), window=20)
    plan = ReadingPlan((stream,), ((0,) * 4,), (2,))
    return LatentLoader(LatentShards(index, "train"), RankBatches(plan), num_workers=workers)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_numbers_are_looked_at_once_and_damaged_ones_left_out_in_every_epoch(tmp_path, workers):
    index = write_set(tmp_path, {"train": [10] * 4, "val": []})
    shard, nan = Path(index.shards("train")[1].location), struct.pack("<e", float("nan"))

    def poison(key):
        content = bytearray(shard.read_bytes())
        with tarfile.open(shard) as tar:
            member = tar.getmember(f"{key}.safetensors")
        end = member.offset_data + member.size
        content[end - 2 : end] = nan
        shard.write_bytes(content)

    poison("clip-0013")
    loader = loader_for(index, workers)
    everything = {f"clip-{n:04d}" for n in range(40)}
    for _ in range(3):
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            batches = list(loader)
        assert {key for batch in batches for key in batch.keys} == everything - {"clip-0013"}
        assert [skip.key for batch in batches for skip in batch.skipped] == ["clip-0013"]
    poison("clip-0017")  # in place, after it was looked at by one of the processes
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        assert {key for batch in loader for key in batch.keys} == everything - {"clip-0013"}
        loader.latents.look_again()
        assert {key for batch in loader for key in batch.keys} == everything - {"clip-0013", "clip-0017"}


def right(batch):
    numbers = torch.tensor([float(key[5:]) for key in batch.keys])
    video, audio = batch.video.float(), batch.audio.float()
    return (
        torch.equal(video, numbers.view(-1, 1, 1, 1, 1).expand_as(video))
        and torch.equal(audio, -numbers.view(-1, 1, 1).expand_as(audio))
        and all((text == number).all() for text, number in zip(batch.text, numbers))
    )


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_that_are_kept_keep_what_they_hold(index, workers):
    loader = loader_for(index, workers)
    kept = [batch for _ in range(3) for batch in loader]
    assert len(kept) == 60
    assert all(map(right, kept))
    texts = [batch.text[1] for batch in kept]  # one view is enough
    keys = [float(batch.keys[1][5:]) for batch in kept]
    del kept
    gc.collect()
    for _ in range(2):
        assert all(right(batch) for batch in loader)
    assert [float(text[0, 0]) for text in texts] == keys
    del loader
    gc.collect()
    assert [float(text[0, 0]) for text in texts] == keys


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_the_order_is_the_same_on_any_number_of_workers(index, workers):
    alone, loader = loader_for(index, 0), loader_for(index, workers)
    for _ in range(2):
        assert [batch.keys for batch in loader] == [batch.keys for batch in alone]


def test_a_block_is_used_again_only_when_nothing_refers_to_it():
    pool = BlockPool()
    first = pool.take(1000).leased()
    view = first[10:20].view(2, 5)
    second = pool.take(1000).leased()
    assert first.data_ptr() != second.data_ptr()
    place = first.data_ptr()
    del first
    third = pool.take(1000).leased()
    assert third.data_ptr() not in (place, second.data_ptr())
    in_all = pool.num_bytes
    del view
    assert pool.take(900).leased().data_ptr() == place
    assert pool.num_bytes == in_all
    del second, third
    for size in (10, 1000, 5000):
        pool.take(size).leased()
    before = pool.num_bytes
    for _ in range(100):
        pool.take(1000).leased()
    assert pool.num_bytes == before


def test_memory_does_not_grow_with_sizes_that_vary():
    pool = BlockPool()
    for n in range(200):
        pool.take(10_000_000 if n % 7 else 40_000_000 - 1000 * n).leased()
    assert pool.num_bytes < 100_000_000


def test_a_plan_without_positions_goes_on_epoch_after_epoch(index):
    loader = loader_for(index, 0)
    epochs = [[key for batch in loader for key in batch.keys] for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(sorted(epoch) == [f"clip-{n:04d}" for n in range(40)] for epoch in epochs)
    assert len(loader) == 20


@pytest.mark.parametrize("owner", [None, "loader"])
def test_damaged_samples_take_no_memory(tmp_path, owner):
    """A batch whose samples all are damaged asks for others, one after the other; none of that is kept."""
    index = write_set(tmp_path, {"train": [12], "val": []}, damaged=range(1, 11))
    samples, pool = LatentShards(index, "train"), BlockPool(owner)
    for _ in range(3):
        for number in range(12):
            batch = samples.read_batch([number], pool)
            assert batch.keys == ["clip-0000" if number == 0 else "clip-0011"]
            assert len(batch.skipped) == (0 < number < 11)
            if owner is not None:
                batch.block.give_back()  # what the other process does when it is done
            del batch
    strict = LatentShards(index, "train", strict=True)
    for _ in range(3):
        with pytest.raises(OviError, match="clip-0001 is damaged: video has numbers that are not finite"):
            strict.read_batch([0, 1], pool)
    assert not pool.in_use.any()
    assert pool.num_bytes <= 2 * 65536


def test_more_batches_than_a_pool_tells_apart_can_be_kept(monkeypatch):
    monkeypatch.setattr("ovi.data.reading.blocks._MOST", 3)
    pool = BlockPool()
    kept = []
    for number in range(8):
        block = pool.take(100)
        block.bytes.fill_(number)
        kept.append(block.leased())
    assert [int(one[0]) for one in kept] == list(range(8))
    sent = BlockPool("loader")
    arrived = [pickle.loads(ForkingPickler.dumps(sent.take(100))) for _ in range(5)]
    assert len({one.data_ptr() for one in arrived}) == 5
    del kept, arrived
    assert not pool.in_use.any()
    assert not sent.in_use.any()


@pytest.mark.slow
def test_processes_that_are_started_anew_use_their_blocks_again(index):
    """As when Lightning resets a loader that is used for a second fit."""
    loader = loader_for(index, 1)
    counts = []
    for _ in range(4):
        assert all(right(batch) for batch in loader)
        assert all(right(batch) for batch in loader)
        counts.append(sum(len(shared.blocks) for shared in _arrived[loader.dataset.owner].values()))
        loader._iterator._shutdown_workers()
        loader._iterator = None
    assert max(counts) <= 6
