"""Maps of attention over time against plain softmax in float64, closed forms and planted rotations."""

from __future__ import annotations

import json
import warnings
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ovi.attention import use_attention
from ovi.attention_maps import TimeMap, pooled_attention, record_attention
from ovi.clock import Clock
from ovi.errors import OviError
from ovi.fusion import FUSIONS
from ovi.layout import LatentLayout
from ovi.training.callbacks.attention_in_time import AttentionInTime, attention_image
from ovi.training.callbacks.ema import WarmupEMA
from ovi.training.datamodule import ShardsDataModule
from small_twins import LAYOUT, inputs, twin, woken
from test_training import module_for, trainer_for

SILENT = {"none", "film", "bottleneck"}
HEARD = sorted(set(FUSIONS) - SILENT)
FRAMES, TOKENS, TEXT = 6, 21, 5
PIXELS = 4


def given():
    return inputs(frames=FRAMES, tokens=TOKENS)


def recorded(model, *args, **options):
    with torch.no_grad(), record_attention(model) as recording:
        model(*args, **options)
    return recording.maps


# --- scores -------------------------------------------------------------------------------------------------------


def time_map(shares, query_times, key_times, real=None) -> TimeMap:
    real = torch.ones(len(key_times), dtype=torch.bool) if real is None else real
    as_times = (torch.as_tensor(t, dtype=torch.float64) for t in (query_times, key_times))
    return TimeMap(torch.as_tensor(shares, dtype=torch.float64), *as_times, real, 1.0)


@pytest.mark.parametrize("count", [2, 7, 50])
def test_distances_in_closed_form(count):
    """Even attention on a grid of step h is off by h (n^2 - 1) / 3n; on the diagonal by 0; shifted by the shift."""
    times = 0.04 * np.arange(count)
    even = time_map(np.full((count, count), 1 / count), times, times)
    assert even.offset_ms == pytest.approx(40 * (count**2 - 1) / (3 * count))
    assert even.uniform_ms == pytest.approx(even.offset_ms)
    assert time_map(np.eye(count), times, times).offset_ms == 0
    assert time_map(np.eye(count), times, times + 0.13).offset_ms == pytest.approx(130)


def test_rows_that_attend_nothing_and_padding_do_not_count():
    shares = torch.tensor([[1.0, 0.0, 0.0], [torch.nan] * 3])
    found = time_map(shares, [0.0, 9.0], [0.1, 0.3, 5.0], torch.tensor([True, True, False]))
    assert found.offset_ms == pytest.approx(100)
    assert found.uniform_ms == pytest.approx(200)


@pytest.mark.parametrize("chunk_values", [1, 64, 10**6])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_pooling_is_softmax_in_float64_then_sums(chunk_values, kind):
    g = torch.Generator().manual_seed(0)
    groups, batch, heads, num_queries, num_keys, width = 2, 3, 2, 8, 11, 6
    q, k = (3 * torch.randn(batch * groups, heads, n, width, generator=g) for n in (num_queries, num_keys))
    query_bins = torch.randint(0, 3, (groups, num_queries), generator=g)
    key_bins = torch.randint(-1, 4, (groups, num_keys), generator=g)
    mask = added = None
    if kind == "bool":
        mask = torch.rand(batch * groups, num_keys, generator=g) < 0.7
        added = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    elif kind == "float":
        mask = torch.randn(batch * groups, num_keys, generator=g)
        added = mask.double()
    real = torch.rand(batch * groups, num_queries, generator=g) < 0.6
    got = pooled_attention(q, k, mask, query_bins, key_bins, (3, 4), real=real, chunk_values=chunk_values)
    scores = q.double() @ k.double().transpose(-1, -2) / width**0.5
    weights = (scores if added is None else scores + added[:, None, None]).softmax(-1).mean(1)
    sums, counts = np.zeros((3, 4)), np.zeros(3)
    for n in range(batch * groups):
        for i in range(num_queries):
            if not real[n, i]:
                continue
            counts[query_bins[n % groups, i]] += 1
            for j in range(num_keys):
                if key_bins[n % groups, j] >= 0:
                    sums[query_bins[n % groups, i], key_bins[n % groups, j]] += float(weights[n, i, j])
    np.testing.assert_allclose(got[0], sums, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[1], counts)


