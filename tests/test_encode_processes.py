"""Several processes encode into one folder, are killed and started again: no clip lost, none twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ovi.data.claims import Claims
from ovi.data.encode import encode
from ovi.data.sources import Folder
from ovi.errors import OviError
from test_encode import SIZE, SPECS, codecs, hashes, samples, write_folder

RUN = """
import json, sys, time
from ovi.codecs import Codecs
from ovi.data.encode import encode
from ovi.data.sources import Folder
source, out, rank, world_size, more = sys.argv[1:]
def progress(*at):
    print(*at, flush=True)
    time.sleep(0.03)
if __name__ == "__main__":
    summary = encode(Folder(path=source), Codecs.build({specs}, fps=8), out, **{size}, shard_size=2, rank=int(rank),
                     world_size=int(world_size), on_progress=progress, **json.loads(more))
    print("new", summary.num_new, flush=True)
"""


def start(
    script: Path, source: Path, out: Path, rank: int, world_size: int, *, log: Path | None = None, **more
) -> subprocess.Popen:
    """A process that encodes; it tells of its progress on its standard output, or in a file."""
    script.write_text(RUN.format(specs=SPECS, size=SIZE))
    words = [str(source), str(out), str(rank), str(world_size), json.dumps(more)]
    return subprocess.Popen(
        [sys.executable, str(script), *words], stdout=log.open("w") if log else subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("media"), 36)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    encode(Folder(path=str(folder)), codecs(), out, **SIZE, shard_size=2)
    return out


@pytest.mark.slow
def test_processes_share_the_work_and_each_clip_is_made_once(folder, whole, tmp_path):
    runs = [start(tmp_path / f"{r}.py", folder, tmp_path / "out", r, 3) for r in range(3)]
    printed = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], printed
    shares = [int(out.split("new ")[1]) for out, _ in printed]
    assert sum(shares) == 36
    assert sum(share > 0 for share in shares) >= 2
    assert hashes(tmp_path / "out") == hashes(whole)
    assert not list((tmp_path / "out" / ".encode").glob("alive-*"))


@pytest.mark.slow
def test_processes_with_workers_of_their_own_do_not_wait_for_each_other(folder, whole, tmp_path):
    """Each takes units ahead of its work: none may hold one while it waits for another's."""
    runs = [start(tmp_path / f"{r}.py", folder, tmp_path / "out", r, 2, num_workers=2) for r in range(2)]
    printed = [run.communicate(timeout=150) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], printed
    assert sum(int(out.split("new ")[1]) for out, _ in printed) == 36
    assert hashes(tmp_path / "out") == hashes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_processes_killed_in_every_phase_and_started_again_make_the_very_same_set(folder, whole, tmp_path, seed):
    """Each is killed at a random point of a phase that it has told of; most while shards are written."""
    rng, out, deadline = random.Random(seed), tmp_path / "out", time.monotonic() + 240
    logs, killed = [tmp_path / f"{rank}.log" for rank in range(2)], []

    def begin(rank):
        return start(tmp_path / "run.py", folder, out, rank, 2, log=logs[rank])

    def phases(rank):
        return [line.split()[0] for line in logs[rank].read_text().split("\n")[:-1]]

    runs = [begin(rank) for rank in range(2)]
    # Where both are killed nobody goes on in the meantime, so there is something left to be killed at.
    for phase, count in (("cut", 1), ("fit" if seed else "encode", 2), ("encode", 2), ("encode", 2), ("encode", 1)):
        victims = rng.sample(range(2), count)
        while not any(phase in phases(rank) for rank in victims):
            assert time.monotonic() < deadline
            assert not (out / "index.json").exists()
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.1))
        for victim in victims:
            assert runs[victim].poll() is None
            runs[victim].send_signal(signal.SIGKILL)
            runs[victim].communicate()
            killed += phases(victim)[-1:]
            time.sleep(rng.uniform(0.0, 0.05))
        for victim in victims:
            runs[victim] = begin(victim)
    for run in runs:
        printed = run.communicate(timeout=120)
        assert run.returncode == 0, printed
    assert killed.count("encode") >= 3, killed
    assert hashes(out) == hashes(whole)
    assert len(samples(out)) == 36
    assert not list(out.rglob("*.partial"))


