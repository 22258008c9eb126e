"""Published weights in and out: bit for bit, in every form, with what tensors do not show, or not at all."""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ovi.checkpoint import (
    WHOLE,
    differences,
    load_reference,
    read_weights,
    rope_factor,
    save_reference,
    to_reference,
    without_storage,
    write_weights,
)
from ovi.checkpoint.write import written_under
from ovi.clock import Clock
from ovi.errors import OviError
from ovi.fusion import FUSIONS, OviFusion
from ovi.patch import AudioPatch, VideoPatch
from ovi.rope import ROPE_ALIGNMENTS, scale
from ovi.rope_scaling import ROPE_SCALINGS
from ovi.twin import TwinDiT
from small_twins import twin
from test_golden import FILES, load, texts, tower

FORMS = ("whole", "sharded", "folder", "diffusers folder", "module", "app", "bare")


def golden_state():
    metadata, tensors = load(FILES[0])
    state = {k.removeprefix("state."): t.contiguous() for k, t in tensors.items() if k.startswith("state.")}
    configs = {f"{m}_config": json.loads(metadata[f"{m}_config"]) for m in ("video", "audio")}
    return state, configs, (metadata, tensors)


def made_checkpoint(form, folder):
    """A golden file's weights on disk in one of the forms that published weights come in."""
    state, configs, golden = golden_state()
    nested = {"module": {"module": state}, "app": {"app": {"model": state}}, "bare": state}
    if form in nested:
        path = folder / "model.pt"
        torch.save(nested[form], path)
    elif form in ("sharded", "folder"):
        names = [("a.safetensors", sorted(state)[::2]), ("b.safetensors", sorted(state)[1::2])]
        for name, keys in names:
            save_file({k: state[k] for k in keys}, folder / name)
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": {k: name for name, keys in names for k in keys}}))
    else:
        path = folder / ("model.safetensors" if form == "whole" else "diffusion_pytorch_model.safetensors")
        save_file(state, path)
        if form == "diffusers folder":
            save_file({"x": torch.zeros(1)}, folder / "something_else.safetensors")
    return folder if "folder" in form else path, state, configs, golden


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_published_weights_go_in_and_out_bit_for_bit(form, tmp_path):
    (tmp_path / "in").mkdir()
    path, state, configs, (metadata, tensors) = made_checkpoint(form, tmp_path / "in")
    model = load_reference(path, **configs)
    video, audio = model(
        tensors["in.video"],
        tensors["in.audio"],
        tensors["in.timestep"] / 1000,
        texts(tensors, "text"),
        texts(tensors, "text"),
        clean_first_frame=metadata["first_frame_is_clean"] == "True",
    )
    assert (video - tensors["out.video"]).abs().max() < 2e-5
    assert (audio - tensors["out.audio"]).abs().max() < 2e-5
    assert save_reference(model, tmp_path / "out.safetensors") == [tmp_path / "out.safetensors"]
    same_tensors(load_file(tmp_path / "out.safetensors"), state)
    assert not list(tmp_path.rglob("*.partial"))


def same_tensors(a, b):
    assert set(a) == set(b)
    assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in b)


def saved(folder, name="a.safetensors", **knobs):
    """A small twin that the published code could run, in a file that says what tensors do not show."""
    torch.manual_seed(3)
    config = {"in_dim": 4, "text_dim": 8, "text_len": 5, "dim": 48, "num_heads": 3, "num_layers": 2}
    config |= {"ffn_dim": 32, "freq_dim": 16}
    model = TwinDiT(
        tower(config, VideoPatch),
        tower({**config, "in_dim": 6}, AudioPatch),
        Clock(fps=12),
        fusion=OviFusion,
        rope_alignment=partial(scale, factor=0.25),
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    files = save_reference(model, folder / name, **knobs)
    return model, files[-1]


def test_what_tensors_do_not_show_comes_back_from_the_header(tmp_path):
    model, path = saved(tmp_path)
    back = load_reference(path)
    assert (back.video.num_heads, back.audio.num_heads, back.video.text_len) == (3, 3, 5)
    assert back.clock == Clock(fps=12)
    assert rope_factor(back) == 0.25
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 4, 3, 4, 4, generator=g), torch.randn(1, 9, 6, generator=g), torch.tensor([0.3])]
    text = [torch.randn(4, 8, generator=g)]
    with torch.no_grad():
        for a, b in zip(model(*inputs, text, text), back(*inputs, text, text)):
            assert torch.equal(a, b)


