"""Media to shards: every sample once, bad files named, interruption and full disks survived."""

import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tarfile
import time
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load

from ovi.codecs import Codecs
from ovi.data.captions import find_captions, read_captions
from ovi.data.encode import encode
from ovi.data.files import whole_file
from ovi.data.index import ShardIndex
from ovi.data.media import Clip, read_clip, write_clip
from ovi.data.plan import key_fraction, validation_keys
from ovi.data.sources import SOURCES, ClipFormat, Folder, Synthetic
from ovi.errors import OviError

SIZE = {"num_frames": 8, "height": 16, "width": 16}
FORM = ClipFormat(8, 8, 16, 16, 16000)
SPECS = {"video": {"name": "dct"}, "audio": {"name": "logmel"}, "text": {"name": "hashed"}}


def codecs() -> Codecs:
    return Codecs.build(SPECS, fps=8)


def scene(seed: int, num_frames: int = 8) -> Clip:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 255, (num_frames, 2, 2, 3), dtype=np.uint8)
    frames = blocks.repeat(8, 1).repeat(8, 2)
    return Clip(frames, (0.1 * rng.standard_normal(num_frames * 2000)).astype(np.float32), 8, 16000)


def write_folder(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for n in range(count):
        write_clip(folder / f"clip {n:02d}.mp4", scene(n))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Ten good clips; the first two have captions, the first a truth as well."""
    made = write_folder(tmp_path_factory.mktemp("media"), 10)
    lines = [
        {"file": "clip 00.mp4", "caption": "first", "truth": {"count": 3}},
        {"file": "clip 01.mp4", "caption": "b"},
    ]
    (made / "captions.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return made


def samples(out: Path) -> dict[str, tuple[dict, dict]]:
    """Key -> (tensors, json) of every tar in a folder, read with the standard library alone."""
    files: dict[str, dict] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, suffix = member.name.split(".", 1)
                assert suffix not in files.setdefault(key, {})
                files[key][suffix] = tar.extractfile(member).read()
    return {key: (load(file["safetensors"]), json.loads(file["json"])) for key, file in files.items()}


def hashes(out: Path) -> dict[str, str]:
    """Checksums of a folder's files; how long the work took is left out of the index."""
    files = {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.is_file()}
    if "index.json" in files:
        content = json.loads(files["index.json"])
        assert content.pop("throughput")["process_seconds"] > 0
        files["index.json"] = json.dumps(content).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_shards_hold_what_the_codecs_make_of_the_clips(folder, tmp_path):
    mine, progress = codecs(), []
    summary = encode(
        Folder(path=str(folder)),
        mine,
        tmp_path,
        **SIZE,
        shard_size=4,
        val_fraction=0.3,
        dtype="float32",
        on_progress=lambda *at: progress.append(at),
    )
    found = samples(tmp_path)
    assert len(found) == 10 == sum(summary.num_samples.values())
    assert (summary.num_files, summary.num_captioned, summary.num_new, summary.rejected) == (10, 2, 10, {})
    assert [at for at in progress if at[0] == "encode"] == [("encode", n, 10) for n in range(1, 11)]
    by_file = {about["file"]: (tensors, about) for tensors, about in found.values()}
    for n in range(10):
        name = f"clip {n:02d}.mp4"
        tensors, about = by_file[name]
        clip = read_clip(folder / name, fps=8, sample_rate=16000, **SIZE)
        video, audio = mine.encode_clip(torch.from_numpy(clip.frames), torch.from_numpy(clip.waveform))
        torch.testing.assert_close(tensors["video"], video, atol=1e-5, rtol=0)
        torch.testing.assert_close(tensors["audio"], audio, atol=1e-5, rtol=0)
        assert torch.equal(tensors["text"], mine.text.encode([about["caption"]])[0])
        assert (about["start_s"], about["duration_s"]) == (0.0, 1.0)
    assert by_file["clip 00.mp4"][1] | {"start_s": 0, "duration_s": 1} == {
        "figures": {"span_s": 1.0},
        "truth": {"count": 3},
        "caption": "first",
        "file": "clip 00.mp4",
        "start_s": 0,
        "duration_s": 1,
    }
    assert by_file["clip 05.mp4"][1]["caption"] == ""


def test_the_index_says_what_is_there(folder, tmp_path):
    mine = codecs()
    encode(Folder(path=str(folder)), mine, tmp_path, **SIZE, shard_size=4, val_fraction=0.3)
    index = ShardIndex.load(tmp_path)
    content = json.loads((tmp_path / "index.json").read_text())
    assert index.latent_shapes == {"video": (12, 8, 2, 2), "audio": (31, 64)}
    assert index.clock == mine.clock
    assert index.codecs().to_dict() == mine.to_dict()
    listed = {s["file"]: s for split in content["splits"].values() for s in split["shards"]}
    on_disk = {name: digest for name, digest in hashes(tmp_path).items() if name.endswith(".tar")}
    assert {name: s["sha256"] for name, s in listed.items()} == on_disk
    for name, shard in listed.items():
        with tarfile.open(tmp_path / name) as tar:
            assert len(tar.getnames()) == 2 * shard["num_samples"] <= 8
    latents = torch.stack([tensors["video"].float() for tensors, about in samples(tmp_path).values()])
    assert latents.std() == pytest.approx(1, abs=0.2)


def test_a_second_run_does_nothing_and_several_processes_make_the_same(folder, tmp_path):
    encode(Folder(path=str(folder)), codecs(), tmp_path / "a", **SIZE, shard_size=4)
    before = hashes(tmp_path / "a")
    again = encode(Folder(path=str(folder)), codecs(), tmp_path / "a", **SIZE, shard_size=4)
    assert (again.num_new, hashes(tmp_path / "a")) == (0, before)
    encode(Folder(path=str(folder)), codecs(), tmp_path / "b", **SIZE, shard_size=4, num_workers=2)
    assert hashes(tmp_path / "b") == before


def test_long_files_give_consecutive_clips(tmp_path):
    (tmp_path / "in").mkdir()
    write_clip(tmp_path / "in" / "long.mp4", scene(1, num_frames=29))
    write_clip(tmp_path / "in" / "short.mp4", scene(2, num_frames=8))
    source = Folder(path=str(tmp_path / "in"))
    encode(source, codecs(), tmp_path / "all", **SIZE, val_fraction=0.5, dtype="float32")
    about = [(about["file"], about["start_s"]) for _, about in samples(tmp_path / "all").values()]
    assert sorted(about) == [("long.mp4", 0.0), ("long.mp4", 1.0), ("long.mp4", 2.0), ("short.mp4", 0.0)]
    encode(source, codecs(), tmp_path / "two", **SIZE, val_fraction=0.5, clips_per_file=2)
    about = [(about["file"], about["start_s"]) for _, about in samples(tmp_path / "two").values()]
    assert sorted(about) == [("long.mp4", 0.0), ("long.mp4", 1.0), ("short.mp4", 0.0)]
    for split in ShardIndex.load(tmp_path / "all").splits.values():
        assert len(split) == 1  # the long file's clips are all on one side


def test_a_codec_that_knows_its_statistics_keeps_them(folder, tmp_path):
    mine = codecs()
    encode(Folder(path=str(folder)), mine, tmp_path / "a", **SIZE)
    state = mine.to_dict()["state"]
    source = Folder(path=str(write_folder(tmp_path / "other", 2)))
    encode(source, mine, tmp_path / "b", **SIZE)
    assert mine.to_dict()["state"] == state == ShardIndex.load(tmp_path / "b").codecs().to_dict()["state"]


def test_synthetic_source_brings_its_truth_and_is_not_drawn_twice(tmp_path):
    source = Synthetic(path=str(tmp_path / "clips"), num_clips=3, seed=5)
    encode(source, codecs(), tmp_path / "out", num_frames=16, height=16, width=16)
    truths = [about["truth"] for _, about in samples(tmp_path / "out").values()]
    assert len(truths) == 3
    assert all(len(truth["impacts_s"]) == truth["count"] > 0 for truth in truths)
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "clips").glob("*.mp4")}
    fewer = Synthetic(path=str(tmp_path / "clips"), num_clips=2, seed=5)
    assert len(fewer.items(ClipFormat(8, 16, 16, 16, 16000))) == 2
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "clips").glob("*.mp4")} == times


