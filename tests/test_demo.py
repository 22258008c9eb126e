"""The demo's own logic; `.ci/run` runs the demo itself."""

import json

import pytest

from ovi.commands.demo import SIZES, VARIANTS, held_out, parse, show
from ovi.commands.measure import measure
from ovi.data.synthetic import write_synthetic
from ovi.errors import OviError


def test_words_become_keywords(tmp_path):
    given = parse(["size=smoke", "ablation=true", f"out={tmp_path}", "seed=4", "steps=9"])
    assert given == {"size": "smoke", "ablation": True, "out": tmp_path, "seed": 4, "steps": 9}
    assert parse([]) == {}


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("sise=smoke", "Did you mean 'size'"),
        ("size=huge", "full or smoke"),
        ("steps=many", "steps"),
        ("ablation=perhaps", "ablation"),
        ("full", "does not take"),
    ],
)  # fmt: skip
def test_bad_words_are_named(word, says):
    with pytest.raises(OviError, match=says):
        parse([word])


def test_held_out_clips_are_files_with_their_captions(tiny_shards):
    captions, files, form = held_out(tiny_shards.parent, 3)
    assert form == {"fps": 8, "num_frames": 12, "height": 32, "width": 32}
    lines = [json.loads(line) for line in (tiny_shards.parent / "clips" / "captions.jsonl").read_text().splitlines()]
    said = {line["file"]: line["caption"] for line in lines}
    assert [said[file.name] for file in files] == captions
    assert all(file.is_file() for file in files)


def test_measuring_mp4s_finds_planted_truth_and_a_planted_delay(tmp_path):
    """Real pairs are near zero; the same pictures with sound 120 ms late measure 120 ms."""
    import numpy as np

    from ovi.data.media import Clip, read_clip, write_clip

    form = {"fps": 12, "num_frames": 24, "height": 32, "width": 32}
    write_synthetic(tmp_path, num_clips=6, seed=2, sample_rate=16000, **form)
    files = sorted(tmp_path.glob("*.mp4"))
    figures = measure(files, **form)
    assert figures["impact_offset_ms"] < 15
    assert figures["impact_offset_coverage"] == 1
    assert figures["impact_offset_n"] == 6
    late = []
    for file in files:
        clip = read_clip(file, sample_rate=16000, **form)
        wave = np.concatenate([np.zeros(1920, np.float32), clip.waveform])[: len(clip.waveform)]
        late.append(tmp_path / f"late_{file.name}")
        write_clip(late[-1], Clip(clip.frames, wave, 12, 16000))
    # An impact near the end may lose its onset, so not every pair is there.
    assert measure(late, **form)["impact_offset_ms"] == pytest.approx(120, abs=25)


def test_table_shows_every_row_and_where_to_look(tmp_path, capsys):
    figures = {"impact_offset_ms": 17.2, "impact_offset_coverage": 1.0, "impact_offset_n": 64.0}
    figures["impact_offset_match_rate"] = 0.74
    figures |= {"av_offset_xcorr_ms": float("nan"), "av_offset_xcorr_coverage": 0.0, "av_offset_xcorr_n": 64.0}
    summary = {"metrics": {"val/loss": 0.2511, "val/loss_video": 0.3, "val/loss_audio": 0.1}}
    rows = {"real clips": {"figures": figures}}
    rows |= {name: {"figures": figures, "summary": summary, "clips": f"x/{name}"} for name in VARIANTS}
    show({"rows": rows, "seconds": {"train": 61.4}, "peak_memory_gb": 1.5}, tmp_path)
    out = capsys.readouterr().out
    assert all(name in out for name in rows)
    assert "17 ms" in out
    assert "none found" in out
    assert "74%" in out
    assert "0.251" in out
    assert "train 61 s" in out
    assert "tensorboard --logdir" in out


def test_smoke_is_its_own_set_of_clips():
    assert SIZES["smoke"].data != SIZES["full"].data
