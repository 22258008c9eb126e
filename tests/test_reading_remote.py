"""Shards elsewhere: the cache holds whole copies, shared by processes, within its bounds."""

import multiprocessing
import os
import time

import fsspec
import pytest

from latent_sets import write_set
from ovi.data.batch import Skipped
from ovi.data.index import ShardIndex
from ovi.data.reading.remote import ShardCache, is_remote, join
from ovi.data.shards import LatentShards
from ovi.errors import OviError
from ovi.training.datamodule import ShardsDataModule
from small_disk import full_disk


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("remote set"), {"train": [4, 4, 4], "val": [2]})


@pytest.fixture
def memory(local):
    """The set in fsspec's memory."""
    files = fsspec.filesystem("memory")
    for path in local.folder.iterdir():
        files.pipe(f"/set/{path.name}", path.read_bytes())
    yield files
    files.rm("/set", recursive=True)


def test_a_remote_set_trains_like_a_local_one(local, memory, tmp_path):
    def keys(path):
        data = ShardsDataModule(path=path, batch_size=3, cache_dir=str(tmp_path / "cache"), shuffle_buffer=5)
        assert data.has_validation
        return [batch.keys for batch in data.train_dataloader()]

    expected = keys(str(local.folder))
    assert not (tmp_path / "cache").exists()
    assert keys("memory://set") == expected
    copies = {path.read_bytes() for path in (tmp_path / "cache").glob("*.tar")}
    assert copies == {shard.path.read_bytes() for shard in local.shards("train")}
    memory.rm("/set/train-000000.tar")
    assert keys("memory://set/index.json") == expected  # from the copies


def test_a_set_by_file_url_is_copied_and_read_by_workers(local, tmp_path):
    cache = tmp_path / "cache"
    data = ShardsDataModule(path=f"file://{local.folder}", batch_size=4, num_workers=2, cache_dir=str(cache))
    assert sum(len(batch) for batch in data.train_dataloader()) == 12
    assert len(list(cache.glob("*.tar"))) == 3
    assert not list(cache.glob("*.partial"))


def test_what_is_not_what_the_index_says_is_never_kept(local, memory, tmp_path):
    cache = ShardCache(tmp_path, 10**9, attempts=2, bad_for_s=0)
    index = ShardIndex.load("memory://set")
    content = memory.cat("/set/train-000000.tar")
    for wrong, expected in ((content[:-512], "bytes, the index says"), (b"x" + content[1:], "sha256 differs")):
        memory.pipe("/set/train-000000.tar", wrong)
        batch = LatentShards(index, "train", cache=cache).read_batch([0, 5])
        assert batch.keys == ["clip-0005"]
        assert isinstance(batch.skipped[0], Skipped)
        assert expected in batch.skipped[0].reason
    assert len(list(tmp_path.glob("*.tar"))) == 1
    memory.rm("/set/train-000000.tar")
    with pytest.raises(OviError, match=r"train-000000\.tar.*cannot be read"):
        LatentShards(index, "train", cache=cache, strict=True).read_batch([0])


def test_a_download_that_breaks_off_is_tried_again(local, memory, tmp_path, monkeypatch):
    cache, tries = ShardCache(tmp_path, 10**9, attempts=3), []
    download = ShardCache._download

    def flaky(self, *arguments):
        tries.append(1)
        if len(tries) < 3:
            raise OviError("connection reset")
        download(self, *arguments)

    monkeypatch.setattr(ShardCache, "_download", flaky)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    dataset = LatentShards(ShardIndex.load("memory://set"), "train", cache=cache)
    assert dataset[0].key == "clip-0000"
    assert len(tries) == 3


def test_a_shard_that_is_bad_is_not_fetched_for_each_of_its_samples(local, memory, tmp_path, monkeypatch):
    fetched, now = [], [0.0]
    download = ShardCache._download

    def counted(self, url, *about):
        fetched.extend([1] if url.endswith("000.tar") else [])
        download(self, url, *about)

    monkeypatch.setattr(ShardCache, "_download", counted)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    memory.pipe("/set/train-000000.tar", b"half")
    dataset = LatentShards(
        ShardIndex.load("memory://set"), "train", cache=ShardCache(tmp_path, 10**9, attempts=1, bad_for_s=60)
    )
    for n in range(4):
        assert len(dataset.read_batch([n]).skipped) == 1
    assert len(fetched) == 1
    memory.pipe("/set/train-000000.tar", local.shards("train")[0].path.read_bytes())
    now[0] = 61.0
    assert dataset[0].key == "clip-0000"
    assert len(fetched) == 2