# --- the split -------------------------------------------------------------------------------------------------------


def test_adding_files_moves_none_to_another_split():
    keys = [f"clip-{n}" for n in range(400)]
    few, many = validation_keys(keys[:100], 0.2), validation_keys(keys, 0.2)
    assert few == many & set(keys[:100])
    assert len(many) / 400 == pytest.approx(0.2, abs=0.06)
    assert all((key_fraction(key) < 0.2) == (key in many) for key in keys)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_a_handful_of_files_trains_and_validates(count, fraction):
    for trial in range(30):
        chosen = validation_keys([f"{trial}-{n}" for n in range(count)], fraction)
        assert 1 <= len(chosen) < count


def test_one_file_alone_trains():
    assert validation_keys(["only"], 0.99) == set()
    assert validation_keys(["a", "b"], 0.0) == set()


# --- bad input -------------------------------------------------------------------------------------------------------


def mux(path: Path, *, video: bool, audio: bool, uneven: bool = False) -> None:
    """A file of one second written with PyAV alone, so that it can lack a stream or have uneven frames."""
    with av.open(str(path), "w") as container:
        streams = []
        if video:
            picture = container.add_stream("libx264", rate=8)
            picture.width = picture.height = 16
            picture.pix_fmt = "yuv420p"
            picture.codec_context.time_base = Fraction(1, 64)
            streams.append(picture)
        if audio:
            sound = container.add_stream("aac", rate=16000, layout="mono")
            streams.append(sound)
        if video:
            at = 0
            for n in range(12):
                frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 20 * n, np.uint8), format="rgb24")
                frame.pts, frame.time_base = at, Fraction(1, 64)
                at += (3 if n % 2 else 17) if uneven else 8
                container.mux(picture.encode(frame))
            container.mux(picture.encode(None))
        if audio:
            wave = np.zeros((1, 24000), np.float32)
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 0
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))


