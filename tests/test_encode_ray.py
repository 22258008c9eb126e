"""The Ray launcher makes the very shards that one process makes, whatever is killed."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

import encode_stages
from ovi.codecs import Codecs
from ovi.data.encode import encode
from ovi.data.index import ShardIndex
from ovi.data.launchers import LAUNCHERS
from ovi.data.launchers.ray import Ray
from ovi.data.local_copies import LocalCopies
from ovi.data.sources import Folder
from ovi.errors import OviError
from test_encode import SIZE, SPECS, codecs, hashes, samples, write_folder


def shards(out: Path) -> dict[str, str]:
    """Checksums of all but the index, which says where the clips came from."""
    return {name: digest for name, digest in hashes(out).items() if name != "index.json"}


@pytest.fixture(scope="module")
def cluster():
    """A cluster as one that a user has running; each of its own would take seconds to start."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("pyarrow")
    here = str(Path(encode_stages.__file__).parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
        patch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = write_folder(tmp_path_factory.mktemp("ray") / "ein Ordner №1", 12)
    (made / "kaputt.mp4").write_text("no video")
    return made


@pytest.mark.slow
def test_the_same_shards_as_one_process_in_a_folder_and_behind_urls(cluster, folder, tmp_path):
    source = Folder(path=str(folder))
    encode(source, codecs(), tmp_path / "one", **SIZE, shard_size=2)
    done = []
    summary = encode(
        source, codecs(), tmp_path / "ray", **SIZE, shard_size=2, launcher=Ray(num_actors=2),
        on_progress=lambda *at: done.append(at),
    )  # fmt: skip
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "one")
    assert (summary.num_new, summary.rejected) == (12, {"unreadable": 1})
    assert [at for at in done if at[0] == "encode"][-1] == ("encode", 12, 12)
    again = encode(source, codecs(), tmp_path / "ray", **SIZE, shard_size=2, launcher=Ray())
    assert again.num_new == 0
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "one")
    out = tmp_path / "hinter einer Url"
    url = encode(
        Folder(path=f"file://{folder}"), codecs(), f"file://{out}", **SIZE, shard_size=2, launcher=Ray(num_actors=2)
    )
    assert shards(out)["train-000000.tar"] == shards(tmp_path / "one")["train-000000.tar"]
    assert {n: d for n, d in shards(out).items() if n.endswith(".tar")} == {
        n: d for n, d in shards(tmp_path / "one").items() if n.endswith(".tar")
    }
    (line,) = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    assert f"file://{folder}/kaputt.mp4" in line["message"]
    assert url.folder == f"file://{out}"
    assert not LocalCopies(f"file://{out}").folder.exists()
    assert ShardIndex.load(out).num_samples("train") == url.num_samples["train"]


@pytest.mark.slow
def test_an_actor_that_dies_has_its_unit_done_again_and_no_other(cluster, folder, tmp_path):
    source = Folder(path=str(folder))

    def stages(name: str, **more) -> dict:
        return {"log": {"name": "tests_logged", "knobs": {"log": str(tmp_path / name), **more}}}

    mine = codecs()  # takes its statistics here: doing so reads clips in this process, which must not be killed
    encode(source, mine, tmp_path / "one", **SIZE, shard_size=3, val_fraction=0.0)
    encode(
        source, mine, tmp_path / "ray", **SIZE, shard_size=3, stages=stages("seen", kill="clip_04", times=2),
        val_fraction=0.0, launcher=Ray(num_actors=1),
    )  # fmt: skip
    assert len(list(tmp_path.glob("seen.killed-*"))) == 2
    assert sorted(samples(tmp_path / "ray")) == sorted(samples(tmp_path / "one"))
    seen = Counter(key.split("-")[0] for key in (tmp_path / "seen").read_text().split())
    assert seen == {f"clip_{n:02d}": 2 if n == 3 else 1 for n in range(12)}, "clip 3 is the killed unit's first"
    assert not list((tmp_path / "ray" / ".encode").glob("tries-*"))


@pytest.mark.slow
def test_a_unit_that_kills_every_actor_is_an_error_that_names_it(cluster, folder, tmp_path):
    first = codecs()
    encode(Folder(path=str(folder)), first, tmp_path / "for statistics", **SIZE)
    deadly = Codecs.build({**SPECS, "text": {"name": "tests_deadly_text", "knobs": {"kill": True}}}, fps=8)
    deadly.load_state(first.state())
    with pytest.raises(OviError, match=r"train-00000\d.tar: the actor.*killed 2 times.*run the same command again"):
        encode(
            Folder(path=str(folder)), deadly, tmp_path / "out", **SIZE, shard_size=6, val_fraction=0.0,
            launcher=Ray(num_actors=1, max_tries=2),
        )  # fmt: skip


@pytest.mark.slow
def test_a_clip_that_kills_its_actor_is_then_read_elsewhere_and_left_out(cluster, folder, tmp_path):
    stages = {"log": {"name": "tests_logged", "knobs": {"log": str(tmp_path / "l"), "kill": "clip_04", "times": 99}}}
    first = codecs()
    encode(Folder(path=str(folder)), first, tmp_path / "for statistics", **SIZE)
    summary = encode(
        Folder(path=str(folder)), first, tmp_path / "out", **SIZE, shard_size=6, stages=stages, val_fraction=0.0,
        launcher=Ray(num_actors=1),
    )  # fmt: skip
    assert summary.rejected == {"crashed": 1, "unreadable": 1}
    assert len(list(tmp_path.glob("l.killed-*"))) == 3
    assert len(samples(tmp_path / "out")) == 11


@pytest.mark.slow
def test_what_is_wrong_in_an_actor_reaches_the_user(cluster, folder, tmp_path):
    with pytest.raises(OviError, match=r"no actor of launcher.num_cpus=64 and num_gpus=0 fits.*2 CPU"):
        encode(Folder(path=str(folder)), codecs(), tmp_path / "a", **SIZE, launcher=Ray(num_cpus=64))
    first = codecs()
    encode(Folder(path=str(folder)), first, tmp_path / "b", **SIZE)
    blocked = tmp_path / "c"
    (blocked / "train-000000.tar.partial").mkdir(parents=True)  # no shard can be written
    with pytest.raises(OviError, match=r"train-000000.tar: cannot be written"):
        encode(Folder(path=str(folder)), first, blocked, **SIZE, launcher=Ray(num_actors=1))


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [({"num_actors": 0}, "num_actors must be at least 1"), ({"num_cpus": 0}, "num_cpus must be above 0")],
)
def test_knobs_that_make_no_sense_are_named(knobs, expected):
    with pytest.raises(OviError, match=expected):
        Ray(**knobs)


def test_without_ray_the_extra_is_named(monkeypatch, folder, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OviError, match=r"launcher=ray needs Ray Data.*extra ray"):
        encode(Folder(path=str(folder)), codecs(), tmp_path, **SIZE, launcher=Ray())
    assert set(LAUNCHERS) == {"local", "ray"}