# --- every strategy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", list(FUSIONS))
def test_recording_changes_nothing_and_is_gone_afterwards(fusion):
    model, args = woken(twin(fusion)), given()
    kernels = [m.attention for m in model.modules() if hasattr(m, "attention")]
    attributes = [set(vars(m)) for m in model.modules()]
    with torch.no_grad():
        before = model(*args)
        with record_attention(model) as recording:
            during = model(*args)
        after = model(*args)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(before, during, after))
    assert [m.attention for m in model.modules() if hasattr(m, "attention")] == kernels
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert bool(recording.maps) == (fusion not in SILENT)


@pytest.mark.parametrize("fusion", HEARD)
def test_under_autocast_maps_stay_close(fusion):
    model, args = woken(twin(fusion)), given()
    plain_maps = recorded(model, *args)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(recorded(model, *args), plain_maps, strict=True):
            for one, other in ((a.hears, b.hears), (a.sees, b.sees)):
                assert (one.shares - other.shares).nan_to_num(0).abs().max() < 0.03
                assert one.offset_ms == pytest.approx(other.offset_ms, abs=3)


def test_an_error_inside_leaves_nothing_behind():
    model = twin("ovi")
    kernels = [m.attention for m in model.modules() if hasattr(m, "attention")]
    with pytest.raises(ZeroDivisionError), record_attention(model):
        raise ZeroDivisionError
    assert [m.attention for m in model.modules() if hasattr(m, "attention")] == kernels
    assert all("qkv" not in vars(m) for m in model.modules())


@pytest.mark.parametrize("fusion", HEARD)
def test_rows_are_shares_at_the_clocks_times(fusion):
    maps = recorded(woken(twin(fusion)), *given())
    assert [(pair.video_block, pair.audio_block) for pair in maps] == [(0, 0), (1, 1)]
    video, audio = LAYOUT.clock.video_times_s(FRAMES), LAYOUT.clock.audio_times_s(TOKENS)
    for pair in maps:
        for found, rows, columns in ((pair.hears, video, audio), (pair.sees, audio, video)):
            assert found.query_times.tolist() == pytest.approx(rows)
            assert found.key_times.tolist() == pytest.approx(columns)
            attended = ~found.shares.isnan().any(1)
            np.testing.assert_allclose(found.shares[attended].sum(1), 1, rtol=1e-6)
            assert found.shares[attended].min() >= 0
            assert attended.sum() >= len(rows) - 1


def calls_of(model, *args):
    """(queries, keys, mask) of every call of attention, by block in order of its tower, from a kernel of our own."""
    calls, kernel = [], model.video.blocks[0].attention

    def spy(q, k, v, mask=None):
        calls.append((q, k, mask))
        return kernel(q, k, v, mask)

    use_attention(model, spy)
    with torch.no_grad():
        model(*args)
    use_attention(model, kernel)
    return calls


def plain(q, k, mask) -> np.ndarray:
    """Weights [B, Lq, Lk], mean over heads, in float64."""
    scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
        scores = scores + mask.double()[:, None, None]
    return scores.softmax(-1).mean(1).numpy()


def by_frame(weights: np.ndarray, axis: int) -> np.ndarray:
    """Video's axis of tokens to frames, summed."""
    shape = list(weights.shape)
    shape[axis : axis + 1] = [FRAMES, PIXELS]
    return weights.reshape(shape).sum(axis + 1)


def shares_of(weights: np.ndarray) -> np.ndarray:
    whole = weights.sum(0)
    return whole / whole.sum(1, keepdims=True)


VIDEO = FRAMES * PIXELS


