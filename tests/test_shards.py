"""Reading shards: every sample exactly once over ranks and workers, and damage named."""

import json
import pickle
import tarfile
from collections import Counter
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch.utils.data import DataLoader

from ovi.codecs import Codecs
from ovi.data.index import FORMAT, VERSION, Shard
from ovi.data.shards import LatentDataset, ShardIndex, collate, share
from ovi.errors import OviError

VIDEO, AUDIO = (12, 8, 2, 2), (31, 64)


def sample(number: int) -> tuple[dict, dict]:
    """Tensors filled with the sample's number, and its json: what comes out can be told from its key."""
    tensors = {
        "video": torch.full(VIDEO, float(number), dtype=torch.float16),
        "audio": torch.full(AUDIO, -float(number), dtype=torch.float16),
        "text": torch.full((1 + number % 3, 64), float(number), dtype=torch.float16),
    }
    return tensors, {"caption": f"clip {number}", "file": f"{number}.mp4", "truth": {"count": number}}


def write_set(folder: Path, sizes: dict[str, list[int]]) -> ShardIndex:
    """A set written with tarfile alone; samples are numbered from 0 through train, then val."""
    folder.mkdir(exist_ok=True)
    splits, number = {}, 0
    for split, counts in sizes.items():
        shards = []
        for place, count in enumerate(counts):
            path = folder / f"{split}-{place:06d}.tar"
            with tarfile.open(path, "w") as tar:
                for _ in range(count):
                    tensors, about = sample(number)
                    for suffix, content in (("json", json.dumps(about).encode()), ("safetensors", save(tensors))):
                        entry = tarfile.TarInfo(f"clip-{number:04d}.{suffix}")
                        entry.size = len(content)
                        tar.addfile(entry, BytesIO(content))
                    number += 1
            shards.append({"file": path.name, "num_samples": count, "num_bytes": path.stat().st_size, "sha256": "?"})
        splits[split] = {"num_samples": sum(counts), "shards": shards}
    specs = {"video": {"name": "dct"}, "audio": {"name": "logmel"}, "text": {"name": "hashed"}}
    codecs = Codecs.build(specs, fps=8)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "clock": codecs.clock.to_dict(),
        "codecs": codecs.to_dict(),
        "num_frames": 8,
        "height": 16,
        "width": 16,
        "latent_shapes": codecs.latent_shapes(8, 16, 16),
        "dtype": "float16",
        "splits": splits,
    }
    (folder / "index.json").write_text(json.dumps(content))
    return ShardIndex.load(folder)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ShardIndex:
    return write_set(tmp_path_factory.mktemp("set with a space: and a colon"), {"train": [5, 5, 5, 4], "val": [3]})


def rewrite(index: ShardIndex, folder: Path, change=lambda content: None) -> Path:
    """A copy of the index's folder with its index changed."""
    folder.mkdir()
    for file in index.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    content = json.loads((folder / "index.json").read_text())
    change(content)
    (folder / "index.json").write_text(json.dumps(content))
    return folder


# --- exactly once ----------------------------------------------------------------------------------------------------


def fake_dataset(sizes: list[int], **arguments) -> LatentDataset:
    shards = tuple(Shard(Path(f"{n}.tar"), size, 1, "") for n, size in enumerate(sizes))
    index = ShardIndex(Path(), None, 1, 1, 1, {}, {"train": shards}, {})
    return LatentDataset(index, "train", **arguments)


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    world_size=st.integers(1, 9),
    num_workers=st.integers(1, 5),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_runs_cover_every_sample_once_and_evenly(sizes, world_size, num_workers, shuffle, epoch):
    consumers = world_size * num_workers
    counts, seen = [], Counter()
    for rank in range(world_size):
        dataset = fake_dataset(sizes, shuffle=shuffle, epoch=epoch, rank=rank, world_size=world_size)
        for worker in range(num_workers):
            runs = dataset.runs(rank * num_workers + worker, consumers)
            seen.update((run.shard.path.name, at) for run in runs for at in range(run.start, run.stop))
            counts.append(sum(run.stop - run.start for run in runs))
            assert sum(run.stop - run.start < run.shard.num_samples for run in runs) <= 2
    assert seen == Counter((f"{n}.tar", at) for n, size in enumerate(sizes) for at in range(size))
    assert max(counts) - min(counts) <= 1


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    world_size=st.integers(1, 9),
    num_workers=st.integers(1, 5),
    batch_size=st.integers(1, 8),
)
def test_even_gives_every_rank_as_many_batches_and_drops_little(sizes, world_size, num_workers, batch_size):
    datasets = [
        fake_dataset(sizes, shuffle=True, even=True, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert len({d.num_batches(batch_size, num_workers=num_workers) for d in datasets}) == 1
    consumers = world_size * num_workers
    taken = [run for consumer in range(consumers) for run in datasets[0].runs(consumer, consumers)]
    places = Counter((run.shard.path.name, at) for run in taken for at in range(run.start, run.stop))
    assert set(places.values()) <= {1}
    assert sum(sizes) - len(places) == sum(sizes) % consumers


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 2), (3, 0), (3, 2)])
def test_loaders_of_all_ranks_read_every_sample_once(index, world_size, num_workers):
    keys = []
    for rank in range(world_size):
        dataset = LatentDataset(index, "train", shuffle=True, rank=rank, world_size=world_size)
        batches = list(DataLoader(dataset, batch_size=4, num_workers=num_workers, collate_fn=collate))
        assert len(batches) == dataset.num_batches(4, num_workers=num_workers)
        keys += [key for batch in batches for key in batch.keys]
    assert sorted(keys) == [f"clip-{n:04d}" for n in range(19)]