def truncated(path: Path) -> None:
    write_clip(path, scene(5))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD = {
    "no_audio": lambda path: mux(path, video=True, audio=False),
    "no_video": lambda path: mux(path, video=False, audio=True),
    "variable_frame_rate": lambda path: mux(path, video=True, audio=True, uneven=True),
    "too_short": lambda path: write_clip(path, scene(6, num_frames=4)),
    "unreadable": lambda path: path.write_text("this is not a video"),
    "truncated or unreadable": truncated,
    "unreadable (empty)": lambda path: path.touch(),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_file_among_good_ones_is_left_out_counted_and_listed(reason, tmp_path):
    source = write_folder(tmp_path / "in", 3)
    BAD[reason](source / "a bäd file.mp4")
    summary = encode(Folder(path=str(source)), codecs(), tmp_path / "out", **SIZE, shard_size=2)
    assert sum(summary.num_samples.values()) == 3 == len(samples(tmp_path / "out"))
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    rejection = json.loads(line)
    assert rejection["file"] == "a bäd file.mp4"
    assert rejection["reason"] in reason
    assert "a bäd file.mp4" in rejection["message"]
    assert summary.rejected == {rejection["reason"]: 1}
    assert json.loads((tmp_path / "out" / "index.json").read_text())["rejected"] == summary.rejected


def test_only_bad_files_are_an_error_that_says_why(tmp_path):
    (tmp_path / "in").mkdir()
    for n, reason in enumerate(("no_audio", "no_audio", "unreadable")):
        BAD[reason](tmp_path / "in" / f"{n}.mp4")
    with pytest.raises(OviError, match=r"3 rejected|2 rejected|1 rejected"):
        encode(Folder(path=str(tmp_path / "in")), codecs(), tmp_path / "out", **SIZE, val_fraction=0.0)
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 3
    with pytest.raises(OviError, match="not finished"):
        ShardIndex.load(tmp_path / "out")


def test_a_resampled_variable_frame_rate_is_taken(tmp_path):
    source = write_folder(tmp_path / "in", 1)
    BAD["variable_frame_rate"](source / "phone.mp4")
    summary = encode(Folder(path=str(source)), codecs(), tmp_path / "out", **SIZE, variable_frame_rate="resample")
    assert (sum(summary.num_samples.values()), summary.rejected) == (2, {})


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: (p.mkdir(), (p / "a.txt").touch())])
def test_a_folder_without_media_is_an_error(make, tmp_path):
    make(tmp_path / "in")
    with pytest.raises(OviError, match=r"no such folder|no \.mp4"):
        encode(Folder(path=str(tmp_path / "in")), codecs(), tmp_path / "out", **SIZE)


