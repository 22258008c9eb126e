"""Codecs that take several clips at a time, and clips that one of them, or a process, does not survive."""

import importlib
import json
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from ovi.codecs import Codecs
from ovi.codecs.base import TEXT_ENCODERS, VIDEO_CODECS
from ovi.data import encode_runs
from ovi.data.clip_encoder import ClipEncoder
from ovi.data.encode import encode
from ovi.data.media import Clip, write_clip
from ovi.data.plan import ClipJob
from ovi.data.process_pool import Crash, ProcessPool
from ovi.data.rejection import Rejection
from ovi.data.sources import Folder
from ovi.data.stages.base import STAGES
from ovi.errors import OviError
from test_encode import FORM, SIZE, SPECS, codecs, hashes, samples, scene, write_folder


@pytest.fixture
def plugins():
    """A user's codecs and stage, registered for the time of a test."""
    found = importlib.import_module("encode_plugins")
    yield found
    forget_plugins()


def forget_plugins():
    """Take away what that module registered, and no other's."""
    for registry in (STAGES, VIDEO_CODECS, TEXT_ENCODERS):
        for name in [name for name in registry if registry[name].__module__ == "encode_plugins"]:
            del registry._entries[name]
    del sys.modules["encode_plugins"]


def planted(**knobs):
    video = {"name": "tests_video", "knobs": knobs}
    return Codecs.build({**SPECS, "video": video, "text": {"name": "tests_text"}}, fps=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine clips; every third has its own caption, the others share one. The fifth is black."""
    made = write_folder(tmp_path_factory.mktemp("media"), 9)
    black = scene(4)
    write_clip(made / "clip 04.mp4", Clip(np.zeros_like(black.frames), black.waveform, 8, 16000))
    lines = [{"file": f"clip {n:02d}.mp4", "caption": f"own {n}" if n % 3 == 0 else "shared"} for n in range(9)]
    (made / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return made


def run(folder, out, mine, **knobs):
    encode(Folder(path=str(folder)), mine, out, **SIZE, val_fraction=0, dtype="float32", **knobs)
    lines = (out / "rejected.jsonl").read_text().splitlines()
    return {json.loads(line)["file"]: json.loads(line)["reason"] for line in lines}


def test_batches_hold_what_single_clips_would_and_one_bad_clip_goes_alone(folder, tmp_path, plugins):
    alone = planted()
    rejected = run(folder, tmp_path / "1", alone, shard_size=7)
    assert rejected == {"clip 04.mp4": "not_finite"}
    mine = planted()
    mine.load_state(alone.state())
    plugins.PluginVideo.batches.clear()
    plugins.PluginText.asked.clear()
    stages = {"loud": {"name": "loudness", "knobs": {}}}
    importlib.import_module("ovi.data.stages.loudness")
    assert run(folder, tmp_path / "3", mine, shard_size=7, batch_size=3, stages=stages) == rejected
    assert plugins.PluginVideo.batches == [3, 3, 1, 2]  # shards of seven and two
    assert plugins.PluginText.asked == [["own 0", "shared"], ["own 3", "shared"], ["own 6"], ["shared"]]
    one, three = samples(tmp_path / "1"), samples(tmp_path / "3")
    assert one.keys() == three.keys()
    for key, (tensors, about) in one.items():
        assert about["caption"] == three[key][1]["caption"]
        for name, tensor in tensors.items():
            torch.testing.assert_close(three[key][0][name], tensor, atol=1e-5, rtol=0)


def test_clips_that_are_rejected_leave_no_gap_in_a_batch(folder, plugins):
    mine = planted()
    mine.load_state({**mine.state(), "video": {**mine.state()["video"], "fitted": True}})
    encoder = ClipEncoder(mine, FORM, "float32", "reject", batch_size=2)
    jobs = [ClipJob(item.key, item, 0.0, item.caption) for item in Folder(path=str(folder)).items(FORM)]
    beyond = [ClipJob(f"{job.key}-x", job.item, 5.0) for job in jobs]
    plugins.PluginVideo.batches.clear()
    made = encoder.encode_run([jobs[0], beyond[1], beyond[2], jobs[3], jobs[5]])
    assert plugins.PluginVideo.batches == [2, 1]
    assert [isinstance(one, dict) for one in made] == [True, False, False, True, True]
    assert [len(run) for run in encoder.runs(jobs)] == [8, 1]


def test_a_batch_too_large_is_taken_clip_by_clip_and_one_too_large_is_left_out(folder, tmp_path, plugins):
    fitted = planted()
    run(folder, tmp_path / "whole", fitted)
    mine = planted(most=1, dark=5)
    mine.load_state(fitted.state())
    assert run(folder, tmp_path / "out", mine, batch_size=4) == {"clip 04.mp4": "out_of_memory"}
    assert {n for n, _ in samples(tmp_path / "out").items()} == {n for n, _ in samples(tmp_path / "whole").items()}


def test_any_other_error_of_a_codec_ends_the_run(folder, tmp_path, plugins, monkeypatch):
    mine = planted()
    mine.load_state({**mine.state(), "video": {**mine.state()["video"], "fitted": True}})

    def broken(signal):
        raise RuntimeError("planted")

    monkeypatch.setattr(mine.video, "encode_raw", broken)
    encoder = ClipEncoder(mine, FORM, "float32", "reject")
    (job, *_) = [ClipJob(item.key, item, 0.0) for item in Folder(path=str(folder)).items(FORM)]
    with pytest.raises(RuntimeError, match="planted"):
        encoder.encode(job)


def test_captions_seen_lately_are_not_embedded_again(folder, plugins):
    mine = planted()
    encoder = ClipEncoder(mine, FORM, "float32", "reject")
    (job, *_) = [ClipJob(item.key, item, 0.0) for item in Folder(path=str(folder)).items(FORM)]
    candidate = encoder.read(job)
    plugins.PluginText.asked.clear()

    def embed(text):
        return encoder._embeddings([(job, replace(candidate, caption=text))])[0]

    first = embed("a")
    assert embed("a") is first
    for n in range(100):
        embed(f"other {n}")
    assert len(encoder._texts) == 64
    assert torch.equal(embed("a"), first)
    assert [asked for asked in plugins.PluginText.asked if asked == ["a"]] == [["a"], ["a"]]


# --- processes that end ----------------------------------------------------------------------------------------------


def test_what_ends_a_run_is_found_and_the_others_keep_their_batches(monkeypatch, folder):
    items = Folder(path=str(folder)).items(FORM)
    jobs = [ClipJob(item.key, item, 0.0) for item in items[:5]]
    in_reading, in_codecs = jobs[1].key, jobs[3].key
    asked = []

    def alone(work, task):
        asked.append((work.__name__, [job.key for job in task] if isinstance(task, list) else task.key))
        if work is encode_runs._only_read and task.key == in_reading:
            raise Crash("signal 11, SIGSEGV")
        if work is encode_runs._encode_run:
            if any(job.key == in_codecs for job in task) or any(job.key == in_reading for job in task):
                raise Crash("signal 6, SIGABRT")
            return [{"json": job.key.encode()} for job in task], {"read": [1.0, len(task)]}

    made, times = encode_runs._encode_the_others(jobs, alone, Crash("x"))
    said = [one.reason if isinstance(one, Rejection) else one["json"].decode() for one in made]
    assert said == [jobs[0].key, "crashed", jobs[2].key, "crashed", jobs[4].key]
    assert "SIGSEGV" in made[1].message
    assert items[1].file in made[1].message
    assert "SIGABRT" in made[3].message
    assert times == {"read": [3.0, 3]}
    together = next(task for name, task in asked if name == "_encode_run")
    assert together == [job.key for job in jobs if job.key != in_reading]


@pytest.mark.slow
def test_a_clip_that_kills_its_process_is_left_out_and_named(folder, tmp_path, plugins):
    state, batch_size = codecs(), 2
    run(folder, tmp_path / "whole", state, batch_size=batch_size)
    stages = {"deadly": {"name": "tests_deadly", "knobs": {"file": "clip 03.mp4"}}}
    rejected = run(folder, tmp_path / "out", state, stages=stages, num_workers=2, batch_size=batch_size)
    assert rejected == {"clip 03.mp4": "crashed"}
    assert "SIGSEGV" in (tmp_path / "out" / "rejected.jsonl").read_text()
    whole, left = samples(tmp_path / "whole"), samples(tmp_path / "out")
    assert whole.keys() - left.keys() == {key for key in whole if key.startswith("clip_03")}
    for key in left:
        assert all(torch.allclose(left[key][0][n], whole[key][0][n], atol=1e-5) for n in ("video", "audio", "text"))


@pytest.mark.slow
def test_a_process_killed_once_costs_nothing_but_time(folder, tmp_path, plugins):
    state = codecs()
    stages = {"deadly": {"name": "tests_deadly", "knobs": {"file": "clip 03.mp4", "once": str(tmp_path / "done")}}}
    (tmp_path / "done").touch()
    run(folder, tmp_path / "whole", state, stages=stages)
    (tmp_path / "done").unlink()
    assert run(folder, tmp_path / "out", state, stages=stages, num_workers=2) == {}
    assert (tmp_path / "done").exists()
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


class Unfit:
    def __reduce__(self):
        return importlib.import_module, ("no_such_plugin",)


def _held(held, task):
    return held, task


def test_an_error_as_a_worker_starts_is_said():
    with ProcessPool(1, Unfit()) as pool, pytest.raises(OviError, match=r"could not start: .*no_such_plugin"):
        next(pool.ordered([1], _held, ahead=1))


def test_codecs_of_a_users_module_are_found_in_another_process(plugins):
    mine = planted(most=5)
    encoder = ClipEncoder(mine, FORM, "float32", "reject")
    make, arguments = encoder.__reduce__()
    forget_plugins()  # as in a process that has not seen it
    again = make(*arguments)
    assert type(again.codecs.video).__name__ == "PluginVideo"
    assert again.codecs.video.most == 5
    sys.modules["encode_plugins"] = plugins


def test_a_reader_for_another_process_is_made_without_building_codecs(monkeypatch):
    encoder = ClipEncoder(codecs(), FORM, "float32", "reject", batch_size=3)
    monkeypatch.setattr(Codecs, "from_dict", lambda *args: pytest.fail("codecs were built"))
    sent = pickle.loads(pickle.dumps(encoder.only_reading()))
    assert (sent.codecs, sent.batch_size, sent.form) == (None, 3, FORM)
    again = pickle.loads(pickle.dumps(sent.only_reading()))
    assert again.form == FORM