def test_the_longest_unused_copies_make_room(local, memory, tmp_path):
    index = ShardIndex.load("memory://set")
    a, b, c = index.shards("train")
    cache = ShardCache(tmp_path, a.num_bytes + b.num_bytes)
    opened = {}

    def use(shard):
        before = set(tmp_path.glob("*.tar"))
        file = cache.open(shard.location, shard.num_bytes, shard.sha256)
        time.sleep(0.02)
        for path in set(tmp_path.glob("*.tar")) - before:
            opened[shard] = path
        return file

    files = [use(a), use(b), use(a), use(c)]  # b is the one used longest ago
    assert opened[a].exists()
    assert not opened[b].exists()
    assert opened[c].exists()
    assert os.pread(files[1], b.num_bytes, 0) == memory.cat("/set/train-000001.tar")  # who has it open keeps it
    for file in files:
        os.close(file)
    small = ShardCache(tmp_path / "small", 10)
    for shard in (a, b):
        os.close(small.open(shard.location, shard.num_bytes, shard.sha256))
    assert len(list((tmp_path / "small").glob("*.tar"))) == 1


def _read_all(folder, cache, max_bytes, start, result):
    index = ShardIndex.load(f"file://{folder}")
    dataset = LatentShards(index, "train", cache=ShardCache(cache, max_bytes), strict=True)
    start.wait()
    for _ in range(5):
        result.put([sample.key for sample in dataset])
        dataset.close()


@pytest.mark.slow
@pytest.mark.parametrize("max_bytes", [10**9, 1])
def test_processes_share_a_cache(local, tmp_path, max_bytes):
    """Even one so small that each removes what the other has just fetched."""
    context = multiprocessing.get_context("forkserver")
    start, result = context.Event(), context.Queue()
    arguments = (str(local.folder), str(tmp_path / "cache"), max_bytes, start, result)
    processes = [context.Process(target=_read_all, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    start.set()
    found = [result.get(timeout=60) for _ in range(10)]
    for process in processes:
        process.join()
    assert all(keys == [f"clip-{n:04d}" for n in range(12)] for keys in found)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_cache_that_cannot_be_written_is_the_users_to_mend(local, memory, tmp_path):
    (tmp_path / "file").write_text("no folder")
    dataset = LatentShards(ShardIndex.load("memory://set"), "train", cache=ShardCache(tmp_path / "file" / "x", 10**9))
    with pytest.raises(OviError, match="cannot be written"):
        dataset.read_batch([0])


@pytest.mark.parametrize("short", [1, 4000])
def test_a_disk_that_fills_is_no_damage_of_the_shard(local, memory, tmp_path, short):
    """Also when it fills at the very last bytes, which are written when the file is closed."""
    index = ShardIndex.load("memory://set")
    dataset = LatentShards(index, "train", cache=ShardCache(tmp_path / "cache", 10**9))
    with pytest.raises(OviError, match="no space left"), full_disk(index.shards("train")[0].num_bytes - short):
        dataset.read_batch([0])
    assert not list((tmp_path / "cache").glob("*.partial"))
    assert len(dataset.read_batch([0]).keys) == 1


def test_what_cannot_be_reached_is_named(memory):
    with pytest.raises(OviError, match=r"memory://nowhere/index\.json: not found"):
        ShardIndex.load("memory://nowhere")
    with pytest.raises(OviError, match=r"nonsense://x/index\.json: cannot be opened"):
        ShardIndex.load("nonsense://x")
    with pytest.raises(OviError, match=r"is elsewhere: name a folder for copies with data\.cache_dir"):
        LatentShards(ShardIndex.load("memory://set"), "train")


def test_locations():
    assert is_remote("s3://bucket/set")
    assert not is_remote("/data/set")
    assert join("s3://bucket/set/", "a.tar") == "s3://bucket/set/a.tar"
    assert join("data/set", "a.tar") == "data/set/a.tar"