@pytest.mark.parametrize("fusion", ["ovi", "affinity", "bridge", "bridge_ltx2", "bridge_mova"])
def test_maps_are_the_plain_softmax_over_the_partners_tokens(fusion):
    model, args = woken(twin(fusion)), given()
    calls = calls_of(model, *args)
    hears = [plain(*c) for c in calls if (c[0].shape[2], c[1].shape[2]) == (VIDEO, TOKENS)]
    sees = [plain(*c) for c in calls if (c[0].shape[2], c[1].shape[2]) == (TOKENS, VIDEO)]
    maps = recorded(model, *args)
    assert len(hears) == len(sees) == len(maps) == 2
    for pair, heard, seen in zip(maps, hears, sees):
        np.testing.assert_allclose(pair.hears.shares, shares_of(by_frame(heard, 1)), rtol=1e-4)
        np.testing.assert_allclose(pair.sees.shares, shares_of(by_frame(seen, 2)), rtol=1e-4)
        assert (pair.hears.mass, pair.sees.mass) == pytest.approx((1, 1))


@pytest.mark.parametrize("knobs", [{}, {"audio_tower": {"dim": 48}}])
def test_maps_of_one_attention_over_both_are_the_partners_part(knobs):
    model, args = woken(twin("joint", **knobs)), given()
    both = [plain(*c) for c in calls_of(model, *args) if c[1].shape[2] == VIDEO + TOKENS]
    for pair, heard, seen in zip(recorded(model, *args), both[::2], both[1::2], strict=True):
        np.testing.assert_allclose(pair.hears.shares, shares_of(by_frame(heard[..., VIDEO:], 1)), rtol=1e-4)
        np.testing.assert_allclose(pair.sees.shares, shares_of(by_frame(seen[..., :VIDEO], 2)), rtol=1e-4)
        assert pair.hears.mass == pytest.approx(heard[..., VIDEO:].sum(-1).mean(), rel=1e-4)
        assert 0.05 < pair.sees.mass < 0.95