def test_more_consumers_than_samples_leave_none_out_and_none_twice(index):
    parts = [list(LatentDataset(index, "val", shuffle=False, rank=rank, world_size=8)) for rank in range(8)]
    assert sorted(s.key for part in parts for s in part) == ["clip-0019", "clip-0020", "clip-0021"]
    assert max(map(len, parts)) == 1


def test_share_of_shards_laid_end_to_end():
    shards = [Shard(Path(name), size, 1, "") for name, size in (("a", 3), ("b", 4), ("c", 2))]
    runs = [(run.shard.path.name, run.start, run.stop) for run in share(shards, 2, 8)]
    assert runs == [("a", 2, 3), ("b", 0, 4), ("c", 0, 1)]
    assert share(shards, 4, 4) == []


# --- order -----------------------------------------------------------------------------------------------------------


def keys_of(index: ShardIndex, **arguments) -> list[str]:
    return [s.key for s in LatentDataset(index, "train", **arguments)]


def test_unshuffled_is_the_order_written(index):
    assert keys_of(index, shuffle=False) == [f"clip-{n:04d}" for n in range(19)]


def test_shuffling_repeats_by_seed_and_epoch_and_differs_otherwise(index):
    first = keys_of(index, shuffle=True, seed=1, epoch=0)
    assert keys_of(index, shuffle=True, seed=1, epoch=0) == first
    dataset = LatentDataset(index, "train", shuffle=True, seed=1)
    dataset.set_epoch(1)
    orders = [first, [s.key for s in dataset], keys_of(index, shuffle=True, seed=2), keys_of(index, shuffle=False)]
    assert all(sorted(order) == sorted(first) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("buffer", [1, 3, 19, 100])
def test_any_buffer_gives_every_sample(index, buffer):
    assert sorted(keys_of(index, shuffle=True, buffer=buffer)) == [f"clip-{n:04d}" for n in range(19)]


def test_a_buffer_as_large_as_the_set_mixes_across_shards(tmp_path):
    index = write_set(tmp_path, {"train": [20] * 5, "val": []})
    places: Counter = Counter()
    for epoch in range(20):
        order = [int(s.key[5:]) for s in LatentDataset(index, "train", shuffle=True, epoch=epoch)]
        places.update(number // 20 for number in order[:20])
    # 400 draws over 5 shards: 80 each, and a fifth of that is four standard deviations.
    assert all(abs(count - 80) < 40 for count in places.values())
    assert len(places) == 5


# --- content ---------------------------------------------------------------------------------------------------------


def test_batches_hold_what_was_written(index):
    dataset = LatentDataset(index, "train", shuffle=True)
    for batch in DataLoader(dataset, batch_size=4, collate_fn=collate):
        assert len(batch) == len(batch.keys)
        for row, key in enumerate(batch.keys):
            tensors, about = sample(int(key[5:]))
            assert torch.equal(batch.video[row], tensors["video"].float())
            assert torch.equal(batch.audio[row], tensors["audio"].float())
            assert torch.equal(batch.text[row], tensors["text"].float())
            assert batch.captions[row] == about.pop("caption")
            assert batch.extra[row] == about


def test_the_index_gives_codecs_clock_and_shapes(index):
    assert index.latent_shapes == {"video": VIDEO, "audio": AUDIO}
    assert index.codecs().clock == index.clock
    assert (index.num_samples("train"), index.num_samples("val")) == (19, 3)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.update(version=99), "version 99, this ovi reads version 1"),
        (lambda c: c.update(format="other"), "not an index of latent shards"),
        (lambda c: c.pop("clock"), "not a whole index.*clock"),
        (lambda c: c["clock"].update(speed=1), "not a whole index.*speed"),
        (lambda c: c["splits"]["train"]["shards"][0].pop("num_bytes"), "not a whole index.*num_bytes"),
        (
            lambda c: c["splits"]["train"]["shards"][1].update(file="gone.tar"),
            "gone.tar: is in the index but not there",
        ),
        (lambda c: c["splits"]["train"]["shards"][1].update(num_bytes=7), "bytes, the index says 7"),
    ],
)
def test_an_index_that_lies_is_refused(change, expected, index, tmp_path):
    with pytest.raises(OviError, match=expected):
        ShardIndex.load(rewrite(index, tmp_path / "set", change))


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\x00\x01"])
def test_an_index_that_is_no_json_is_refused(content, tmp_path):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(OviError, match=r"encode the set again|not an index"):
        ShardIndex.load(tmp_path)