def test_the_header_builds_the_reference(tmp_path):
    """The words of the reference's configuration, as its own constructor takes them."""
    _, path = saved(tmp_path)
    golden, _ = load(FILES[0])
    with safe_open(path, "pt") as opened:
        for modality in ("video", "audio"):
            ours, theirs = json.loads(opened.metadata()[f"{modality}_config"]), json.loads(golden[f"{modality}_config"])
            assert set(ours) == set(theirs)
            assert {k: type(v) for k, v in ours.items()} == {k: type(v) for k, v in theirs.items()}
            assert ours["model_type"] == theirs["model_type"]


def test_given_configurations_win_and_must_not_contradict_the_tensors(tmp_path):
    _, path = saved(tmp_path)
    assert load_reference(path, video_config={"num_heads": 1}).video.num_heads == 1
    assert load_reference(path, clock=Clock(fps=30)).clock.fps == 30
    with pytest.raises(OviError, match="audio_config says ffn_dim 33, the tensors 32"):
        load_reference(path, audio_config={"ffn_dim": 33, "num_heads": 3})


@pytest.mark.parametrize("most", [10_000, 100_000, 10**9])
def test_shards_hold_what_one_file_holds(most, tmp_path):
    model, whole = saved(tmp_path)
    saved(tmp_path, "b.safetensors", max_shard_bytes=most)
    shards = sorted(tmp_path.glob("b-*"))
    if most == 10**9:
        assert not shards
        same_tensors(load_file(tmp_path / "b.safetensors"), load_file(whole))
        return
    index = json.loads((tmp_path / "b.safetensors.index.json").read_text())
    state = load_file(whole)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    assert [s.name for s in shards] == [
        f"b-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    ]
    held = {shard.name: load_file(shard) for shard in shards}
    assert index["weight_map"] == {key: name for name, tensors in held.items() for key in tensors}
    same_tensors({k: t for tensors in held.values() for k, t in tensors.items()}, state)
    for tensors in held.values():
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= most
    assert len(shards) < len(state)
    back = load_reference(tmp_path / "b.safetensors.index.json")
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values()))
    assert back.video.num_heads == 3


def test_writing_replaces_the_other_form(tmp_path):
    """A folder must never hold new shards beside an old file, or an old index: a reader would pick one of them."""
    saved(tmp_path, max_shard_bytes=50_000)
    (tmp_path / "another-00001-of-00002.safetensors").touch()
    assert len(written_under(tmp_path / "a.safetensors")) > 2
    saved(tmp_path)
    assert written_under(tmp_path / "a.safetensors") == [tmp_path / "a.safetensors"]
    killed = ["a.safetensors.partial", "a-00003-of-00009.safetensors.partial", "a.safetensors.index.json.partial"]
    for name in (*killed, "ab.safetensors.partial"):
        (tmp_path / name).touch()
    saved(tmp_path, max_shard_bytes=50_000)
    assert not (tmp_path / "a.safetensors").exists()
    assert (tmp_path / "another-00001-of-00002.safetensors").exists()
    assert [f.name for f in tmp_path.glob("*.partial")] == ["ab.safetensors.partial"], "another writer's is left alone"
    assert load_reference(tmp_path / "a.safetensors.index.json").video.dim == 48


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_cast_on_the_way_in_and_out(dtype, tmp_path):
    model, path = saved(tmp_path)
    cast = load_reference(path, dtype=dtype)
    assert {p.dtype for p in cast.parameters()} == {dtype}
    assert not any(p.is_meta for p in cast.parameters())
    expected = {k: t.to(dtype) for k, t in to_reference(model.state_dict()).items()}
    save_reference(model, tmp_path / "cast.safetensors", dtype=dtype)
    same_tensors(load_file(tmp_path / "cast.safetensors"), expected)
    same_tensors(to_reference(cast.state_dict()), expected)


