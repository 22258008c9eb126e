"""What many clips and many processes ask for: work shared and taken up again, few looks, nothing hashed twice."""

import json
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ovi.data import cut, encode_folder, readers, remote_files
from ovi.data.encode import encode
from ovi.data.encode_folder import EncodeFolder
from ovi.data.sources import Folder
from ovi.data.stages import duplicates, loudness  # noqa: F401
from ovi.data.stages.duplicates import Duplicates
from ovi.data.storage import RemoteStorage
from ovi.errors import OviError
from test_encode import SIZE, codecs, hashes, write_folder

STAGES = {"loud": {"name": "loudness", "knobs": {"min_db": -90.0}}, "same": {"name": "duplicates", "knobs": {}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = write_folder(tmp_path_factory.mktemp("scale"), 8)
    for n in (1, 2, 5):
        (made / f"clip {n:02d} again.mp4").write_bytes((made / f"clip {n:02d}.mp4").read_bytes())
    (made / "broken.mp4").write_bytes(b"no film")
    return made


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    summary = encode(Folder(path=str(folder)), codecs(), out, **SIZE, shard_size=2, stages=STAGES)
    assert summary.rejected == {"duplicate": 3, "unreadable": 1}
    return out


def no_throughput(out: Path) -> dict[str, str]:
    """Checksums of all but the index, which says how long it took."""
    return {name: digest for name, digest in hashes(out).items() if name != "index.json"}


@pytest.mark.slow
def test_any_number_of_processes_that_cut_look_and_read_make_the_same_set(folder, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_ALONE_S", 0.0)
    encode(Folder(path=str(folder)), codecs(), tmp_path / "out", **SIZE, shard_size=2, stages=STAGES, num_workers=2)
    assert no_throughput(tmp_path / "out") == no_throughput(whole)
    both = [json.loads((out / "index.json").read_text())["codecs"] for out in (tmp_path / "out", whole)]
    assert both[0] == both[1], "statistics are the same to the last bit"


def test_looking_at_all_clips_is_taken_up_where_it_was_left(folder, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(cut, "LOOK_GROUP", 3)
    looked, seen = [], []
    look = Duplicates.look
    monkeypatch.setattr(Duplicates, "look", lambda self, clip: looked.append(1) or look(self, clip))

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "look":
            seen.append((done, total))
            if done == 8:
                raise KeyboardInterrupt

    run = (Folder(path=str(folder)), codecs(), tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        encode(*run, **SIZE, shard_size=2, stages=STAGES, on_progress=stop)
    assert (len(looked), seen) == (8, [(n + 1, 11) for n in range(8)])
    encode(*run, **SIZE, shard_size=2, stages=STAGES)
    assert len(looked) == 8 + 5, "two groups of three were done"
    assert no_throughput(tmp_path / "out") == no_throughput(whole)


def test_a_stage_that_compares_all_but_cannot_be_shared_is_named(folder, tmp_path):
    from ovi.data.stages.base import STAGES as REGISTRY
    from ovi.data.stages.base import Stage

    class Gathers(Stage):
        """Compares all."""

        name, level = "gathers", "set"

        def __call__(self, candidates, rejected):
            yield from candidates

    with (
        REGISTRY.temporary("tests_gathers", Gathers),
        pytest.raises(OviError, match="stage all: Gathers is of level 'set' and must derive from SetStage"),
    ):
        encode(Folder(path=str(folder)), codecs(), tmp_path, **SIZE, stages={"all": {"name": "tests_gathers"}})
    assert not list(tmp_path.iterdir())


# --- the folder ------------------------------------------------------------------------------------------------------


def test_only_shards_that_were_written_to_are_hashed_and_once(folder, whole, monkeypatch):
    hashed = []
    sha256 = encode_folder.sha256
    monkeypatch.setattr(encode_folder, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    run = (Folder(path=str(folder)), codecs(), whole)
    assert encode(*run, **SIZE, shard_size=2, stages=STAGES).num_new == 0
    assert hashed == []
    shard = whole / "train-000001.tar"
    shard.write_bytes(shard.read_bytes())
    for _ in range(2):
        assert encode(*run, **SIZE, shard_size=2, stages=STAGES).num_new == 0
    assert hashed == [shard.name]
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    assert encode(*run, **SIZE, shard_size=2, stages=STAGES).num_new == 2


@pytest.mark.parametrize(
    ("partial", "unit"),
    [
        ("train-000007.tar.partial", "train-000007.tar"),
        (".encode/cut-000003.json.partial", "cut-000003"),
        (".encode/alive-my-host-12.json.partial", "alive my-host 12"),
        (".encode/tries-train-000007.tar.json.partial", "train-000007.tar"),
        (".encode/begun.json.partial", "begin"),
    ],
)
def test_what_somebody_alive_is_writing_stays(partial, unit, tmp_path):
    with EncodeFolder(tmp_path) as folder:
        (tmp_path / partial).write_bytes(b"half")
        hold = "import sys; from pathlib import Path; from ovi.data.claims import Claims\n"
        hold += "c = Claims(Path(sys.argv[1])); assert c.take(sys.argv[2]); print('held', flush=True); input()"
        lock = tmp_path / ".encode" / "lock"
        with subprocess.Popen(
            [sys.executable, "-c", hold, str(lock), unit], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder:
            assert holder.stdout.readline() == "held\n"
            folder.write_index({})
            assert (tmp_path / partial).exists()
            holder.communicate("\n")
        folder.write_index({})
        assert not (tmp_path / partial).exists()


# --- an object store -------------------------------------------------------------------------------------------------


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(remote_files.time, "sleep", lambda seconds: None)
    made = RemoteStorage("memory://scale/out")
    for name in "abc":
        made.write(f"{name}.json", name.encode())
    yield made
    fsspec.filesystem("memory").rm("/scale", recursive=True)


def test_what_cannot_be_read_for_the_moment_is_not_taken_for_absent(store, monkeypatch):
    failures, read = {"/scale/out/b.json": 2}, MemoryFileSystem.cat_file

    def flaky(self, path, *args, **kwargs):
        if failures.get(path, 0):
            failures[path] -= 1
            raise ConnectionResetError("gone")
        return read(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", flaky)
    assert store.read_all(["a.json", "b.json", "d.json", "c.json"]) == [b"a", b"b", None, b"c"]
    assert failures == {"/scale/out/b.json": 0}
    failures["/scale/out/b.json"] = 1
    assert store.read("b.json") == b"b"
    failures["/scale/out/b.json"] = 99
    with pytest.raises(OviError, match=r"scale/out/b.json: cannot be reached \(ConnectionResetError: gone\)"):
        store.read_all(["a.json", "b.json"])


def test_uploads_are_tried_again_and_lie_in_the_scratch_folder(store, tmp_path, monkeypatch):
    put, tries = MemoryFileSystem.put_file, []

    def flaky(self, local, remote, *args, **kwargs):
        tries.append(Path(local))
        if len(tries) < 3:
            raise TimeoutError
        put(self, local, remote, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", flaky)
    RemoteStorage(store.url, scratch=str(tmp_path / "ein Ort")).write("d.json", b"d")
    assert store.read("d.json") == b"d"
    assert len(tries) == 3
    assert tries[0].is_relative_to(tmp_path / "ein Ort")
    assert not list((tmp_path / "ein Ort").iterdir())