def test_a_folder_without_index_is_refused(tmp_path):
    with pytest.raises(OviError, match=r"not found.*data\.path"):
        ShardIndex.load(tmp_path / "nowhere")


def test_unknown_and_empty_splits_are_named(index, tmp_path):
    with pytest.raises(OviError, match="no split 'test'; it has train, val"):
        LatentDataset(index, "test", shuffle=False)
    empty = write_set(tmp_path, {"train": [1], "val": []})
    with pytest.raises(OviError, match=r"'val' holds no sample.*val_fraction"):
        LatentDataset(empty, "val", shuffle=False)


def test_impossible_arguments_are_named(index):
    with pytest.raises(OviError, match="rank must be 0 to below world_size, got 2 of 2"):
        LatentDataset(index, "train", shuffle=False, rank=2, world_size=2)
    with pytest.raises(OviError, match="at least 1 sample, got 0"):
        LatentDataset(index, "train", shuffle=True, buffer=0)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scramble(path: Path) -> None:
    """Break the tensors of the second sample, leaving the tar itself alone."""
    content = bytearray(path.read_bytes())
    header = content.index(b'{"', content.index(b"clip-0001.safetensors"))
    content[header : header + 2] = b"??"
    path.write_bytes(content)


def reshape(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        tensors, about = sample(0)
        tensors["video"] = tensors["video"][:, :4].contiguous()
        for suffix, content in (("json", json.dumps(about).encode()), ("safetensors", save(tensors))):
            entry = tarfile.TarInfo(f"clip-0000.{suffix}")
            entry.size = len(content)
            tar.addfile(entry, BytesIO(content))


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (cut, r"train-000000\.tar: (is damaged|ends after \d)"),
        (lambda path: path.write_bytes(b"\0" * 20480), r"train-000000\.tar: ends after 0 samples, the index says 5"),
        (lambda path: path.write_bytes(b"no tar at all" * 100), r"train-000000\.tar: is damaged"),
        (scramble, r"train-000000\.tar: sample clip-0001 is damaged"),
        (reshape, r"sample clip-0000 has latents .*\(12, 4, 2, 2\).*the index says"),
    ],
)
def test_a_shard_damaged_after_loading_is_named(harm, expected, index, tmp_path):
    folder = rewrite(index, tmp_path / "set")
    damaged = ShardIndex.load(folder)
    harm(folder / "train-000000.tar")
    with pytest.raises(OviError, match=expected):
        list(LatentDataset(damaged, "train", shuffle=False))


def test_pickles_in_a_shard_are_never_opened(index, tmp_path):
    marker = tmp_path / "opened"
    evil = b"cbuiltins\nopen\n(V" + str(marker).encode() + b"\nVw\ntR."
    path = rewrite(index, tmp_path / "set") / "train-000000.tar"
    with tarfile.open(path) as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar}
    content |= {f"clip-0000.{suffix}": evil for suffix in ("pyd", "pth", "pickle")}
    with tarfile.open(path, "w") as tar:
        for name in sorted(content):
            entry = tarfile.TarInfo(name)
            entry.size = len(content[name])
            tar.addfile(entry, BytesIO(content[name]))
    tampered = replace(index, splits={"train": (Shard(path, 5, path.stat().st_size, ""),)})
    assert len(list(LatentDataset(tampered, "train", shuffle=False))) == 5
    assert not marker.exists()
    pickle.loads(evil)
    assert marker.exists()  # it would have worked