def test_odd_names_and_subfolders_are_found_and_get_plain_unique_keys(tmp_path):
    names = ["a b.mp4", "a_b.mp4", "ünï/клип №1.MOV", "deep/er/x.y.z.webm", "q'\"; rm.mkv"]
    for name in [*names, ".hidden/x.mp4", "notes.txt", ".half.mp4"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    items = Folder(path=str(tmp_path)).items(FORM)
    assert [item.file for item in items] == sorted(names)
    assert len({item.key for item in items}) == len(names)
    assert all(set(item.key) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") for item in items)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"height": 20}, "20x16.*stride of 8"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"dtype": "int4"}, "float16, bfloat16, float32, int8, got 'int4'"),
        ({"shard_size": 0}, "shard_size must be at least 1"),
        ({"clips_per_file": 0}, "clips_per_file must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_named_before_anything_is_written(change, expected, folder, tmp_path):
    with pytest.raises(OviError, match=expected):
        encode(Folder(path=str(folder)), codecs(), tmp_path / "out", **{**SIZE, **change})
    assert not (tmp_path / "out").exists()


def test_sources_are_registered_with_their_knobs():
    assert {"folder", "synthetic"} <= set(SOURCES)
    assert not any(SOURCES.wiring(name) for name in SOURCES)


# --- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "captions.jsonl",
            '{"file": "a.mp4", "caption": "x"}\n{"file": "gone.mp4", "caption": ""}',
            "line 2.*gone.mp4",
        ),
        ("captions.jsonl", '\n{"file": "a.mp4", "caption": "x"', "line 2: is not JSON"),
        ("captions.jsonl", '["a.mp4", "x"]', "line 1: expected one object"),
        ("captions.jsonl", '{"file": "a.mp4"}', "line 1: needs the strings"),
        ("captions.jsonl", '{"file": "a.mp4", "caption": 7}', "line 1: needs the strings"),
        (
            "captions.jsonl",
            '{"file": "a.mp4", "caption": "x"}\n\n{"file": "./a.mp4", "caption": "y"}',
            "line 3.*already, in line 1",
        ),
        ("captions.csv", "file,text\na.mp4,x\n", "line 1: expected a header"),
        ("captions.csv", "", "line 1: expected a header"),
        ("captions.csv", "file,caption\na.mp4,x\ngone.mp4,y\n", "line 3.*gone.mp4"),
        ("captions.csv", "file,caption\na.mp4,one, two\n", "line 2: has more cells.*quote"),
        ("captions.csv", "file,caption\na.mp4\n", "line 2: needs the strings"),
    ],
)
def test_bad_captions_are_named_by_line(name, text, expected, tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / name).write_text(text)
    with pytest.raises(OviError, match=expected):
        read_captions(tmp_path / name, tmp_path)


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.csv"])
def test_captions_of_both_kinds_keep_every_field(name, tmp_path):
    (tmp_path / "sub").mkdir()
    for file in ("a b.mp4", "sub/ü.mp4"):
        (tmp_path / file).touch()
    if name.endswith("csv"):
        text = '\ufefffile,caption,who\na b.mp4,"one, two\nlines",me\nsub/ü.mp4,,you\n'
    else:
        rows = [
            {"file": "a b.mp4", "caption": "one, two\nlines", "who": "me"},
            {"file": "sub/ü.mp4", "caption": "", "who": "you"},
        ]
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_captions(find_captions(tmp_path), tmp_path) == {
        "a b.mp4": {"caption": "one, two\nlines", "who": "me"},
        "sub/ü.mp4": {"caption": "", "who": "you"},
    }


def test_two_caption_files_are_one_too_many(tmp_path):
    for name in ("captions.jsonl", "captions.csv"):
        (tmp_path / name).touch()
    with pytest.raises(OviError, match="which one counts"):
        find_captions(tmp_path)


def test_captions_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "captions.csv").write_bytes(b"\xff\xfe\x00file")
    with pytest.raises(OviError, match="UTF-8"):
        read_captions(tmp_path / "captions.csv", tmp_path)


# --- interruption ----------------------------------------------------------------------------------------------------

SLOW_RUN = """
import sys, time
from ovi.codecs import Codecs
from ovi.data.encode import encode
from ovi.data.sources import Folder
source, out, workers = sys.argv[1:]
def progress(*at):
    print(*at, flush=True)
    time.sleep(0.02)
if __name__ == "__main__":
    encode(Folder(path=source), Codecs.build({specs}, fps=8), out, **{size}, shard_size=2, num_workers=int(workers),
           on_progress=progress)
"""


