"""Files added to a set: what is there stays to the last bit, and a kill in the middle changes nothing."""

import json
import shutil
from pathlib import Path

import pytest

from ovi.data.encode import encode
from ovi.data.encode_folder import EncodeFolder
from ovi.data.index import ShardIndex
from ovi.data.media import write_clip
from ovi.data.plan import key_fraction
from ovi.data.reading.check import check_set
from ovi.data.sources import Folder
from ovi.data.stages import duplicates  # noqa: F401
from ovi.errors import OviError
from test_encode import FORM, SIZE, codecs, hashes, samples, scene, write_folder

KNOBS = {"shard_size": 2, "val_fraction": 0.3, "stages": {"same": {"name": "duplicates", "knobs": {}}}}


def grown(source: Path, out: Path, **knobs):
    return encode(Folder(path=str(source)), codecs(), out, **SIZE, **KNOBS, **knobs)


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A folder of seven clips, ``in``, encoded to ``out``; then others came, of which one shows what one before did."""
    made = tmp_path_factory.mktemp("begun")
    grown(write_folder(made / "in", 7), made / "out")
    for n in range(10, 15):
        write_clip(made / "in" / f"a new one {n}.mp4", scene(n))
    shutil.copy(made / "in" / "clip 03.mp4", made / "in" / "a copy.mp4")
    return made


@pytest.fixture
def out(begun, tmp_path) -> Path:
    return Path(shutil.copytree(begun / "out", tmp_path / "out"))


def test_what_is_there_stays_and_new_files_come_behind(begun, out):
    before = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    state = ShardIndex.load(out).content["codecs"]["state"]
    with pytest.raises(OviError, match=r"was \"7 files.*now \"13 files.*grow=true"):
        grown(begun / "in", out)
    summary = grown(begun / "in", out, grow=True)
    assert (summary.num_new, summary.num_files, summary.rejected) == (5, 13, {"duplicate": 1})
    assert {name: (out / name).read_bytes() for name in before} == before
    index = ShardIndex.load(out)
    assert index.content["codecs"]["state"] == state
    assert check_set(index).all_findings == []
    names = {about["file"]: key for key, (_, about) in samples(out).items()}
    assert names.keys() == {path.name for path in (begun / "in").iterdir()} - {"a copy.mp4"}
    val = {about["file"] for path in out.glob("val*") for _, about in samples_of(path).values()}
    new = {name for name in names if "new" in name}
    assert val & new == {name for name in new if key_fraction(names[name].rsplit("-", 1)[0]) < 0.3}
    for grow in (False, True):
        assert grown(begun / "in", out, grow=grow).num_new == 0
    with EncodeFolder(out) as folder:  # as a rank that saw the difference before another took the files in
        before = folder.record("begun")
        folder._grow(before["settings"], Folder(path=str(begun / "in")).items(FORM))
        assert folder.record("begun") == before
    assert (out / "index.json").exists()


def samples_of(path: Path):
    alone = path.parent / f"{path.stem} alone"
    alone.mkdir()
    shutil.copy(path, alone)
    return samples(alone)


@pytest.mark.parametrize("stop_at", [("cut", 3), ("look", 1), ("encode", 1), ("encode", 4)])
def test_interrupted_as_it_grows_the_same_call_continues(begun, out, tmp_path, stop_at):
    whole = Path(shutil.copytree(begun / "out", tmp_path / "whole"))
    grown(begun / "in", whole, grow=True)
    calls = []

    def stop(stage: str, done: int, total: int) -> None:
        calls.append(stage)
        if calls.count(stop_at[0]) > stop_at[1] and stage == stop_at[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grown(begun / "in", out, grow=True, on_progress=stop)
    assert not (out / "index.json").exists()
    grown(begun / "in", out)
    assert hashes(out) == hashes(whole)


def test_files_that_changed_or_are_gone_are_named(begun, out, tmp_path):
    source = Path(shutil.copytree(begun / "in", tmp_path / "in"))
    (source / "clip 05.mp4").rename(tmp_path / "clip 05.mp4")
    before = hashes(out)
    with pytest.raises(OviError, match=r"1 files that it was begun with are there no more, the first clip 05\.mp4"):
        grown(source, out, grow=True)
    (tmp_path / "clip 05.mp4").rename(source / "clip 05.mp4")
    (source / "captions.jsonl").write_text(json.dumps({"file": "clip 02.mp4", "caption": "now it has one"}) + "\n")
    with pytest.raises(OviError, match=r"have another size or caption, the first clip 02\.mp4"):
        grown(source, out, grow=True)
    assert hashes(out) == before
