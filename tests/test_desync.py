"""DeSync: the network against other implementations of its parts, its inputs against torchaudio's convention."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ovi.errors import OviError
from ovi.metrics.desync import desync as module
from ovi.metrics.desync.desync import PUBLISHED, DeSync, desync_seconds, offset_grid
from ovi.metrics.desync.inputs import num_segments, picture_segments, prepared, sound_segments
from ovi.metrics.desync.synchformer import Synchformer, SynchformerConfig, load_synchformer
from ovi.metrics.frame_rate import frames_at

TINY = SynchformerConfig(width=16, depth=2, heads=2, mlp_ratio=2, side=32, sync_depth=2, sync_heads=4)


def network(config: SynchformerConfig = TINY, seed: int = 0) -> Synchformer:
    """Random, but no part of it silent: fresh positions and tokens are zeros."""
    net = Synchformer(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim > 1 else 0.5))
    return net


# --- the network -----------------------------------------------------------------------------------------------------


def test_published_sizes_fill_the_published_file():
    """950,058,171 bytes of float32: what is left over per tensor is a zip entry's name and padding, no layer."""
    with torch.device("meta"):
        state = Synchformer().state_dict()
    left = PUBLISHED.num_bytes - 4 * sum(value.numel() for value in state.values())
    assert 0 < left / len(state) < 600
    shapes = {
        "vfeat_extractor.cls_token": (1, 1, 768),
        "vfeat_extractor.pos_embed": (1, 197, 768),
        "vfeat_extractor.temp_embed": (1, 8, 768),
        "vfeat_extractor.patch_embed.proj.weight": (768, 3, 16, 16),
        "vfeat_extractor.patch_embed_3d.proj.weight": (768, 3, 2, 16, 16),
        "vfeat_extractor.blocks.11.timeattn.qkv.weight": (2304, 768),
        "vfeat_extractor.blocks.11.attn.proj.bias": (768,),
        "vfeat_extractor.blocks.0.norm3.weight": (768,),
        "vfeat_extractor.blocks.0.mlp.fc1.weight": (3072, 768),
        "vfeat_extractor.norm.bias": (768,),
        "vfeat_extractor.spatial_attn_agg.cls_token": (1, 1, 768),
        "vfeat_extractor.spatial_attn_agg.self_attn.in_proj_weight": (2304, 768),
        "vfeat_extractor.spatial_attn_agg.linear1.weight": (3072, 768),
        "afeat_extractor.ast.embeddings.distillation_token": (1, 1, 768),
        "afeat_extractor.ast.embeddings.position_embeddings": (1, 74, 768),
        "afeat_extractor.ast.embeddings.patch_embeddings.projection.weight": (768, 1, 16, 16),
        "afeat_extractor.ast.encoder.layer.11.attention.attention.query.weight": (768, 768),
        "afeat_extractor.ast.encoder.layer.11.attention.output.dense.weight": (768, 768),
        "afeat_extractor.ast.encoder.layer.0.intermediate.dense.weight": (3072, 768),
        "afeat_extractor.ast.encoder.layer.0.output.dense.weight": (768, 3072),
        "afeat_extractor.ast.encoder.layer.0.layernorm_before.weight": (768,),
        "afeat_extractor.ast.layernorm.weight": (768,),
        "afeat_extractor.freq_attn_agg.norm2.weight": (768,),
        "vproj.weight": (768, 768),
        "aproj.bias": (768,),
        "transformer.OFF_tok": (1, 1, 768),
        "transformer.MOD_tok": (1, 1, 768),
        "transformer.vis_in_lnorm.weight": (768,),
        "transformer.aud_in_lnorm.weight": (768,),
        "transformer.pos_emb_cfg.pos_emb": (1, 198, 768),
        "transformer.blocks.2.attn.key.weight": (768, 768),
        "transformer.blocks.2.attn.proj.weight": (768, 768),
        "transformer.blocks.0.mlp.2.weight": (768, 3072),
        "transformer.blocks.0.ln1.weight": (768,),
        "transformer.ln_f.weight": (768,),
        "transformer.off_head.weight": (21, 768),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def attend(q, k, v):
    """One head's attention in plain words."""
    return torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), -1) @ v


