"""Sources and outputs behind URLs: fetched one by one, uploaded whole, dealt by rank."""

import importlib.util
import json
import os
import threading
import uuid
from io import BytesIO
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ovi.data import local_copies, shares
from ovi.data.encode import encode
from ovi.data.encode_folder import EncodeFolder
from ovi.data.index import ShardIndex
from ovi.data.local_copies import LocalCopies
from ovi.data.shares import Shares
from ovi.data.sources import Folder, SourceItem
from ovi.data.stages import duplicates, loudness  # noqa: F401
from ovi.data.storage import RemoteStorage
from ovi.errors import OviError
from test_encode import BAD, FORM, SIZE, codecs, hashes, samples, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = write_folder(tmp_path_factory.mktemp("remote") / "in", 8)
    (made / "ünter").mkdir()
    (made / "clip 07.mp4").rename(made / "ünter" / "клип № 7.MP4")
    lines = [{"file": "clip 00.mp4", "caption": "first"}, {"file": "ünter/клип № 7.MP4", "caption": "last", "n": 7}]
    (made / "captions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    BAD["unreadable"](made / "a bad one.mp4")
    return made


@pytest.fixture
def bucket(folder):
    """URL of a copy of the folder in memory."""
    url = f"memory://{uuid.uuid4().hex}"
    upload(folder, url + "/videos")
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


def upload(folder: Path, url: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with fsspec.open(f"{url}/{path.relative_to(folder).as_posix()}", "wb") as file:
                file.write(path.read_bytes())


def download(url: str, to: Path) -> Path:
    files = fsspec.filesystem("memory")
    root = files._strip_protocol(url)
    for path in files.find(root):
        there = to / path.removeprefix(root).lstrip("/")
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(files.cat_file(path))
    return to


def tars(out: Path) -> dict[str, str]:
    return {name: digest for name, digest in hashes(out).items() if name.endswith(".tar")}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("remote") / "whole"
    encode(Folder(path=str(folder)), codecs(), out, **SIZE, shard_size=2)
    return out


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_source_behind_a_url_gives_the_shards_that_a_folder_gives(num_workers, folder, whole, tmp_path):
    source = Folder(path=f"file://{folder}")
    summary = encode(
        source, codecs(), tmp_path / "out", **SIZE, shard_size=2, num_workers=num_workers, scratch_dir=str(tmp_path)
    )
    assert tars(tmp_path / "out") == tars(whole)
    assert (summary.num_files, summary.num_captioned, summary.rejected) == (9, 2, {"unreadable": 1})
    (line,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert line["file"] == "a bad one.mp4"
    assert line["message"].startswith(f"file://{folder}/a bad one.mp4: ")
    assert sorted(os.listdir(tmp_path)) == ["out"], "local copies are gone"


def test_source_and_output_in_memory_and_a_second_run_does_nothing(bucket, whole, tmp_path):
    source, out = Folder(path=bucket + "/videos"), bucket + "/ein Ort [v1]*/latents"
    encode(source, codecs(), out, **SIZE, shard_size=2)
    found = download(out, tmp_path / "copy")
    assert tars(found) == tars(whole)
    about = {about["file"]: about for _, about in samples(found).values()}
    assert (about["ünter/клип № 7.MP4"]["caption"], about["ünter/клип № 7.MP4"]["n"]) == ("last", 7)
    index = ShardIndex.load(out)
    assert index.num_samples("train") + index.num_samples("val") == 8
    assert encode(source, codecs(), out, **SIZE, shard_size=2).num_new == 0
    with pytest.raises(OviError, match=r"height was 16, now 24"):
        encode(source, codecs(), out, **{**SIZE, "height": 24}, shard_size=2)
    encode(source, codecs(), out, **{**SIZE, "height": 24}, shard_size=4, overwrite=True)
    assert ShardIndex.load(out).height == 24
    assert not [n for n in RemoteStorage(out).names() if n.startswith("train-") and n > "train-000001.tar"]


@pytest.mark.parametrize("stage", ["cut", "encode"])
def test_a_run_that_breaks_off_behind_a_url_continues(stage, bucket, whole, tmp_path):
    source, out = Folder(path=bucket + "/videos"), bucket + "/latents"

    def stop(at: str, done: int, total: int) -> None:
        if (at, done) == (stage, 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(source, codecs(), out, **SIZE, shard_size=2, on_progress=stop)
    with pytest.raises(OviError):
        ShardIndex.load(out)
    summary = encode(source, codecs(), out, **SIZE, shard_size=2)
    assert summary.num_new == (8 if stage == "cut" else 4)
    assert tars(download(out, tmp_path / "copy")) == tars(whole)


def test_half_a_record_and_a_lost_shard_are_made_again(bucket, whole, tmp_path):
    source, out = Folder(path=bucket + "/videos"), bucket + "/latents"
    encode(source, codecs(), out, **SIZE, shard_size=2)
    storage = RemoteStorage(out)
    storage.write(".encode/train-000000.tar.json", b'{"file": "train-0')
    storage.write("train-000001.tar", b"half")
    storage.remove("train-000002.tar")
    summary = encode(source, codecs(), out, **SIZE, shard_size=2)
    assert summary.num_new == sum(shard.num_samples for shard in ShardIndex.load(whole).shards("train")[:3])
    assert tars(download(out, tmp_path / "copy")) == tars(whole)


@pytest.mark.slow
def test_ranks_share_what_is_behind_a_url(bucket, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(RemoteStorage, "poll_s", 0.05)
    out, summaries = bucket + "/latents", {}

    def run(rank: int) -> None:
        source = Folder(path=bucket + "/videos")
        summaries[rank] = encode(source, codecs(), out, **SIZE, shard_size=2, rank=rank, world_size=3)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
    assert sum(summary.num_new for summary in summaries.values()) == 8
    assert len({tuple(summary.num_samples.items()) for summary in summaries.values()}) == 1
    assert tars(download(out, tmp_path / "copy")) == tars(whole)


def test_the_share_of_a_rank_that_is_missing_is_taken_after_a_time(bucket, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(RemoteStorage, "poll_s", 0.01)
    source, out = Folder(path=bucket + "/videos"), bucket + "/latents"
    summary = encode(source, codecs(), out, **SIZE, shard_size=2, rank=1, world_size=4, patience_s=0.2)
    assert summary.num_new == 8
    assert tars(download(out, tmp_path / "copy")) == tars(whole)


def test_a_rank_that_was_busy_itself_has_not_seen_the_others_idle(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(shares.time, "monotonic", lambda: now[0])
    mine = Shares(0, 2, patience_s=100.0)
    theirs = next(f"unit-{n}" for n in range(99) if not mine.take(f"unit-{n}"))
    mine.saw(3)
    now[0] = 500.0  # at a long unit of its own
    assert not mine.take(theirs)
    mine.saw(5)
    assert not mine.take(theirs)
    now[0] = 590.0
    mine.saw(5)
    assert not mine.take(theirs)
    now[0] = 601.0
    mine.saw(5)
    assert mine.take(theirs)


def test_units_are_dealt_to_exactly_one_rank_each():
    shares = [Shares(rank, 5) for rank in range(5)]
    owners = [[share.rank for share in shares if share.take(f"train-{n:06d}.tar")] for n in range(500)]
    assert all(len(owner) == 1 for owner in owners)
    counts = [sum(owner == [rank] for owner in owners) for rank in range(5)]
    assert min(counts) > 60  # 100 each, give or take 4 standard deviations of 9


def test_stages_over_the_whole_set_read_what_is_behind_a_url(folder, bucket, tmp_path):
    with fsspec.open(bucket + "/videos/clip 01 again.mp4", "wb") as file:
        file.write((folder / "clip 01.mp4").read_bytes())
    stages = {
        "loud": {"name": "loudness", "knobs": {"min_db": -90.0}},
        "same": {"name": "duplicates", "knobs": {}},
    }
    source = Folder(path=bucket + "/videos")
    summary = encode(source, codecs(), tmp_path / "out", **SIZE, stages=stages, scratch_gb=1e-9)
    assert summary.rejected == {"unreadable": 1, "duplicate": 1}
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    (twin,) = (line for line in lines if line["reason"] == "duplicate")
    assert twin["file"] in ("clip 01.mp4", "clip 01 again.mp4")
    assert f"{bucket}/videos/{twin['file']}" in twin["message"]


# --- local copies ----------------------------------------------------------------------------------------------------


def item(url: str, content: bytes = b"x" * 100) -> SourceItem:
    with fsspec.open(url, "wb") as file:
        file.write(content)
    return SourceItem(url.rsplit("/")[-1], Path(url), url.rsplit("/")[-1], url=url, num_bytes=len(content))


def test_copies_are_bounded_except_those_in_use_and_end_with_the_last_user(tmp_path):
    items = [item(f"memory://copies/{n} ü.mp4", bytes([n]) * 100) for n in range(6)]
    copies, other = (LocalCopies("a", 250, scratch=str(tmp_path)) for _ in range(2))

    def there() -> int:
        return len([path for path in copies.folder.iterdir() if path.suffix == ".mp4"])

    with copies.of(items[0]) as first:
        for n in range(1, 6):
            with other.of(items[n]) as local:
                assert local.path.read_bytes() == bytes([n]) * 100
                assert local.path.suffix == ".mp4"
        assert first.path.read_bytes() == bytes([0]) * 100
        assert there() <= 3
    assert copies.said(f"{first.path}: no", items[0]) == "memory://copies/0 ü.mp4: no"
    copies.close()
    assert there() >= 1
    other.close()
    assert not copies.folder.exists()


def test_a_file_of_this_machine_is_its_own_copy(tmp_path):
    mine = SourceItem("a", tmp_path / "a.mp4", "a.mp4")
    with LocalCopies("b", scratch=str(tmp_path / "never")).of(mine) as local:
        assert local is mine
    assert not (tmp_path / "never").exists()


def test_a_fetch_is_tried_again_and_then_an_error_not_a_rejection(tmp_path, monkeypatch):
    monkeypatch.setattr(local_copies.time, "sleep", lambda s: None)
    at, calls = item("memory://copies/flaky.mp4"), []
    opened = MemoryFileSystem._open

    def flaky(self, path, *args, **kwargs):
        calls.append(path)
        if len(calls) < 3:
            raise ConnectionResetError("gone")
        return opened(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "_open", flaky)
    copies = LocalCopies("c", scratch=str(tmp_path))
    with copies.of(at) as local:
        assert local.path.read_bytes() == b"x" * 100
    assert len(calls) == 3
    copies.close()
    calls[:] = []
    with (
        pytest.raises(OviError, match=r"flaky.mp4: cannot be reached \(ConnectionResetError: gone\).*to continue"),
        LocalCopies("d", scratch=str(tmp_path), attempts=2).of(at),
    ):
        pass


def test_a_fetch_that_ends_early_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(local_copies.time, "sleep", lambda s: None)
    at, calls = item("memory://copies/short.mp4"), []
    opened = MemoryFileSystem._open

    def short(self, path, *args, **kwargs):
        calls.append(path)
        file = opened(self, path, *args, **kwargs)
        return BytesIO(file.read()[: 100 if len(calls) % 2 == 0 else 40])

    monkeypatch.setattr(MemoryFileSystem, "_open", short)
    copies = LocalCopies("e", scratch=str(tmp_path))
    with copies.of(at) as local:
        assert local.path.read_bytes() == b"x" * 100
    assert len(calls) == 2
    copies.close()
    with (
        pytest.raises(OviError, match=r"short.mp4: 40 bytes of 100 arrived"),
        LocalCopies("f", scratch=str(tmp_path), attempts=1).of(at),
    ):
        pass


def test_a_file_that_vanished_is_a_rejection(bucket, tmp_path, monkeypatch):
    source = Folder(path=bucket + "/videos")
    items = source.items(FORM)
    monkeypatch.setattr(source, "items", lambda *args: items)
    fsspec.filesystem("memory").rm(bucket + "/videos/clip 03.mp4")
    summary = encode(source, codecs(), tmp_path / "out", **SIZE)
    assert summary.rejected == {"unreadable": 2}
    assert "clip 03.mp4: is not there any more" in (tmp_path / "out" / "rejected.jsonl").read_text()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("memory://nothing-here", "no .mp4.*source.path"),
        ("gopher5://x/y", "gopher5://x/y: cannot be opened .*[Pp]rotocol"),
    ],
)
def test_sources_that_cannot_be_reached_are_named(path, expected, tmp_path):
    with pytest.raises(OviError, match=expected):
        encode(Folder(path=path), codecs(), tmp_path / "out", **SIZE)
    assert not (tmp_path / "out").exists()


def test_a_protocol_without_its_package_is_named(tmp_path):
    if importlib.util.find_spec("adlfs"):
        pytest.skip("adlfs is installed")
    with pytest.raises(OviError, match=r"az://bucket/out: a package is missing: .*adlfs"):
        EncodeFolder("az://bucket/out")
    with pytest.raises(OviError, match=r"az://bucket/in: a package is missing: .*adlfs"):
        Folder(path="az://bucket/in").items(FORM)


def test_refused_access_names_the_credentials(bucket, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("Forbidden")

    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)
    with pytest.raises(OviError, match=r"encode/files-0.json: cannot be reached \(PermissionError.*credentials"):
        encode(Folder(path=bucket + "/videos"), codecs(), bucket + "/latents", **SIZE)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "captions.jsonl",
            '{"file": "clip 09.mp4", "caption": "x"}',
            r"memory://.*captions.jsonl, line 1: names 'clip 09",
        ),
        ("captions.csv", "file,caption\nclip 00.mp4,x\n", "which one counts"),
    ],
)
def test_captions_behind_a_url_are_checked(name, text, expected, bucket):
    with fsspec.open(f"{bucket}/videos/{name}", "wt") as file:
        file.write(text)
    with pytest.raises(OviError, match=expected):
        Folder(path=bucket + "/videos").items(FORM)


def test_ranks_that_make_no_sense_are_named(folder, tmp_path):
    with pytest.raises(OviError, match="rank must be 0 to below world_size, got 2 of 2"):
        encode(Folder(path=str(folder)), codecs(), tmp_path / "out", **SIZE, rank=2, world_size=2)
