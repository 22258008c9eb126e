"""``ovi convert``: weights to published names, exactly; what would mean something else is refused."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from ovi.checkpoint import load_reference, load_towers, read_weights, republish, to_reference
from ovi.commands import main as main_module
from ovi.commands.convert import num_bytes
from ovi.commands.restore import restore
from ovi.errors import OviError
from test_benchmarks_load import Held, bench_load
from test_checkpoint import made_checkpoint, same_tensors, saved
from test_towers import model_for, ours, theirs, wan_file


@pytest.fixture
def convert(capsys):
    """Runs ``ovi convert`` and returns what it said; with ``fails`` its one message."""

    def call(*words, fails=False):
        if not fails:
            main_module.main(["convert", *map(str, words)])
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stop:
            main_module.main(["convert", *map(str, words)])
        assert stop.value.code == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("ovi: ")
        assert "Traceback" not in err
        return err

    return call


@pytest.mark.parametrize("source", ["folder", "file"])
def test_a_run_becomes_weights_that_load_bit_for_bit(source, convert, published_run, tmp_path):
    source = published_run if source == "folder" else published_run / "checkpoints" / "last.ckpt"
    said = convert(source, tmp_path / "model.safetensors")
    run = restore(published_run).model
    back = load_reference(tmp_path / "model.safetensors")
    assert back.clock == run.clock
    assert (back.video.num_heads, back.video.text_len) == (2, 24)
    state = run.state_dict()
    same_tensors(back.state_dict(), state)
    parameters = sum(t.numel() for t in state.values())
    size = (tmp_path / "model.safetensors").stat().st_size
    assert f"{len(state):,} tensors, {parameters:,} parameters, {size:,} bytes, float32" in said
    assert "in the header: audio_config, clock, video_config" in said


def test_a_run_gives_its_averaged_weights(convert, published_run, tmp_path):
    convert(published_run, tmp_path / "model.safetensors")
    checkpoint = torch.load(published_run / "checkpoints" / "last.ckpt", weights_only=True)
    name = "video.out.head.bias"
    written = load_file(tmp_path / "model.safetensors")["video_model.head.head.bias"]
    assert torch.equal(written, checkpoint["state_dict"][f"model.{name}"])
    current = next(t for k, t in checkpoint["current_model_state"].items() if k.endswith(name))
    assert not torch.equal(written, current)


@pytest.mark.parametrize("form", ["whole", "sharded", "folder", "module", "app", "bare"])
def test_published_weights_are_written_again(form, convert, tmp_path):
    """The golden file's heads cannot be read off its tensors, and need not be known."""
    path, state, *_ = made_checkpoint(form, tmp_path)
    said = convert(path, tmp_path / "new.safetensors", "--dtype", "bfloat16")
    same_tensors(load_file(tmp_path / "new.safetensors"), {k: t.bfloat16() for k, t in state.items()})
    assert "bfloat16" in said
    assert "in the header" not in said, "nothing was written down beside the source"


def test_shards_and_back(convert, tmp_path):
    _, path = saved(tmp_path, "a.safetensors")
    said = convert(path, tmp_path / "b.safetensors", "--shard-size", "100kB")
    shards = list(tmp_path.glob("b-*"))
    assert len(shards) > 2
    assert f"b.safetensors.index.json and {len(shards)} shards: " in said
    convert(tmp_path / "b.safetensors.index.json", tmp_path / "c.safetensors")
    same_tensors(load_file(tmp_path / "c.safetensors"), load_file(path))
    assert load_reference(tmp_path / "c.safetensors").audio.num_heads == 3, "the header travels along"


@pytest.mark.parametrize("form", ["diffusers", "diffusers in shards", "original"])
def test_wans_tower_becomes_a_published_tower(form, convert, tmp_path):
    (tmp_path / "wan").mkdir()
    convert(wan_file(form, tmp_path / "wan"), tmp_path / "video.safetensors")
    names = load_file(tmp_path / "video.safetensors")
    assert names["video_model.blocks.0.modulation.modulation"].shape == (1, 6, 44)
    assert all(name.startswith("video_model.") for name in names)
    model = model_for()
    assert load_towers(model, tmp_path / "video.safetensors") == ("video",)
    assert (ours(model) - theirs()).abs().max() < 2e-5
    with pytest.raises(OviError, match="num_heads 2 against 1"):
        load_towers(model_for(num_heads=1), tmp_path / "video.safetensors")


@pytest.mark.parametrize("towers", ["video", "audio", "video,audio"])
def test_towers_alone(towers, convert, published_run, tmp_path):
    convert(published_run, tmp_path / "whole.safetensors")
    whole = load_file(tmp_path / "whole.safetensors")
    expected = {
        k: t for k, t in whole.items() if "fusion" not in k and k.startswith(tuple(f"{m}_" for m in towers.split(",")))
    }
    for number, source in enumerate((published_run, tmp_path / "whole.safetensors")):
        convert(source, tmp_path / f"{number}.safetensors", "--towers", towers)
        same_tensors(load_file(tmp_path / f"{number}.safetensors"), expected)


def test_towers_of_a_run_with_another_fusion(convert, train, tmp_path):
    train(tmp_path / "run", "model/fusion=none", "model/rope_alignment=scale")
    said = convert(tmp_path / "run", tmp_path / "x.safetensors", fails=True)
    assert "its fusion is 'none', not 'ovi'" in said
    assert "its audio patch is 'linear', not 'audio'" in said
    convert(tmp_path / "run", tmp_path / "x.safetensors", "--towers", "video")
    expected = restore(tmp_path / "run").model.video.state_dict()
    same_tensors(load_file(tmp_path / "x.safetensors"), to_reference({f"video.{k}": t for k, t in expected.items()}))