def test_sizes_that_are_all_alike_confuse_nothing():
    """As many tokens of text as of sound and of the picture: the map is still that of the exchange."""
    video, audio, sigma, _, _ = inputs(frames=4, tokens=16)
    text = [torch.randn(16, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    model = woken(twin("ovi", layout=LatentLayout(4, 6, 8, 16, LAYOUT.clock)))
    calls = calls_of(model, video, audio, sigma, text, text)
    assert {(c[0].shape[2], c[1].shape[2]) for c in calls} == {(16, 16)}
    # A pair's calls in order: self-attention of both, video's text and exchange, audio's text and exchange.
    heard, seen = plain(*calls[3]).reshape(2, 4, 4, 16).sum(2), plain(*calls[5]).reshape(2, 16, 4, 4).sum(3)
    pair = recorded(model, video, audio, sigma, text, text)[0]
    np.testing.assert_allclose(pair.hears.shares, shares_of(heard), rtol=1e-4)
    np.testing.assert_allclose(pair.sees.shares, shares_of(seen), rtol=1e-4)


def test_stitch_hears_its_frame_and_beside_the_prompt():
    model, args = woken(twin("stitch")), given()
    calls = calls_of(model, *args)
    clock = LAYOUT.clock
    starts = np.arange(FRAMES) / clock.fps
    inside = [np.flatnonzero((t := np.array(clock.audio_times_s(TOKENS))) >= s) for s in starts]
    inside = [n[t[n] < s + 1 / clock.fps - 1e-4] for n, s in zip(inside, starts)]
    in_frame = next(c for c in calls if c[0].shape[0] == 2 * FRAMES)
    weights = plain(*in_frame).reshape(2, FRAMES, PIXELS, -1)
    expected = np.zeros((2, FRAMES, TOKENS))
    for f, n in enumerate(inside):
        expected[:, f, n] = weights[:, f, :, : len(n)].sum(1)
    prompt = next(c for c in calls if c[0].shape[2] == VIDEO and c[1].shape[2] == TEXT + TOKENS)
    expected += by_frame(plain(*prompt)[..., TEXT:], 1)
    pair = recorded(model, *args)[0]
    np.testing.assert_allclose(pair.hears.shares, shares_of(expected), rtol=1e-4, atol=1e-7)
    means = next(c for c in calls if c[0].shape[2] == TOKENS and c[1].shape[2] == TEXT + FRAMES)
    np.testing.assert_allclose(pair.sees.shares, shares_of(plain(*means)[..., TEXT:]), rtol=1e-4)


@pytest.mark.parametrize("window", [0, 1])
def test_framewise_hears_its_window_and_sees_between_two_frames(window):
    model, args = woken(twin(partial(FUSIONS["framewise"], window=window))), given()
    pair = recorded(model, *args)[0]
    video, audio = pair.hears.query_times.numpy(), pair.hears.key_times.numpy()
    half = (window + 0.5) / LAYOUT.clock.fps
    near = np.abs(audio[None] - video[:, None]) < half + 1e-3
    shares = pair.hears.shares.nan_to_num(0).numpy()
    assert (shares[~near] == 0).all()
    assert (shares[np.abs(audio[None] - video[:, None]) < half - 1e-3] > 0).all()
    expected = np.stack([np.interp(audio, video, row) for row in np.eye(FRAMES)], 1)
    shown = audio < FRAMES / LAYOUT.clock.fps
    np.testing.assert_allclose(pair.sees.shares[shown], expected[shown], atol=1e-5)
    assert pair.sees.shares[~shown].isnan().all()


@pytest.mark.parametrize("fusion", HEARD)
def test_padded_sound_neither_attends_nor_is_attended(fusion):
    model, (video, audio, sigma, text, _) = woken(twin(fusion)), given()
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[:, 14:] = False
    for pair in recorded(model, video, audio, sigma, text, text, audio_mask=mask):
        assert pair.hears.shares[:, 14:].nan_to_num(0).abs().max() == 0
        assert not pair.hears.real[14:].any()
        assert pair.sees.shares[14:].isnan().all()
        assert not pair.sees.shares[:14].isnan().any()


def test_several_clips_are_averaged_and_other_lengths_refused():
    model, args = woken(twin("ovi")), given()
    each = [recorded(model, *(x[i : i + 1] for x in args)) for i in range(2)]
    with torch.no_grad(), record_attention(model) as recording:
        for i in range(2):
            model(*(x[i : i + 1] for x in args))
        with pytest.raises(OviError, match="record clips of one length at a time"):
            model(*inputs(frames=3, tokens=TOKENS))
    for a, b, both in zip(*each, recorded(model, *args)):
        np.testing.assert_allclose((a.hears.shares + b.hears.shares) / 2, both.hears.shares, rtol=1e-5)
    assert len(recording.maps) == 2


def test_pairs_that_do_not_exchange_have_no_map():
    model = woken(twin("ovi", plan=[[1, 0]]))
    assert [(p.video_block, p.audio_block) for p in recorded(model, *given())] == [(1, 0)]
    with torch.no_grad(), record_attention(model) as recording:
        video, _, sigma, text, _ = given()
        model(video, None, sigma, text, None)
    assert recording.maps == []


def test_a_compiled_twin_is_recorded_and_stays_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, model, args = woken(twin("ovi")), woken(twin("ovi")), given()
    model.compile_layers(backend="eager")
    with torch.no_grad():
        model(*args)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs > 0
        maps = recorded(model, *args)
        model(*args)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    for a, b in zip(maps, recorded(eager, *args), strict=True):
        np.testing.assert_allclose(a.hears.shares, b.hears.shares, rtol=1e-5)
    torch._dynamo.reset()


# --- what it is for: the clocks of the exchange -------------------------------------------------------------------


def only_rotations_decide(alignment: str):
    """A twin at the published rates whose exchange has one and the same query and key content everywhere."""
    layout = LatentLayout(4, 6, 8, 5, Clock())
    model = twin("ovi", alignment, layout, tower={"dim": 48}, time_axis_only=True)
    for fusion, video, audio in zip(model.fusions, model.video.blocks, model.audio.blocks):
        for block, side in ((video, fusion.video), (audio, fusion.audio)):
            for layer, norm in ((block.cross_attn.q, block.cross_attn.norm_q), (side.k, side.norm_k)):
                torch.nn.init.zeros_(layer.weight)
                torch.nn.init.ones_(layer.bias)  # every frequency weighs the same
                norm.weight.data.fill_(8.0)  # sharply
    return model


def test_aligned_clocks_attend_along_the_diagonal_and_unaligned_ones_drift():
    """31 latent frames and 157 tokens, the published 5 s: where the maps peak, and how far from the diagonal."""
    video, audio, sigma, text, _ = inputs(batch=1, frames=31, tokens=157)
    offsets = {}
    for alignment in ("seconds", "ratio", "scale", "none"):
        pair = recorded(only_rotations_decide(alignment), video, audio, sigma, text, text)[0]
        offsets[alignment] = (pair.hears.offset_ms, pair.sees.offset_ms)
        peaks = pair.hears.shares.argmax(1)
        late_s = pair.hears.key_times[peaks] - pair.hears.query_times
        if alignment == "seconds":  # the nearest token: half of 32 ms away at most
            assert late_s.abs().max() <= 0.0161
            seen = pair.sees.key_times[pair.sees.shares.argmax(1)] - pair.sees.query_times
            assert seen.abs().max() <= 1 / 6 / 2 + 0.022  # half a latent frame; the first is shorter
        elif alignment == "none":  # frame i hears token i: ever earlier than itself
            assert peaks.tolist() == list(range(31))
            assert (late_s.diff() < 0).all()
            assert late_s[-1] < -3.5
        else:  # the causal first frame counts as a whole one: late by less than one latent frame throughout
            assert late_s.abs().max() < 1 / 6
        assert pair.hears.uniform_ms == pytest.approx(1700, abs=60)  # a third of 5 s
    for alignment in ("seconds", "ratio", "scale"):
        assert max(offsets[alignment]) < 0.05 * min(offsets["none"]), offsets


# --- in a run -----------------------------------------------------------------------------------------------------


def fitted(folder, data, callbacks, fusion="ovi", **options):
    folder.mkdir()
    module = module_for(data, fusion)
    logger = TensorBoardLogger(folder, name=None, version="tensorboard")
    trainer = trainer_for(
        folder, 4, callbacks=callbacks, val_check_interval=2, log_every_n_steps=1, logger=logger, **options
    )
    trainer.fit(module, datamodule=data)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    return trainer, module, events.Reload()


def test_a_run_gets_pictures_and_figures_and_is_the_same_run(tiny_shards, tmp_path):
    data = ShardsDataModule(path=str(tiny_shards), batch_size=4)
    trainer, module, events = fitted(tmp_path / "with", data, [AttentionInTime(), WarmupEMA(decay=0.5)])
    _, other, _ = fitted(tmp_path / "without", data, [WarmupEMA(decay=0.5)])
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.state_dict().values()))
    assert set(events.Tags()["images"]) == {"attention/video_hears_audio", "attention/audio_sees_video"}
    for tag in events.Tags()["images"]:
        shown = events.Images(tag)
        assert [image.step for image in shown] == [2, 4]
        picture = np.asarray(Image.open(BytesIO(shown[-1].encoded_image_string)))
        assert picture.shape[2] == 3
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    scalars = set(events.Tags()["scalars"])
    for direction in ("video_hears_audio", "audio_sees_video"):
        wanted = {f"attention/{direction}_ms", f"attention/{direction}_uniform_ms"}
        assert wanted | {f"attention_blocks/{direction}_ms_00"} <= scalars
        assert f"attention/{direction}_mass" not in scalars
    # At the end of fit the averaged weights are in place: what was drawn last is what they give.
    callback = AttentionInTime()
    again = callback._maps(trainer, module.eval())
    drawn = events.Scalars("attention/video_hears_audio_ms")[-1].value
    assert drawn == pytest.approx(again[0].hears.offset_ms, rel=1e-5)