@pytest.mark.slow
def test_other_settings_are_refused_while_somebody_works(folder, tmp_path):
    run = start(tmp_path / "run.py", folder, tmp_path / "out", 0, 1)
    try:
        for line in run.stdout:
            if line.startswith("encode 3 "):
                break
        with pytest.raises(OviError, match=r"begun with other settings: height was 16, now 24"):
            encode(Folder(path=str(folder)), codecs(), tmp_path / "out", **{**SIZE, "height": 24}, shard_size=2)
        with pytest.raises(OviError, match=rf"{run.pid} is encoding into it with other settings"):
            encode(
                Folder(path=str(folder)), codecs(), tmp_path / "out", **{**SIZE, "height": 24}, shard_size=2,
                overwrite=True,
            )  # fmt: skip
    finally:
        run.kill()
        run.communicate()


def test_a_claim_keeps_others_out_and_ends_with_its_holder(tmp_path):
    held = "import sys, time; from pathlib import Path; from ovi.data.claims import Claims\n"
    held += "c = Claims(Path(sys.argv[1])); assert c.take('a'); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", held, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        claims = Claims(tmp_path / "lock")
        assert not claims.take("a")
        assert claims.take("b")
    finally:
        holder.kill()
        holder.wait()
    assert claims.take("a")
    claims.close()
    with pytest.raises(OviError, match="choose another folder"):
        Claims(tmp_path / "absent" / "lock")


@pytest.mark.slow
def test_clip_stages_reject_in_the_workers_and_figures_go_with_the_sample(folder, tmp_path):
    from ovi.data.stages import loudness, size  # noqa: F401

    def stages(min_db):
        return {
            "size": {"name": "size", "knobs": {"min_height": 8, "min_width": 8}},
            "loud": {"name": "loudness", "knobs": {"min_db": min_db}},
            "off": None,
        }

    source = Folder(path=str(folder))
    encode(source, codecs(), tmp_path / "all", **SIZE, stages=stages(None))
    levels = sorted(about["figures"]["loudness_db"] for _, about in samples(tmp_path / "all").values())
    limit = levels[12]
    for workers in (0, 2):
        encode(source, codecs(), tmp_path / str(workers), **SIZE, stages=stages(limit), num_workers=workers)
    assert hashes(tmp_path / "0") == hashes(tmp_path / "2")
    lines = [json.loads(line) for line in (tmp_path / "0" / "rejected.jsonl").read_text().splitlines()]
    kept = [about["figures"]["loudness_db"] for _, about in samples(tmp_path / "0").values()]
    assert sorted(kept) == levels[12:]
    assert sorted(line["value"] for line in lines) == levels[:12]
    assert {(line["stage"], line["reason"], line["threshold"]) for line in lines} == {("loudness", "quiet", limit)}
    index = json.loads((tmp_path / "0" / "index.json").read_text())
    assert index["rejected"] == {"quiet": 12}
    assert index["limits"]["loudness_db"] == [limit]
    assert index["settings"]["stages"]["loud"]["knobs"] == {"min_db": limit}
    with pytest.raises(OviError, match=r"stages was .*now"):
        encode(source, codecs(), tmp_path / "0", **SIZE)


def test_a_stage_that_lacks_what_it_needs_is_named_before_anything_is_written(folder, tmp_path):
    from ovi.data.stages import sync  # noqa: F401

    stages = {"together": {"name": "sync", "knobs": {}}}
    with pytest.raises(OviError, match="stage together: sync needs estimator"):
        encode(Folder(path=str(folder)), codecs(), tmp_path / "out", **SIZE, stages=stages)
    assert not (tmp_path / "out").exists()