def killed_run(source: Path, out: Path, after: int, workers: int) -> None:
    """Start the command and kill it once it has reported ``after`` encoded clips."""
    script = out.parent / f"run_{out.name}.py"
    script.write_text(SLOW_RUN.format(specs=SPECS, size=SIZE))
    process = subprocess.Popen(
        [sys.executable, str(script), str(source), str(out), str(workers)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "RUN_OF_TEST": str(script)},
    )
    for line in process.stdout:
        if line.startswith(f"encode {after} "):
            process.kill()
            break
    process.wait(timeout=30)
    process.stdout.close()
    assert process.returncode != 0
    assert_workers_end(script)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_continues_to_the_very_same_set(workers, folder, tmp_path):
    encode(Folder(path=str(folder)), codecs(), tmp_path / "whole", **SIZE, shard_size=2)
    out = tmp_path / "killed"
    after = random.randint(1, 9)
    killed_run(folder, out, after, workers)
    with pytest.raises(OviError, match=r"not finished.*continues"):
        ShardIndex.load(out)
    kept = hashes(out)
    assert {name: digest for name, digest in hashes(tmp_path / "whole").items() if name in kept} == {
        name: digest for name, digest in kept.items() if not name.endswith(".partial")
    }, f"killed after {after}"
    summary = encode(Folder(path=str(folder)), codecs(), out, **SIZE, shard_size=2)
    assert hashes(out) == hashes(tmp_path / "whole"), f"killed after {after}"
    assert summary.num_new <= 10 - (after // 2 - 1) * 2


@pytest.mark.parametrize("after", [1, 4, 5, 10])
def test_an_interrupted_run_continues_to_the_very_same_set(after, folder, tmp_path):
    encode(Folder(path=str(folder)), codecs(), tmp_path / "whole", **SIZE, shard_size=2)

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("encode", after):
            raise KeyboardInterrupt

    out = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        encode(Folder(path=str(folder)), codecs(), out, **SIZE, shard_size=2, on_progress=interrupt)
    assert not list(out.glob("*.partial"))
    assert not (out / "index.json").exists()
    summary = encode(Folder(path=str(folder)), codecs(), out, **SIZE, shard_size=2)
    assert 10 - after <= summary.num_new <= 12 - after
    assert hashes(out) == hashes(tmp_path / "whole")


def assert_workers_end(script: Path) -> None:
    deadline = time.monotonic() + 10
    while alive := [p.name for p in Path("/proc").glob("[0-9]*") if _mentions(p, str(script).encode())]:
        assert time.monotonic() < deadline, f"workers outlive their killed parent: {alive}"
        time.sleep(0.1)


def _mentions(process: Path, script: bytes) -> bool:
    try:
        # Multiprocessing hands a spawned child its pipes, not its script; the parent's folder is in its environment.
        return script in (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
    except OSError:
        return False


@pytest.mark.parametrize("harm", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-512] + b"x" * 512)])
def test_a_shard_lost_or_damaged_is_made_again(harm, folder, tmp_path):
    encode(Folder(path=str(folder)), codecs(), tmp_path, **SIZE, shard_size=2)
    before = hashes(tmp_path)
    harm(tmp_path / "train-000001.tar")
    summary = encode(Folder(path=str(folder)), codecs(), tmp_path, **SIZE, shard_size=2)
    assert summary.num_new == 2
    assert hashes(tmp_path) == before


