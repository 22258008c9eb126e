"""The report: counts by stage and reason, and every histogram's bars and thresholds, read off the drawing itself."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from ovi.data.report import _figure, data_report, read_records, rejection_counts
from ovi.errors import OviError


def record(n: int, **figures) -> dict:
    return {"file": f"{n}.mp4", "start_s": 0.0, "duration_s": 2.0, "key": str(n), "figures": figures}


def left_out(n: int, stage: str, reason: str, figure: str | None, threshold: float | None, **figures) -> dict:
    why = {"stage": stage, "reason": reason, "message": "", "figure": figure, "threshold": threshold}
    return {**record(n, **figures), **why}


KEPT = [record(n, loudness_db=-30.0 + n % 10, motion=0.1 + 0.01 * n) for n in range(20)]
REJECTED = [
    *(left_out(n, "loudness", "quiet", "loudness_db", -60.0, loudness_db=-70.0 - n) for n in range(5)),
    *(left_out(n, "motion", "little_motion", "motion", 0.05, loudness_db=-25.0, motion=0.01 * n) for n in range(3)),
    {
        "file": "old.mp4",
        "start_s": 0.0,
        "reason": "unreadable",
        "message": "as encode wrote it before there were stages",
    },
    left_out(9, "sync", "out_of_sync", None, None, motion=None),
]


def test_counts_by_stage_and_reason():
    assert rejection_counts(REJECTED) == [
        ("loudness", "quiet", 5),
        ("motion", "little_motion", 3),
        ("read", "unreadable", 1),
        ("sync", "out_of_sync", 1),
    ]


def test_every_candidate_is_in_one_bar_and_thresholds_are_marked():
    drawn = _figure(KEPT, REJECTED, {"motion": [0.05, 0.9]}, table=True)
    loudness, motion = drawn.axes
    assert loudness.get_title(loc="left") == "loudness_db   (28)"
    heights = [[round(float(bar.get_height())) for bar in bars] for bars in loudness.containers]
    assert [sum(h) for h in heights] == [20, 5, 3]
    lines = {round(float(line.get_xdata()[0]), 6) for line in loudness.lines}
    assert lines == {-60.0}
    assert [sum(round(float(b.get_height())) for b in bars) for bars in motion.containers] == [20, 3, 0]
    marked = {round(float(line.get_xdata()[0]), 6) for line in motion.lines}
    assert 0.05 in marked
    assert len(marked) == 2
    assert any("0.9 (beyond)" in text.get_text() for text in motion.texts)
    texts = [text.get_text() for text in drawn.texts]
    assert texts[:4] == ["kept", "", "20", "66.7 %"]
    assert "little_motion" in texts


def test_one_html_page_holds_table_and_pictures_and_asks_for_nothing(tmp_path):
    page = data_report(KEPT, REJECTED, tmp_path / "report.html").read_text()
    assert re.search(r"<td>loudness</td><td>quiet</td><td class=n>5</td><td class=n>16\.7 %</td>", page)
    encoded = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[1]))).convert("RGB"))
    assert picture.shape[1] == 1320
    for colour in ((0x44, 0x77, 0xAA), (0xCC, 0x66, 0x77), (0xBB, 0xBB, 0xBB)):
        assert (np.abs(picture.astype(int) - colour).sum(-1) < 6).sum() > 50, "a colour of the bars is missing"
    assert not re.search(r"https?://|<script|<link", page)


def test_files_of_lines_give_the_same_page_as_records(tmp_path):
    for name, records in (("kept.jsonl", KEPT), ("rejected.jsonl", REJECTED)):
        lines = "\n".join(json.dumps(r) for r in records)
        (tmp_path / name).write_text(lines + "\n\n")
    a = data_report(tmp_path / "kept.jsonl", str(tmp_path / "rejected.jsonl"), tmp_path / "a.png")
    b = data_report(iter(KEPT), iter(REJECTED), tmp_path / "b.png")
    np.testing.assert_array_equal(np.asarray(Image.open(a)), np.asarray(Image.open(b)))


@pytest.mark.parametrize("kept", [[], [record(0, a=1.0)], [record(n, a=1.0, b=float(n)) for n in range(3)]])
def test_few_and_equal_values_are_drawn(kept, tmp_path):
    with Image.open(data_report(kept, REJECTED[-2:], tmp_path / "few.png")) as picture:
        assert picture.size[0] == 1320


def test_markup_in_names_stays_text(tmp_path):
    odd = [left_out(0, "<b>stage", "a&b", None, None, x=1.0)]
    page = data_report([], odd, tmp_path / "odd.html").read_text()
    assert "&lt;b&gt;stage</td><td>a&amp;b" in page


def test_wrong_input_is_named(tmp_path):
    with pytest.raises(OviError, match=r"written as \.html or \.png, got '\.pdf'"):
        data_report(KEPT, [], tmp_path / "report.pdf")
    with pytest.raises(OviError, match="nothing to report"):
        data_report([], [], tmp_path / "report.png")
    with pytest.raises(OviError, match=r"gone\.jsonl: cannot be read"):
        read_records(tmp_path / "gone.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\nnot json\n')
    with pytest.raises(OviError, match=r"bad\.jsonl, line 2: is not JSON"):
        read_records(tmp_path / "bad.jsonl")
    with pytest.raises(OviError, match="cannot be written"):
        data_report(KEPT, [], tmp_path / "no" / "such" / "report.png")
