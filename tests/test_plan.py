"""Layer plans: which blocks exchange, for equal and unequal depths."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ovi.errors import OviError
from ovi.plan import fused_pairs, layer_plan
from small_twins import inputs, twin, woken


@pytest.mark.parametrize(
    ("spec", "depths", "pairs"),
    [
        ("all", (3, 3), [(0, 0), (1, 1), (2, 2)]),
        ("all", (4, 2), [(0, 0), (1, 1)]),
        ("every:3", (8, 8), [(0, 0), (3, 3), (6, 6)]),
        ("every:1", (2, 2), [(0, 0), (1, 1)]),
        ("first:2", (5, 4), [(0, 0), (1, 1)]),
        ("last:2", (5, 5), [(3, 3), (4, 4)]),
        ("last:1", (5, 4), [(3, 3)]),
        ("spread:3", (9, 5), [(0, 0), (4, 2), (8, 4)]),
        ("spread:1", (9, 5), [(0, 0)]),
        ([1, 3], (4, 4), [(1, 1), (3, 3)]),
        ([[0, 0], [5, 1]], (6, 3), [(0, 0), (5, 1)]),
        ([], (2, 2), []),
    ],
)
def test_pairs_that_exchange(spec, depths, pairs):
    assert fused_pairs(layer_plan(spec, *depths)) == pairs


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_every_block_runs_once_in_order(num_video, num_audio, data):
    count = data.draw(st.integers(0, min(num_video, num_audio)))
    chosen = [
        sorted(data.draw(st.lists(st.integers(0, n - 1), min_size=count, max_size=count, unique=True)))
        for n in (num_video, num_audio)
    ]
    plan = layer_plan([list(p) for p in zip(*chosen)], num_video, num_audio)
    assert [v for v, _ in plan if v is not None] == list(range(num_video))
    assert [a for _, a in plan if a is not None] == list(range(num_audio))
    assert fused_pairs(plan) == list(zip(*chosen))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("some", r"plan=some: expected all, every:K"),
        ("every:0", "K at least 1"),
        ("last:-1", "K at least 1"),
        ("first:9", "towers of 6 and 4 blocks have only 4 pairs"),
        ([1, 1], "numbers must increase"),
        ([2, 5], r"pair \[5, 5\] after \[2, 2\]"),
        ([[0, 0], [1, 0]], "numbers must increase"),
        ([[0, 0, 1]], "expected all"),
        ([1, [2, 2]], "expected all"),
    ],
)
def test_bad_plans_are_named(spec, says):
    with pytest.raises(OviError, match=says):
        layer_plan(spec, 6, 4)


@torch.no_grad()
def test_only_planned_pairs_exchange():
    """A probe on the state between blocks: sound reaches the picture at the planned pair, not before."""
    model = woken(twin("ovi", tower={"num_blocks": 3}, plan=[1]))
    assert len(model.fusions) == 1
    seen = []
    for block in model.video.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append(out.tokens))
    feed = model.video.blocks[1].feed_forward
    model.video.blocks[1].feed_forward = lambda s: seen.append(s.tokens) or feed(s)
    model(*inputs())
    model(*inputs(), a2v=0.0)
    (first, pair, last), (first_off, pair_off, last_off) = seen[:3], seen[3:]
    assert torch.equal(first, first_off)
    assert not torch.allclose(pair, pair_off, atol=1e-4)
    assert not torch.allclose(last, last_off, atol=1e-4)


@torch.no_grad()
def test_a_tower_s_tail_runs_alone():
    """The video tower of 4 blocks beside 2 of audio, without exchange, is the video tower alone."""
    model = twin("none", tower={"num_blocks": 4}, audio_tower={"num_blocks": 2})
    video, audio, sigma, text, _ = inputs()
    both = model(video, audio, sigma, text, text)
    assert torch.equal(both[0], model(video, None, sigma, text, None)[0])
    assert torch.equal(both[1], model(None, audio, sigma, None, text)[1])
