"""Near-duplicates: re-encoded copies go, mirrored and other clips stay, and no pair within the threshold is missed."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from ovi.data.media import Clip, read_clip, write_clip
from ovi.data.sources import ClipFormat
from ovi.data.stages import near_hashes
from ovi.data.stages.base import Candidate, Rejected, run_stages
from ovi.data.stages.duplicates import (
    AUDIO_BITS,
    PICTURE_BITS,
    Duplicates,
    picture_hash,
    sound_hash,
)
from ovi.data.stages.near_hashes import Distances, NearHashes, popcount
from ovi.data.stages.windows import Windows
from ovi.data.synthetic import synthetic_clip
from ovi.errors import OviError

FORM = ClipFormat(fps=12, num_frames=24, height=64, width=64, sample_rate=16000)


def bounce(index: int, size: int = 64) -> Clip:
    return synthetic_clip(index, seed=9, fps=12, num_frames=24, height=size, width=size, sample_rate=16000).clip


def left(stage, candidates) -> tuple[list[str], list[Rejected]]:
    rejected: list[Rejected] = []
    return [c.key for c in stage(candidates, rejected.append)], rejected


@pytest.mark.parametrize("crf", [23, 36])
def test_copies_re_encoded_or_rescaled_are_removed_mirrored_and_other_clips_kept(tmp_path, crf):
    clip = bounce(0)
    mirrored = Clip(np.ascontiguousarray(clip.frames[:, :, ::-1]), clip.waveform, 12, 16000)
    write_clip(tmp_path / "a.mp4", clip)
    write_clip(tmp_path / "b copy.mp4", clip, crf=crf)
    write_clip(tmp_path / "c larger.mp4", bounce(0, 128), crf=crf)
    write_clip(tmp_path / "d mirrored.mp4", mirrored)
    write_clip(tmp_path / "e other.mp4", bounce(1))
    names = ["a", "b copy", "c larger", "d mirrored", "e other"]
    candidates = [Candidate(tmp_path / f"{name}.mp4", name) for name in names]
    rejected: list[Rejected] = []
    stages = {"windows": Windows(FORM), "duplicates": Duplicates()}
    kept = list(run_stages(stages, reversed(candidates), rejected.append))
    assert [c.key for c in kept] == ["a-0000", "d mirrored-0000", "e other-0000"], "the first by key stays"
    assert [(r.candidate.key, r.reason) for r in rejected] == [
        ("b copy-0000", "duplicate"),
        ("c larger-0000", "duplicate"),
    ]
    assert all(r.figures["duplicate_bits"] <= 25 and "a-0000" in r.message for r in rejected)


def test_the_same_picture_with_another_sound_is_no_duplicate_unless_sound_is_left_out():
    clip, other = bounce(0), bounce(2)
    pair = [
        Candidate(Path("a"), "a", clip=clip),
        Candidate(Path("b"), "b", clip=Clip(clip.frames, other.waveform, 12, 16000)),
    ]
    assert left(Duplicates(), pair)[0] == ["a", "b"]
    assert left(Duplicates(sound=False), pair)[0] == ["a"]


def test_hashes_of_unrelated_clips_differ_in_many_bits_and_of_copies_in_few(tmp_path):
    clips = [bounce(n) for n in range(12)]
    pictures = [picture_hash(c, 4) for c in clips]
    sounds = [sound_hash(c) for c in clips]
    apart = [(a ^ b).bit_count() / (4 * PICTURE_BITS) for a, b in itertools.combinations(pictures, 2)]
    assert min(apart) > 0.15
    assert np.median(apart) > 0.25
    assert np.median([(a ^ b).bit_count() / AUDIO_BITS for a, b in itertools.combinations(sounds, 2)]) > 0.4
    for n in range(3):
        write_clip(tmp_path / "copy.mp4", clips[n], crf=30)
        copy = read_clip(tmp_path / "copy.mp4", **FORM.__dict__)
        assert (picture_hash(copy, 4) ^ pictures[n]).bit_count() / (4 * PICTURE_BITS) < 0.08
        assert (sound_hash(copy) ^ sounds[n]).bit_count() / AUDIO_BITS < 0.1


def greedy(first: np.ndarray, second: np.ndarray, within: Distances) -> tuple[list[int], dict[int, tuple[int, int]]]:
    """One by one: what is kept, and of the others the nearest kept one before them."""
    numbers = [tuple(int.from_bytes(row.tobytes(), "big") for row in rows) for rows in zip(first, second)]
    kept, nearest = [], {}
    for n, (a, b) in enumerate(numbers):
        near = [
            ((a ^ numbers[k][0]).bit_count(), k) for k in kept if (b ^ numbers[k][1]).bit_count() <= within.most_second
        ]
        near = [found for found in near if found[0] <= within.most]
        if near:
            nearest[n] = min(near)
        else:
            kept.append(n)
    return kept, nearest


@pytest.mark.parametrize("small", [False, True], ids=["compared", "looked up"])
@pytest.mark.parametrize(
    ("words", "within", "share"),
    [
        (1, Distances(0, 10), 0.01),
        (1, Distances(5, 30), 0.04),
        (4, Distances(25, 48), 0.05),
        (4, Distances(25, 48), 0.004),  # crowds of near ones
        (2, Distances(60, 48), 0.1),
    ],
)
def test_exactly_those_are_kept_that_a_search_through_all_keeps(words, within, share, small, monkeypatch):
    if small:
        monkeypatch.setattr(near_hashes, "_DENSE", 8)
        monkeypatch.setattr(near_hashes, "_LEAF", 16)
        monkeypatch.setattr(near_hashes, "_PAIRS", 1000)
        monkeypatch.setattr(near_hashes, "_QUERIES", 150)
    rng = np.random.default_rng(words)
    centres = rng.integers(0, 2**64, (12, words + 4), dtype=np.uint64)
    values = centres[rng.integers(0, 12, 500)]
    values ^= np.packbits(rng.random((500, (words + 4) * 64)) < share, axis=1).view(np.uint64)
    other = rng.random(500) < 0.3  # the same picture with another sound
    values[other, words:] = rng.integers(0, 2**64, (int(other.sum()), 4), dtype=np.uint64)
    values[100:150] = values[7]
    first, second = values[:, :words], values[:, words:]
    kept, nearest = greedy(first, second, within)
    assert 12 < len(kept) < 480
    hashes = NearHashes(first, second, within)
    assert hashes.kept().tolist() == kept
    others = np.array(sorted(nearest))
    assert dict(zip(others.tolist(), zip(*(found.tolist() for found in hashes.nearest(others, np.array(kept)))))) == (
        nearest
    )


def test_bits_are_counted_without_numpy_2(monkeypatch):
    words = np.random.default_rng(3).integers(0, 2**64, 1000, dtype=np.uint64)
    words[:3] = 0, 2**64 - 1, 1
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert popcount(words).tolist() == [int(word).bit_count() for word in words]


def test_silent_or_flat_clips_and_unreadable_ones_pass_through(tmp_path):
    flat = Clip(np.full((24, 64, 64, 3), 90, np.uint8), np.zeros(32000, np.float32), 12, 16000)
    rejected_file = Candidate(tmp_path / "gone.mp4", "c", form=FORM)
    kept, rejected = left(Duplicates(), [Candidate(Path(k), k, clip=flat) for k in ("b", "a")] + [rejected_file])
    assert kept == ["a"]
    assert sorted(r.reason for r in rejected) == ["duplicate", "unreadable"]
    for knobs in ({"max_share": 0.5}, {"max_sound_share": -0.1}, {"num_pictures": 0}):
        with pytest.raises(OviError, match=next(iter(knobs))):
            Duplicates(**knobs)


def test_waiting_candidates_hold_no_pictures():
    candidates = [Candidate(Path(str(n)), str(n), clip=bounce(n)) for n in range(3)]
    assert [c.clip for c in Duplicates()(iter(candidates), list().append)] == [None] * 3