def test_positions_that_the_original_has_not_are_refused_unless_allowed(convert, train, tmp_path):
    """The defaults of a small twin, and of the demo: a clock in seconds and a linear audio patch."""
    train(tmp_path / "run")
    said = convert(tmp_path / "run", tmp_path / "x.safetensors", fails=True)
    assert "model/patch@model.audio.patch=audio" in said
    train(tmp_path / "other", "model/patch@model.audio.patch=audio")
    said = convert(tmp_path / "other", tmp_path / "x.safetensors", fails=True)
    assert "train with model/rope_alignment=scale" in said
    assert "--allow-differences" in said
    assert not (tmp_path / "x.safetensors").exists()
    said = convert(tmp_path / "other", tmp_path / "x.safetensors", "--allow-differences")
    assert "differences" in said
    with pytest.warns(UserWarning, match="other positions"):
        load_reference(tmp_path / "x.safetensors")


def test_what_stands_there_is_replaced_only_when_told(convert, tmp_path):
    _, path = saved(tmp_path, "a.safetensors")
    convert(path, tmp_path / "b.safetensors", "--shard-size", "100kB")
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    said = convert(path, tmp_path / "b.safetensors", fails=True)
    assert re.search(r"b-00001-of-\d+.safetensors.*b.safetensors.index.json in .* would be replaced", said)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    convert(path, tmp_path / "b.safetensors", "--overwrite")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    convert(path, path, "--dtype", "float16", "--overwrite")  # onto itself, though it is mapped
    same_tensors(load_file(path), {k: t.half() for k, t in load_file(tmp_path / "b.safetensors").items()})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere", "x.safetensors"], "nowhere: there is no such checkpoint"),
        (["{here}", "{here}/x.safetensors"], "holds no .safetensors file"),
        (["{file}", "{here}/x.pt"], "must end in .safetensors"),
        (["{file}", "{here}/no/x.safetensors"], "make it first"),
        (["{file}", "{here}/x.safetensors", "--shard-size", "5 apples"], "--shard-size must be a size such as 5GB"),
        (["{file}", "{here}/x.safetensors", "--towers", "video,sound"], "divided by a comma; got sound"),
        (["{one}", "{here}/x.safetensors", "--towers", "audio"], "no audio tower; there is video"),
        (["{strange}", "{here}/x.safetensors"], "in no way known here"),
        (["{cut}", "{here}/x.safetensors"], "missing video_model.blocks.1.norm3.bias"),
    ],
)
def test_bad_input_is_one_clear_message(words, says, convert, tmp_path):
    here, files = tmp_path / "here", tmp_path / "files"
    here.mkdir()
    files.mkdir()
    _, path = saved(files)
    state = load_file(path)
    save_file({"encoder": torch.zeros(1)}, files / "strange.safetensors")
    save_file({k: t for k, t in state.items() if k != "video_model.blocks.1.norm3.bias"}, files / "cut.safetensors")
    convert(path, files / "one.safetensors", "--towers", "video")
    named = {name: files / f"{name}.safetensors" for name in ("strange", "cut", "one")}
    said = convert(*(w.format(here=here, file=path, **named) for w in words), fails=True)
    assert says in said
    assert not list(here.iterdir())


def test_help_names_every_source(capsys):
    with pytest.raises(SystemExit) as stop:
        main_module.main(["convert", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for word in ("--towers", "--dtype", "--shard-size", "--overwrite", ".index.json", "Wan2.2-TI2V-5B-Diffusers"):
        assert word in said


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("200kb", 200_000), ("12", 12), ("4GiB", 2**32)]
)
def test_sizes(text, size):
    assert num_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0MB", "-1GB", "5 TBs"])
def test_what_is_no_size(text):
    with pytest.raises(OviError, match="--shard-size"):
        num_bytes(text)


def test_metadata_of_a_run_is_the_references_configuration(convert, published_run, tmp_path):
    convert(published_run, tmp_path / "m.safetensors", "--shard-size", "1MB")
    weights = sorted(tmp_path.glob("m-*"))
    from safetensors import safe_open

    for file in weights:  # in every shard, so that one alone explains itself
        with safe_open(file, "pt") as opened:
            config = json.loads(opened.metadata()["audio_config"])
            assert config["temporal_rope_scaling_factor"] == 0.19676
            assert config["num_heads"] == 2


def republished(path, sizes):
    """``ovi convert`` with a cast, as the benchmark measures loads; the result is what it wrote."""
    target = path.with_name("written.safetensors")
    files = republish(read_weights(path), target, dtype=torch.float32, max_shard_bytes=sizes.get("shard"))
    return Held(torch.tensor(sum(f.stat().st_size for f in files)))


@pytest.mark.parametrize("sizes", [{}, {"shard": 50_000_000}])
def test_writing_holds_one_tensor_at_a_time(sizes, tmp_path):
    """Neither the source nor the target is ever in memory as a whole, in shards or not."""
    shapes = bench_load.shapes_of({"dim": 512, "num_heads": 4, "num_blocks": 4, "ffn_dim": 2048, "text_dim": 256})
    largest = 2 * max(map(bench_load.num_bytes, shapes.values()))
    total = 2 * sum(map(bench_load.num_bytes, shapes.values()))
    bench_load.write_sparse(tmp_path / "source.safetensors", shapes)
    taken = bench_load.load(republished, tmp_path / "source.safetensors", sizes, 1)
    # One tensor, and one that the allocator may keep for the next: nothing that grows with the file.
    assert taken["anonymous"] < 2.5 * largest < total / 3
    assert sum(f.stat().st_size for f in tmp_path.glob("written*")) > total