def test_the_runs_folder_holds_the_maps_without_an_event_file(tiny_shards, tmp_path):
    """Pictures and numbers of every drawing; the numbers give the distance that was logged, by its definition."""
    data = ShardsDataModule(path=str(tiny_shards), batch_size=4)
    callback = AttentionInTime(num_clips=1)
    trainer, _, events = fitted(tmp_path / "run", data, [callback])
    folder = Path(trainer.default_root_dir) / "attention"
    directions = ("video_hears_audio", "audio_sees_video")
    pictures = {f"step_{step:06d}_{direction}.png" for step in (2, 4) for direction in directions}
    assert {path.name for path in folder.iterdir()} == {*pictures, "maps.jsonl"}
    records = [json.loads(line) for line in (folder / "maps.jsonl").read_text().splitlines()]
    assert [(r["step"], r["direction"]) for r in records] == [(s, d) for s in (2, 4) for d in directions]
    for record in records[-2:]:
        tag = f"attention/{record['direction']}"
        shown = Image.open(BytesIO(events.Images(tag)[-1].encoded_image_string))
        np.testing.assert_array_equal(Image.open(folder / f"step_000004_{record['direction']}.png"), shown)
        shares, rows = np.array(record["shares"]), np.array(record["query_times"])
        np.testing.assert_allclose(shares.sum(1), 1, atol=1e-3)
        distances = 1000 * np.abs(np.array(record["key_times"])[None] - rows[:, None])
        assert record["ms"] == pytest.approx(events.Scalars(f"{tag}_ms")[-1].value, rel=1e-5)
        assert (distances * shares).sum(1).mean() == pytest.approx(record["ms"], rel=1e-3)
        assert distances[:, record["real"]].mean() == pytest.approx(record["uniform_ms"], rel=1e-3)
        assert [b["video"] for b in record["blocks"]] == list(range(len(record["blocks"])))