def test_types_and_shapes_are_written_as_the_library_reads_them(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.5),
        "odd": torch.arange(3, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "half": torch.randn(5).half(),
        "brain": torch.randn(2, 3).bfloat16(),
        "wide": torch.randn(7, dtype=torch.float64),
        "turned": torch.randn(4, 6).T,
        "whole": torch.arange(5),
        "yes": torch.tensor([True, False]),
    }
    write_weights(tmp_path / "t.safetensors", tensors, metadata={"a": "ä"})
    same_tensors(load_file(tmp_path / "t.safetensors"), tensors)
    content = (tmp_path / "t.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"a": "ä"}
    for entry in header.values():  # aligned to its own width, from a start that is aligned to 8
        width = {"U8": 1, "BOOL": 1, "F16": 2, "BF16": 2, "F32": 4}.get(entry["dtype"], 8)
        assert entry["data_offsets"][0] % width == 0
    assert length % 8 == 0


def test_numbers_that_do_not_fit_a_type_are_refused(tmp_path):
    tensors = {"fine": torch.ones(2), "large": torch.tensor([1.0, 7e4])}
    with pytest.raises(OviError, match="large reaches 70000, which is too large for float16"):
        write_weights(tmp_path / "t.safetensors", tensors, dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    write_weights(tmp_path / "t.safetensors", {"inf": torch.tensor([math.inf])}, dtype=torch.float16)


def test_what_was_there_stays_when_writing_fails(tmp_path):
    _, path = saved(tmp_path)
    before = path.read_bytes()
    for most in (None, 64):
        with pytest.raises(OviError, match="too large"):
            write_weights(
                path, {"a": torch.ones(64), "b": torch.full((2,), 1e9)}, dtype=torch.float16, max_shard_bytes=most
            )
        assert [f.name for f in tmp_path.iterdir()] == [path.name]
        assert path.read_bytes() == before


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=7_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    tensors = {"a": torch.ones(2_000_000)}
    with pytest.raises(OviError, match=r"needs 0\.01 GB and 0\.01 GB are free.*smaller dtype"):
        write_weights(tmp_path / "t.safetensors", tensors)
    assert not list(tmp_path.iterdir())
    write_weights(tmp_path / "t.safetensors", tensors, dtype=torch.bfloat16)


@pytest.mark.parametrize("call", range(4))
def test_an_interrupt_at_any_file_leaves_what_was_there(call, tmp_path, monkeypatch):
    """Four shards, interrupted while any of them reaches the disk."""
    _, path = saved(tmp_path)
    before, count = path.read_bytes(), iter(range(10))

    def interrupted(descriptor):
        if next(count) == call:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_weights(path, {str(n): torch.ones(64) for n in range(4)}, max_shard_bytes=256)
    assert [f.name for f in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(OviError, match=r"nowhere.*cannot be written"):
        write_weights(tmp_path / "nowhere" / "t.safetensors", {"a": torch.ones(1)})
    with pytest.raises(OviError, match=r"\.safetensors"):
        write_weights(tmp_path / "t.pt", {"a": torch.ones(1)})


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_training_on_mapped_weights_leaves_the_file_as_it_is(suffix, tmp_path):
    """Parameters are the file's pages until they are written to, and then copies."""
    model, path = saved(tmp_path)
    if suffix == "pt":
        path = tmp_path / "a.pt"
        torch.save(to_reference(model.state_dict()), path)
        config = {"num_heads": 3, "text_len": 5}
        loaded = load_reference(path, video_config=config, audio_config=config)
    else:
        loaded = load_reference(path)
    before = path.read_bytes()
    with torch.no_grad():
        for parameter in loaded.parameters():
            assert parameter.requires_grad
            parameter.add_(1)
    assert path.read_bytes() == before
    for a, b in zip(loaded.state_dict().values(), model.state_dict().values()):
        assert torch.equal(a, b + 1)


def test_all_that_does_not_fit_is_said_at_once():
    state, configs, _ = golden_state()
    del state["video_model.blocks.1.norm3.bias"]
    state["video_model.blocks.0.ffn.2.bias"] = torch.zeros(7)
    state["audio_model.surplus"] = torch.zeros(1)
    state["stranger"] = torch.zeros(1)
    with pytest.raises(OviError) as caught:
        load_reference(state, **configs)
    said = str(caught.value)
    assert "4 tensors" in said
    assert "missing video_model.blocks.1.norm3.bias" in said
    assert "video_model.blocks.0.ffn.2.bias is [7], expected [48]" in said
    assert "unexpected audio_model.surplus" in said
    assert "unexpected stranger" in said


def test_heads_that_cannot_be_read_off_are_asked_for(tmp_path):
    path, *_ = made_checkpoint("whole", tmp_path)
    with pytest.raises(OviError, match="num_heads in video_config"):
        load_reference(path)


@pytest.mark.parametrize(
    ("name", "content"), [("a.safetensors", b"rubbish"), ("a.pt", b"rubbish"), ("a.index.json", b"{}")]
)
def test_damaged_checkpoints_are_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OviError, match="cannot be read"):
        load_reference(tmp_path / name)
    with pytest.raises(OviError, match="no such checkpoint"):
        load_reference(tmp_path / "nowhere.safetensors")


def test_a_cut_file_is_named(tmp_path):
    _, path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(OviError, match=r"a\.safetensors: cannot be read"):
        load_reference(path)


def test_a_missing_shard_is_named(tmp_path):
    _, index = saved(tmp_path, max_shard_bytes=50_000)
    (tmp_path / "a-00002-of-00004.safetensors").unlink(missing_ok=True)
    sorted(tmp_path.glob("a-*"))[-1].unlink()
    with pytest.raises(OviError, match=r"its shard a-\d+-of-\d+\.safetensors is not there"):
        load_reference(index)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "holds no .safetensors file, no index of shards and no checkpoints/last.ckpt"),
        (["transformer/x.safetensors"], "its folders transformer do hold some"),
        (["x.safetensors", "y.safetensors"], "several checkpoints: name one of x.safetensors, y.safetensors"),
    ],
)
def test_folders_without_a_single_checkpoint_are_explained(files, says, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(OviError) as caught:
        read_weights(tmp_path)
    assert says in str(caught.value)


def test_tensors_under_strange_names_are_no_checkpoint(tmp_path):
    save_file({"encoder.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    torch.save({"epoch": 3, "weights": {"encoder.weight": torch.zeros(1)}}, tmp_path / "x.pt")
    with pytest.raises(OviError, match=r"in no way known here \(encoder\.weight\)"):
        read_weights(tmp_path / "x.safetensors")
    with pytest.raises(OviError, match=r"in 'module', in 'app\.model'"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("fusion", [name for name in FUSIONS if name != "ovi"])
def test_another_fusion_has_no_published_form(fusion, tmp_path):
    with pytest.raises(OviError, match=f"its fusion is '{fusion}', not 'ovi'"):
        save_reference(twin(fusion, "scale"), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_fusion_with_more_tensors_has_no_published_names(tmp_path):
    model = twin("ovi", "scale")
    model.fusions[0].extra = torch.nn.Linear(1, 1)
    with pytest.raises(OviError, match=r"no name for fusions\.0\.extra.*fusion 'ovi'"):
        save_reference(model, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


# What has a scale for a clock: frame i at i, token j at factor * j.
SCALES = {"scale": 0.19676, "none": 1.0, "ratio": Clock(fps=8, video_stride=1).ratio}


@pytest.mark.parametrize("alignment", list(ROPE_ALIGNMENTS))
def test_only_positions_that_the_original_can_have_are_written(alignment, tmp_path):
    model = twin("ovi", alignment)
    if alignment in SCALES:
        save_reference(model, tmp_path / "x.safetensors")
        back = load_reference(tmp_path / "x.safetensors")
        assert rope_factor(back) == SCALES[alignment]
    else:
        with pytest.raises(OviError, match=r"original would run.*other positions.*rope_alignment=scale"):
            save_reference(model, tmp_path / "x.safetensors")
        assert not list(tmp_path.iterdir())
        save_reference(model, tmp_path / "x.safetensors", allow_differences=True)
        with pytest.warns(UserWarning, match="trained otherwise than the published network runs.*other positions"):
            load_reference(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"self_alignment": ROPE_ALIGNMENTS["none"]}, "self-attention and exchange have different positions"),
        ({"time_axis_only": True}, "rotates by time alone"),
        *(({"rope_scaling": f}, "changed for longer clips") for n, f in ROPE_SCALINGS.items() if n != "identity"),
        ({"tower": {"theta": 500.0}}, "video tower's theta is 500"),
        ({"tower": {"mask_text_padding": True}}, "audio tower hides the padding"),
    ],
)
def test_what_no_tensor_shows_is_refused_unless_allowed(knobs, says, tmp_path):
    model = twin("ovi", "scale", **knobs)
    with pytest.raises(OviError, match=says):
        save_reference(model, tmp_path / "x.safetensors")
    save_reference(model, tmp_path / "x.safetensors", allow_differences=True)
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert says in opened.metadata()["differences"]


def test_a_scaling_that_changes_nothing_is_no_difference(tmp_path):
    assert differences(twin("ovi", "scale", rope_scaling=ROPE_SCALINGS["identity"]), WHOLE) == []
    assert (
        differences(twin("ovi", "scale", rope_scaling=partial(ROPE_SCALINGS["interpolate"], factor=1.0)), WHOLE) == []
    )


@pytest.mark.parametrize("plan", ["first:1", "every:2", [[0, 1]]])
def test_a_twin_that_exchanges_in_some_blocks_has_no_published_form(plan, tmp_path):
    with pytest.raises(OviError, match="not every block of one tower is paired"):
        save_reference(twin("ovi", "scale", plan=plan), tmp_path / "x.safetensors")
    save_reference(twin("ovi", "scale", plan=plan), tmp_path / "x.safetensors", parts=("video", "audio"))


def test_towers_that_only_we_can_join_are_refused(tmp_path):
    torch.manual_seed(0)
    config = {"in_dim": 4, "text_dim": 8, "text_len": 5, "num_heads": 2, "num_layers": 1, "ffn_dim": 32, "freq_dim": 16}
    towers = tower({**config, "dim": 24}, VideoPatch), tower({**config, "dim": 48}, partial(AudioPatch, kernel=3))
    model = TwinDiT(*towers, Clock(), fusion=OviFusion, rope_alignment=scale)
    with pytest.raises(OviError) as caught:
        save_reference(model, tmp_path / "x.safetensors")
    assert "kernel of 3" in str(caught.value)
    assert "differ in dim, 24 and 48" in str(caught.value)


@pytest.mark.parametrize("fusion", list(FUSIONS))
def test_a_skeleton_has_the_shapes_of_the_model(fusion):
    with without_storage():
        bare = twin(fusion, live=False)
    real = twin(fusion).state_dict()
    assert {k: (t.shape, t.dtype) for k, t in bare.state_dict().items()} == {
        k: (t.shape, t.dtype) for k, t in real.items()
    }
    assert all(t.is_meta for t in bare.state_dict().values())
    assert not any(p.requires_grad is False for p in bare.parameters())


def test_loading_imports_no_symbolic_mathematics(tmp_path):
    """SymPy and PyTorch's decompositions took 2.4 s of every load, for draws on the meta device that do nothing."""
    _, path = saved(tmp_path)
    code = (
        "import sys; from ovi.checkpoint import load_reference; before = set(sys.modules);"
        f"load_reference({str(path)!r}); print({{m.split('.')[0] for m in set(sys.modules) - before}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "sympy" not in done.stdout


def test_tensors_off_their_alignment_and_of_other_types_are_read_too(tmp_path):
    """The format promises neither; such tensors are the library's to read."""
    number = torch.tensor([1.5, -2.0])
    eight = torch.tensor([0.5, 448.0]).to(torch.float8_e4m3fn)
    header = {
        "patch_embedding.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "eight": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [8, 10]},
    }
    text = json.dumps(header).encode()
    text += b" " * (3 - len(text) % 4)  # off by one, or three, from any multiple of 4
    data = number.numpy().tobytes() + eight.view(torch.uint8).numpy().tobytes()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    tensors = read_weights(tmp_path / "x.safetensors").tensors
    assert torch.equal(tensors["patch_embedding.weight"], number)
    assert torch.equal(tensors["eight"].float(), eight.float())