@pytest.mark.parametrize("along_time", [True, False])
def test_divided_attention_is_what_it_says(along_time):
    """Token by token: the first to all, any other to the first and to those of its place, or of its frame."""
    frames, places, width, heads = 3, 4, 16, 2
    attention = network().vfeat_extractor.blocks[0].attn
    x = torch.randn(1, 1 + frames * places, width, generator=torch.Generator().manual_seed(1))
    q, k, v = F.linear(x[0], attention.qkv.weight, attention.qkv.bias).split(width, -1)
    out = torch.zeros_like(x[0])
    for h in range(heads):
        part = slice(h * width // heads, (h + 1) * width // heads)
        for n in range(len(out)):
            if n == 0:
                among = list(range(len(out)))
            elif along_time:
                among = [0, *(1 + f * places + (n - 1) % places for f in range(frames))]
            else:
                among = [0, *(1 + (n - 1) // places * places + p for p in range(places))]
            out[n, part] = attend(q[n : n + 1, part], k[among, part], v[among, part])[0]
    expected = F.linear(out, attention.proj.weight, attention.proj.bias)
    assert torch.allclose(attention(x, frames, along_time=along_time)[0], expected, atol=1e-5)


def test_pictures_are_cut_into_patches_and_time_comes_first():
    net = network().vfeat_extractor
    block = net.blocks[0]
    x = torch.randn(1, 1 + 8 * 4, 16, generator=torch.Generator().manual_seed(2))

    def norm(name, value):
        layer = getattr(block, name)
        return F.layer_norm(value, (16,), layer.weight, layer.bias, 1e-6)

    y = x + block.timeattn(norm("norm3", x), 8, along_time=True)
    y = y + block.attn(norm("norm1", y), 8, along_time=False)
    hidden = F.gelu(F.linear(norm("norm2", y), block.mlp.fc1.weight, block.mlp.fc1.bias))
    assert torch.allclose(block(x, 8), y + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias), atol=1e-5)
    # A change in frames 6 and 7 of a segment, in the lower right patch, enters at the tokens of that tubelet and place.
    seen: list[torch.Tensor] = []
    handle = net.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    pictures = torch.zeros(1, 16, 3, 32, 32)
    net(pictures)
    pictures[0, 6:8, :, 16:, 16:] = 1.0
    net(pictures)
    handle.remove()
    assert (seen[0] - seen[1]).abs().sum(-1)[0].nonzero().flatten().tolist() == [1 + 3 * 4 + 3]
    places = (
        net.pos_embed[0, 1:].repeat(8, 1) + net.temp_embed[0].repeat_interleave(4, 0) + net.patch_embed_3d.proj.bias
    )
    assert torch.allclose(seen[0][0, 1:], places, atol=1e-6)


def test_sound_encoder_is_the_ast_of_transformers():
    """The published names are of transformers 4; renamed to those of version 5, its model gives the same."""
    transformers = pytest.importorskip("transformers")
    ours = network().afeat_extractor
    config = transformers.ASTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_length=66
    )
    theirs = transformers.ASTModel(config).eval()
    if "layers.0.mlp.fc1.weight" not in theirs.state_dict():
        pytest.skip("another version names its parts otherwise")
    renames = {
        "encoder.layer.": "layers.",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    state = {}
    for name, value in ours.ast.state_dict().items():
        for old, new in renames.items():
            name = name.replace(old, new)
        state[name] = value
    theirs.load_state_dict(state)
    spectrograms = torch.randn(3, 128, 66, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(spectrograms.transpose(1, 2)).last_hidden_state
        assert torch.allclose(ours.ast(spectrograms), expected, atol=1e-5)
        # Frequency is gathered into one token of each of the six times, by a pre-norm encoder layer.
        tokens = expected[:, 2:].reshape(3, 12, 6, 16)
        gather = ours.freq_attn_agg
        column = torch.cat((gather.cls_token[0], tokens[1, :, 4]))
        normed = F.layer_norm(column, (16,), gather.norm1.weight, gather.norm1.bias, 1e-6)
        q, k, v = F.linear(normed, gather.self_attn.in_proj_weight, gather.self_attn.in_proj_bias).split(16, -1)
        heads = [attend(q[:, part], k[:, part], v[:, part]) for part in (slice(0, 8), slice(8, 16))]
        column = column + gather.self_attn.out_proj(torch.cat(heads, -1))
        normed = F.layer_norm(column, (16,), gather.norm2.weight, gather.norm2.bias, 1e-6)
        column = column + gather.linear2(F.gelu(gather.linear1(normed)))
        assert torch.allclose(ours(spectrograms)[1, 4], column[0], atol=1e-4)


def test_the_last_transformer_reads_one_sequence():
    net = network()
    generator = torch.Generator().manual_seed(4)
    seen, heard = (torch.randn(14, n, 16, generator=generator) for n in (8, 6))
    part = net.transformer
    x = torch.cat(
        [
            part.OFF_tok[0],
            F.layer_norm(net.vproj(seen).reshape(-1, 16), (16,), part.vis_in_lnorm.weight, part.vis_in_lnorm.bias),
            part.MOD_tok[0],
            F.layer_norm(net.aproj(heard).reshape(-1, 16), (16,), part.aud_in_lnorm.weight, part.aud_in_lnorm.bias),
        ]
    )
    x = x + part.pos_emb_cfg.pos_emb[0]
    assert len(x) == 198
    for block in part.blocks:
        y = block.ln1(x)
        q, k, v = block.attn.query(y), block.attn.key(y), block.attn.value(y)
        heads = [attend(q[:, s], k[:, s], v[:, s]) for s in (slice(n, n + 4) for n in range(0, 16, 4))]
        x = x + block.attn.proj(torch.cat(heads, -1))
        x = x + block.mlp(block.ln2(x))
    assert torch.allclose(net.logits(seen, heard), part.off_head(part.ln_f(x[:1]))[0], atol=1e-4)
    with pytest.raises(OviError, match="14 segments"):
        net.logits(seen[:13], heard[:13])


def test_weights_are_taken_whole_or_not_at_all(tmp_path):
    net = network()
    file = tmp_path / "weights.pth"
    torch.save(net.state_dict(), file)
    again = load_synchformer(file, TINY)
    again.train()
    assert not any(part.training for part in again.modules())
    assert not any(p.requires_grad for p in again.parameters())
    pictures = torch.rand(1, 16, 3, 32, 32)
    assert torch.equal(again.encode_pictures(pictures), net.encode_pictures(pictures))
    for spoilt in (
        {k: v for k, v in net.state_dict().items() if k != "transformer.OFF_tok"},
        {**net.state_dict(), "another.weight": torch.zeros(1)},
        {**net.state_dict(), "aproj.bias": torch.zeros(3)},
    ):
        torch.save(spoilt, file)
        with pytest.raises(OviError, match="other weights than Synchformer's"):
            load_synchformer(file, TINY)


# --- what it reads ---------------------------------------------------------------------------------------------------


def test_frames_at_another_rate_are_those_on_show():
    numbers = np.arange(121)
    assert frames_at(numbers, 25.0, 25.0) is numbers
    at_25 = frames_at(numbers, 24.0, 25.0)
    assert len(at_25) == 126  # 5.04 s
    shown_s, asked_s = (at_25 + 0.5) / 24, (np.arange(126) + 0.5) / 25
    assert np.abs(shown_s - asked_s).max() <= 0.5 / 24 + 1e-9
    assert abs(np.mean(shown_s - asked_s)) < 1e-3
    assert frames_at(np.arange(6), 12.0, 24.0).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert frames_at(np.arange(6), 24.0, 12.0).tolist() == [1, 3, 5]
    assert len(frames_at(np.arange(48), 24.0, 25.0)) == 50
    with pytest.raises(OviError, match="frame rates"):
        frames_at(np.arange(3), 0.0, 25.0)


def test_segments_are_counted_as_published():
    assert num_segments(120, 76800) == 14  # 4.8 s
    assert num_segments(119, 76800) == num_segments(120, 76799) == 13
    assert num_segments(200, 128000) == 24  # 8 s
    assert num_segments(5, 100) == 0
    frames, wave = np.zeros((121, 8, 8, 3), np.uint8), np.zeros(round(48000 * 121 / 24), np.float32)
    pictures, sound, count = prepared(frames, wave, fps=24.0, sample_rate=48000)
    assert (len(pictures), len(sound), count) == (126, 80667, 14)


def test_pictures_are_resized_and_cut_from_the_middle():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    # Far from black and white: its bytes overshoot, and are cut off, after rows as well as after columns.
    frames = np.random.default_rng(0).integers(90, 160, (24, 40, 60, 3)).astype(np.uint8)
    ours = picture_segments(frames, range(2), 32)
    assert ours.shape == (2, 16, 3, 32, 32)
    chain = v2.Compose(
        [
            v2.Resize(32, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(32),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    theirs = chain(torch.from_numpy(frames).permute(0, 3, 1, 2))
    apart = (torch.stack([theirs[:16], theirs[8:24]]) - ours).abs() * 127.5  # in steps of 256
    assert apart.max() <= 1.01  # its own bytes are rounded twice
    assert apart.mean() < 0.3
    square = picture_segments(np.full((16, 32, 32, 3), 255, np.uint8), range(1), 32)
    assert torch.equal(square, torch.ones(1, 16, 3, 32, 32))


def test_spectrograms_follow_torchaudio_and_numpy():
    """Power, HTK's mel with unit height in Hz, log; frame by frame in numpy, filters from transformers."""
    wave = np.random.default_rng(1).normal(0, 0.1, 10240 + 3 * 5120).astype(np.float32)
    ours = sound_segments(wave, range(1, 4))
    assert ours.shape == (3, 128, 66)
    piece = np.pad(wave[2 * 5120 : 2 * 5120 + 10240].astype(np.float64), 512, mode="reflect")
    window = np.zeros(1024)
    window[312:712] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    power = np.stack([np.abs(np.fft.rfft(piece[n * 160 : n * 160 + 1024] * window)) ** 2 for n in range(65)])
    audio_utils = pytest.importorskip("transformers.audio_utils")
    filters = audio_utils.mel_filter_bank(513, 128, 0.0, 8000.0, 16000, norm=None, mel_scale="htk")
    expected = (np.log(power @ filters + 1e-6) + 4.2677393) / (2 * 4.5689974)
    assert np.abs(ours[1, :, :65].numpy() - expected.T).max() < 1e-4
    assert ours[:, :, 65].numpy() == pytest.approx(4.2677393 / (2 * 4.5689974), abs=1e-6)


# --- the measure -----------------------------------------------------------------------------------------------------


def test_grid_and_mean():
    grid = offset_grid()
    assert grid.tolist() == pytest.approx([0.2 * n - 2.0 for n in range(21)], abs=1e-6)
    logits = torch.full((2, 21), -1.0)
    logits[0, 10], logits[1, 7] = 3.0, 3.0  # 0 s and -0.6 s
    assert desync_seconds(logits) == pytest.approx(0.3)
    for bad in (torch.zeros(21), torch.full((1, 21), math.nan)):
        with pytest.raises(OviError, match="logits"):
            desync_seconds(bad)


def metric(monkeypatch, tmp_path, net: Synchformer, fps: float = 25.0, rate: int = 16000) -> DeSync:
    file = tmp_path / "synchformer_state_dict.pth"
    file.write_bytes(b"tiny")
    monkeypatch.setattr(type(PUBLISHED), "find", lambda *_: file)
    monkeypatch.setattr(module, "load_synchformer", lambda _: net)
    return DeSync(fps, rate, path=str(file))


class Told(Synchformer):
    """Says which segments it was given: pictures and sounds carry the second they begin at."""

    def __init__(self) -> None:
        super().__init__(TINY)
        self.asked: list[tuple[list[float], list[float]]] = []

    def encode_pictures(self, segments):
        return segments.mean((1, 2, 3, 4))[:, None, None]

    def encode_sound(self, spectrograms):
        return spectrograms.mean((1, 2))[:, None, None]

    def logits(self, seen, heard):
        self.asked.append((seen.flatten().tolist(), heard.flatten().tolist()))
        return F.one_hot(torch.tensor([9, 15][len(self.asked) - 1]), 21).float()


def test_first_and_last_fourteen_segments_are_asked(monkeypatch, tmp_path):
    net = Told()
    measured = metric(monkeypatch, tmp_path, net, fps=25.0)
    ramp = np.linspace(0, 255, 200).astype(np.uint8)  # 8 s: brighter and louder with time
    frames = np.broadcast_to(ramp[:, None, None, None], (200, 32, 32, 3)).copy()
    wave = (np.random.default_rng(0).normal(size=128000) * np.linspace(0.01, 0.5, 128000)).astype(np.float32)
    measured.update(frames, wave)
    assert len(net.asked) == 2
    for (seen, heard), first in zip(net.asked, (0, 10), strict=True):  # of 24 segments
        means = [ramp[8 * n : 8 * n + 16].mean() / 127.5 - 1 for n in range(first, first + 14)]
        assert seen == pytest.approx(means, abs=1e-4)
        assert heard == pytest.approx(sound_segments(wave, range(first, first + 14)).mean((1, 2)).tolist(), abs=1e-5)
    figures = {tag: value.item() for tag, value in measured.compute().items()}
    assert figures == {
        "desync_synchformer": pytest.approx((0.2 + 1.0) / 2),
        "desync_synchformer_n": 1,
        "desync_synchformer_coverage": 1,
    }


def test_short_and_silent_clips_are_left_out(monkeypatch, tmp_path):
    measured = metric(monkeypatch, tmp_path, network(), fps=24.0, rate=22050)
    rng = np.random.default_rng(0)

    def clip(seconds: float):
        frames = rng.integers(0, 256, (round(24 * seconds), 36, 48, 3)).astype(np.uint8)
        return frames, rng.normal(0, 0.1, round(22050 * seconds)).astype(np.float32)

    measured.update(*clip(2.0))
    figures = measured.compute()
    assert math.isnan(figures["desync_synchformer"].item())
    assert figures["desync_synchformer_coverage"].item() == 0
    frames, wave = clip(5.0)
    measured.update(frames, np.zeros_like(wave))
    measured.update(frames, wave)
    logits = measured.clip_logits(frames, wave)
    assert logits.shape == (2, 21)
    assert torch.equal(logits[0], logits[1])
    figures = {tag: value.item() for tag, value in measured.compute().items()}
    assert figures["desync_synchformer"] == pytest.approx(abs(0.2 * int(logits[0].argmax()) - 2.0), abs=1e-6)
    assert figures["desync_synchformer_n"] == 1
    assert figures["desync_synchformer_coverage"] == pytest.approx(1 / 3)
    assert "network" in dict(measured.named_children())
    assert measured.identity()["digest"]
    assert not measured.metric_state.keys() & {"network"}


def test_missing_and_other_weights_are_told_apart(tmp_path):
    with pytest.raises(OviError, match=r"path of desync is not set.*synchformer_state_dict.pth.*5b2f5594"):
        DeSync(24, 16000)
    with pytest.raises(OviError, match="no such file"):
        DeSync(24, 16000, path=str(tmp_path))
    (tmp_path / "synchformer_state_dict.pth").write_bytes(b"something else")
    with pytest.raises(OviError, match="not the published file"):
        DeSync(24, 16000, path=str(tmp_path))