def test_rounds_are_skipped_as_asked(tiny_shards, tmp_path):
    data = ShardsDataModule(path=str(tiny_shards), batch_size=4)
    callback = AttentionInTime(every_n_rounds=2, num_clips=1)
    _, _, events = fitted(tmp_path / "run", data, [callback], num_sanity_val_steps=1)
    assert [image.step for image in events.Images("attention/video_hears_audio")] == [2]
    assert callback.state_dict() == {"rounds": 2}


def test_other_softmaxes_tell_their_mass(tiny_shards, tmp_path):
    data = ShardsDataModule(path=str(tiny_shards), batch_size=4)
    _, _, events = fitted(tmp_path / "run", data, [AttentionInTime(num_clips=1)], "joint")
    assert 0 < events.Scalars("attention/video_hears_audio_mass")[-1].value < 1


@pytest.mark.parametrize("fusion", ["none", "film"])
def test_no_map_is_said_once(tiny_shards, tmp_path, fusion):
    data = ShardsDataModule(path=str(tiny_shards), batch_size=4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, _, events = fitted(tmp_path / "run", data, [AttentionInTime()], fusion)
    said = [str(w.message) for w in told if "attention in time" in str(w.message)]
    assert said == ["attention in time is not shown in this run: this fusion has no softmax over the partner's tokens"]
    assert events.Tags()["images"] == []


def test_a_failure_does_not_stop_training(tiny_shards, tmp_path, monkeypatch):
    data = ShardsDataModule(path=str(tiny_shards), batch_size=4)
    monkeypatch.setattr(AttentionInTime, "_noised", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="attention in time is not shown in this run: ZeroDivisionError"):
        trainer, _, _ = fitted(tmp_path / "run", data, [AttentionInTime()])
    assert trainer.global_step == 4


@pytest.mark.parametrize("knob", ["num_clips", "every_n_rounds", "num_shown"])
def test_knobs_that_make_no_sense_are_named(knob):
    with pytest.raises(OviError, match=rf"callbacks\.attention_in_time\.{knob} must be at least 1, got 0"):
        AttentionInTime(**{knob: 0})
    with pytest.raises(OviError, match=r"sigma must be in 0\.\.1, got 2"):
        AttentionInTime(sigma=2)


def test_the_picture_is_bright_where_attention_is():
    """A single bright column at 0.75 of the keys' time: the same column of the picture."""
    shares = np.zeros((10, 40))
    shares[:, 30] = 1
    found = time_map(shares, (np.arange(10) + 0.5) / 10, (np.arange(40) + 0.5) / 40)
    picture = attention_image([("planted", found)], "video_hears_audio").astype(int)
    _, columns = np.nonzero((picture[..., 0] > 240) & (picture[..., 2] < 200) & (picture[..., 2] > 150))
    dark = np.nonzero((picture.sum(-1) < 12).sum(0) > 100)[0]  # the map's ground
    left, right = dark[0], dark[np.flatnonzero(np.append(np.diff(dark) > 12, True))[0]]  # beyond are other frames
    bar = np.flatnonzero(np.bincount(columns[columns < right], minlength=picture.shape[1]) > 100)
    assert np.mean((bar - left) / (right - left)) == pytest.approx(30.5 / 40, abs=0.02)