def test_a_clip_is_no_duplicate_of_one_that_is_rejected(tmp_path):
    from dataclasses import replace

    from ovi.data.media import write_clip
    from ovi.data.stages import duplicates, loudness  # noqa: F401
    from test_encode import scene

    source = tmp_path / "in"
    source.mkdir()
    # The first by key is too quiet; its copy is not.
    loud = scene(0)
    write_clip(source / "a.mp4", replace(loud, waveform=loud.waveform * 0.001))
    write_clip(source / "b.mp4", loud)
    write_clip(source / "c.mp4", scene(5))
    quiet, same = {"name": "loudness", "knobs": {"min_db": -50.0}}, {"name": "duplicates", "knobs": {"sound": False}}
    for order, kept in (((quiet, same), {"b.mp4", "c.mp4"}), ((same, quiet), {"c.mp4"})):
        out = tmp_path / order[0]["name"]
        stages = {spec["name"]: spec for spec in order}
        encode(Folder(path=str(source)), codecs(), out, **SIZE, stages=stages, val_fraction=0)
        assert {about["file"] for _, about in samples(out).values()} == kept


def test_windows_and_encoding_agree_on_what_both_can_say(folder, tmp_path):
    def index(**knobs):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        encode(Folder(path=str(folder)), codecs(), out, **SIZE, **knobs)
        return json.loads((out / "index.json").read_text())["settings"]

    windows = {"w": {"name": "windows", "knobs": {}}}
    found = index(stages=windows, clips_per_file=1, variable_frame_rate="resample")
    assert found["stages"]["w"]["knobs"] == {"max_clips": 1, "variable_frame_rate": "resample"}
    resample = {"w": {"name": "windows", "knobs": {"variable_frame_rate": "resample"}}}
    assert index(stages=resample)["variable_frame_rate"] == "resample"
    two = {"w": {"name": "windows", "knobs": {"max_clips": 2}}}
    with pytest.raises(OviError, match=r"clips_per_file=1, but stages.w.max_clips=2"):
        index(stages=two, clips_per_file=1)


def test_another_estimator_is_another_run(folder, tmp_path):
    from ovi.data.stages import sync  # noqa: F401
    from ovi.metrics.sync_estimators import CrossCorrelation

    stages = {"sync": {"name": "sync", "knobs": {}}}

    def run(lag):
        wiring = {"estimator": CrossCorrelation(max_lag_s=lag)}
        encode(Folder(path=str(folder)), codecs(), tmp_path / "out", **SIZE, stages=stages, wiring=wiring)

    run(0.3)
    with pytest.raises(OviError, match=r"stages are given was .*CrossCorrelation.* now "):
        run(0.2)


def test_a_name_that_is_no_text_is_encoded_or_rejected_like_any_other(tmp_path):
    source = write_folder(tmp_path / "in", 3)
    os.rename(source / "clip 00.mp4", os.fsencode(str(source)) + b"/caf\xe9.mp4")
    (source / "broken.mp4").write_bytes(b"no film")
    os.rename(source / "broken.mp4", os.fsencode(str(source)) + b"/b\xe9.mp4")
    encode(Folder(path=str(source)), codecs(), tmp_path / "out", **SIZE, val_fraction=0)
    files = {about["file"] for _, about in samples(tmp_path / "out").values()}
    assert "caf\udce9.mp4" in files
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == "b\udce9.mp4"


def test_a_stage_that_crashes_on_one_file_leaves_it_out(folder, tmp_path, monkeypatch):
    from ovi.data.stages import loudness

    measure = loudness.Loudness.measure

    def odd(self, clip):
        odd.count += 1
        if odd.count == 3:
            raise ValueError("planted")
        return measure(self, clip)

    odd.count = 0
    monkeypatch.setattr(loudness.Loudness, "measure", odd)
    stages = {"loud": {"name": "loudness", "knobs": {}}}
    state = codecs()
    encode(Folder(path=str(folder)), state, tmp_path / "all", **SIZE)  # so that statistics need no pass of their own
    odd.count = 0
    encode(Folder(path=str(folder)), state, tmp_path / "out", **SIZE, stages=stages)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["reason"], "ValueError: planted" in line["message"]) for line in lines] == [("failed", True)]
    assert len(samples(tmp_path / "out")) == 35