def test_other_settings_are_named_and_overwrite_replaces(folder, tmp_path):
    encode(Folder(path=str(folder)), codecs(), tmp_path, **SIZE, shard_size=2)
    (tmp_path / "notes.txt").write_text("mine")
    other = {**SIZE, "height": 24}
    with pytest.raises(OviError, match=r"height was 16, now 24.*overwrite=true"):
        encode(Folder(path=str(folder)), codecs(), tmp_path, **other, shard_size=2)
    encode(Folder(path=str(folder)), codecs(), tmp_path, **other, shard_size=5, overwrite=True)
    assert ShardIndex.load(tmp_path).height == 24
    assert len(samples(tmp_path)) == 10
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_files_whose_content_alone_changed_are_told_of_and_all_can_be_encoded_anew(tmp_path):
    source, out = write_folder(tmp_path / "in", 3), tmp_path / "out"
    encode(Folder(path=str(source)), codecs(), out, **SIZE)
    before, file = hashes(out), source / "clip 01.mp4"
    other = bytearray(file.read_bytes())
    other[len(other) // 2] ^= 1
    time.sleep(0.05)
    file.write_bytes(other)
    with pytest.warns(UserWarning, match=r"1 files were written to since .*out was begun, the first clip 01\.mp4"):
        assert encode(Folder(path=str(source)), codecs(), out, **SIZE).num_new == 0
    assert hashes(out) == before
    (out / "notes.txt").write_text("mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encode(Folder(path=str(source)), codecs(), out, **SIZE, overwrite="all").num_new == 3
        assert encode(Folder(path=str(source)), codecs(), out, **SIZE).num_new == 0
    assert (out / "notes.txt").exists()
    with pytest.raises(OviError, match="overwrite is false, true or all, got 'everything'"):
        encode(Folder(path=str(source)), codecs(), out, **SIZE, overwrite="everything")
    for place in (out, f"file://{tmp_path}/b"):
        with pytest.raises(OviError, match="overwrite=all is for one process: of 2 each would remove"):
            encode(Folder(path=str(source)), codecs(), place, **SIZE, overwrite="all", rank=1, world_size=2)


def test_videos_of_other_suffixes_are_told_of_and_taken_when_asked(tmp_path):
    source = write_folder(tmp_path / "in", 3)
    (source / "clip 01.mp4").rename(source / "clip 01.m4v")
    (source / "clip 02.mp4").rename(source / "clip 02.AVI")
    told = r"passed over 1 \.m4v, 1 \.avi files; source\.suffixes=\[\.mp4,\.m4v,\.avi\] takes them"
    for path in (str(source), f"file://{source}"):
        with pytest.warns(UserWarning, match=told):
            assert [item.file for item in Folder(path=path).items(FORM)] == ["clip 00.mp4"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(Folder(path=path, suffixes=[".mp4", ".m4v", ".avi"]).items(FORM)) == 3
    assert Folder(path="x", suffixes=[".avi"]).describe()["suffixes"] == [".avi"]
    for wrong in (".avi", [], ["avi"]):
        with pytest.raises(OviError, match=r"source\.suffixes is a list"):
            Folder(path="x", suffixes=wrong)


def test_a_source_that_changed_is_named(tmp_path):
    source = write_folder(tmp_path / "in", 3)
    encode(Folder(path=str(source)), codecs(), tmp_path / "out", **SIZE)
    write_clip(source / "new.mp4", scene(9))
    with pytest.raises(OviError, match=r"source files and captions was \"3 files.*now \"4 files.*grow=true"):
        encode(Folder(path=str(source)), codecs(), tmp_path / "out", **SIZE)
    (source / "clip 01.mp4").unlink()
    with pytest.raises(OviError, match=r"source files and captions was \"3 files.*now \"3 files") as gone:
        encode(Folder(path=str(source)), codecs(), tmp_path / "out", **SIZE)
    assert "grow" not in str(gone.value)


def test_other_codecs_and_other_statistics_are_named(folder, tmp_path):
    encode(Folder(path=str(folder)), codecs(), tmp_path, **SIZE)
    with pytest.raises(OviError, match="codecs was"):
        encode(
            Folder(path=str(folder)),
            Codecs.build({**SPECS, "audio": {"name": "logmel", "knobs": {"mel_bins": 20}}}, fps=8),
            tmp_path,
            **SIZE,
        )
    mine = codecs()
    mine.fit([(torch.zeros(8, 16, 16, 3, dtype=torch.uint8), torch.zeros(16000))])
    with pytest.raises(OviError, match="other statistics"):
        encode(Folder(path=str(folder)), mine, tmp_path, **SIZE)


def test_shards_of_an_unknown_run_are_not_mixed_with(folder, tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(b"whose?")
    with pytest.raises(OviError, match=r"unknown run.*overwrite=true"):
        encode(Folder(path=str(folder)), codecs(), tmp_path, **SIZE)
    encode(Folder(path=str(folder)), codecs(), tmp_path, **SIZE, overwrite=True)
    assert len(samples(tmp_path)) == 10


def test_a_full_disk_is_one_clear_error_and_leaves_no_half_shard(folder, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # a shard of ten clips needs more, the journal less
    try:
        with pytest.raises(OviError, match=r"no space left.*run the same command again to continue"):
            encode(Folder(path=str(folder)), codecs(), tmp_path, **SIZE, val_fraction=0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*.tar*"))
    assert not (tmp_path / "index.json").exists()
    encode(Folder(path=str(folder)), codecs(), tmp_path, **SIZE, val_fraction=0.0)
    assert len(samples(tmp_path)) == 10


def interrupted_write(path: Path) -> None:
    with whole_file(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    with pytest.raises(KeyboardInterrupt):
        interrupted_write(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_that_cannot_be_written_is_named(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OviError, match="cannot write there"):
        encode(Folder(path=str(folder)), codecs(), tmp_path / "file" / "out", **SIZE)
