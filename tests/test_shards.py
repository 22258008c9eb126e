"""Samples out of shards: as another reader finds them, and damage named."""

import json
import pickle
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
import webdataset as wds
from safetensors.torch import load, save
from webdataset.tariterators import group_by_keys, tar_file_expander

from latent_sets import AUDIO, VIDEO, copy_set, members, sample, write_set, write_tar
from ovi.data.index import LatentShapes
from ovi.data.quantise import packed
from ovi.data.shards import LatentShards, ShardIndex, collate
from ovi.errors import OviError


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set with a space: and a colon"), {"train": [5, 5, 5, 4], "val": [3]})


# --- content ---------------------------------------------------------------------------------------------------------


def test_samples_are_those_that_webdataset_reads(index):
    mine = iter(LatentShards(index, "train"))
    for shard in index.shards("train"):
        with open(shard.path, "rb") as stream:
            for theirs in group_by_keys(tar_file_expander(iter([{"url": str(shard.path), "stream": stream}]))):
                one = next(mine)
                assert one.key == theirs["__key__"]
                assert one.about == json.loads(theirs["json"])
                for name, tensor in load(theirs["safetensors"]).items():
                    assert torch.equal(getattr(one, name), tensor)
    assert next(mine, None) is None


@pytest.mark.parametrize("key", ["short", "a folder/with a space/clip", "ü" * 60, "long/" * 30 + "clip", "x" * 180])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_length_and_script_are_read_as_webdataset_reads_them(tmp_path, key, form):
    index = write_set(tmp_path, {"train": [1], "val": []})
    path = index.shards("train")[0].path
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members(key, *sample(7)):
            write_member(tar, name, content)
    with open(path, "rb") as stream:
        (theirs,) = group_by_keys(tar_file_expander(iter([{"url": "x", "stream": stream}])))
    (mine,) = LatentShards(index, "train")
    assert mine.key == theirs["__key__"] == key
    assert torch.equal(mine.video, sample(7)[0]["video"])


def test_a_batch_of_more_shards_than_stay_open_holds_what_its_keys_say(tmp_path):
    """Those opened first are closed while the others are looked up, and their descriptors go to others."""
    index = write_set(tmp_path, {"train": [1] * 150})
    batch = LatentShards(index, "train", strict=True).read_batch(range(150)).unpack()
    assert batch.keys == [f"clip-{n:04d}" for n in range(150)]
    for n in range(150):
        assert torch.equal(batch.video[n], sample(n)[0]["video"])
        assert torch.equal(batch.audio[n], sample(n)[0]["audio"])
        assert torch.equal(batch.text[n], sample(n)[0]["text"])


def write_member(tar, name, content):
    from io import BytesIO

    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, BytesIO(content))


def test_what_webdatasets_writer_writes_is_read(tmp_path):
    index = write_set(tmp_path, {"train": [4], "val": []})
    path = index.shards("train")[0].path
    with open(path, "wb") as file, wds.TarWriter(file, encoder=False, mtime=0) as writer:
        for n in range(4):
            tensors, about = sample(n)
            writer.write({"__key__": f"w{n}", "safetensors": save(tensors), "json": json.dumps(about).encode()})
    assert [s.key for s in LatentShards(index, "train")] == ["w0", "w1", "w2", "w3"]


def test_a_batch_holds_what_was_written_in_its_order(index):
    numbers = [17, 3, 3, 0, 11]
    batch = LatentShards(index, "train").read_batch(numbers).unpack()
    assert batch.keys == [f"clip-{n:04d}" for n in numbers]
    moved = batch.to("cpu")
    for row, number in enumerate(numbers):
        tensors, about = sample(number)
        assert batch.video.dtype == torch.float16
        assert torch.equal(moved.video[row], tensors["video"].float())
        assert torch.equal(moved.audio[row], tensors["audio"].float())
        assert torch.equal(moved.text[row], tensors["text"].float())
        assert batch.captions[row] == about.pop("caption")
        assert batch.extra[row] == about
    assert {moved.video.dtype, moved.audio.dtype, moved.text[0].dtype} == {torch.float32}


def test_collated_samples_are_the_batch(index):
    dataset = LatentShards(index, "train")
    one, other = collate([dataset[4], dataset[9]]), dataset.read_batch([4, 9]).unpack().to("cpu")
    assert torch.equal(one.video, other.video)
    assert torch.equal(one.audio, other.audio)
    assert all(torch.equal(a, b) for a, b in zip(one.text, other.text))
    assert (one.keys, one.captions, one.extra) == (other.keys, other.captions, other.extra)


def test_the_index_gives_codecs_clock_and_shapes(index):
    assert index.latent_shapes == {"video": VIDEO, "audio": AUDIO}
    assert index.codecs().clock == index.clock
    assert (index.num_samples("train"), index.num_samples("val")) == (19, 3)
    assert index.layout().text_dim == 64


def test_a_set_of_version_1_has_one_shape_for_all(tmp_path):
    old = write_set(tmp_path, {"train": [2, 2], "val": []}, version=1)
    assert {shard.shapes for shard in old.shards("train")} == {LatentShapes(VIDEO, AUDIO)}
    assert len(list(LatentShards(old, "train"))) == 4


def test_shards_have_shapes_of_their_own(tmp_path):
    shapes = [{"video": (12, 8, 4, 6), "audio": (31, 64)}, {"video": None, "audio": (50, 64)}]
    index = write_set(tmp_path, {"train": [1, 1], "val": []}, shapes=shapes)
    both, sound = LatentShards(index, "train")
    assert both.video.shape == (12, 8, 4, 6)
    assert sound.video.shape == (12, 0, 0, 0)
    assert sound.audio.shape == (50, 64)
    assert [shard.shapes.num_positions for shard in index.shards("train")] == [8 * 24 + 31, 50]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_sample_of_another_type_than_its_set_becomes_the_sets(tmp_path, stored):
    index = write_set(tmp_path, {"train": [2], "val": []})
    write_tar(index.shards("train")[0].path, members("a", *sample(3, dtype=stored)) + members("b", *sample(4)))
    batch = LatentShards(index, "train").read_batch([0, 1]).unpack()
    assert batch.video.dtype == torch.float16
    assert batch.video[:, 0, 0, 0, 0].tolist() == [3, 4]


def test_samples_in_8_bits_come_out_as_numbers(tmp_path):
    index = write_set(tmp_path, {"train": [1], "val": []})
    tensors, about = sample(0)
    tensors["video"] = torch.randn(VIDEO, generator=torch.Generator().manual_seed(0))
    tensors["audio"] = torch.randn(AUDIO, generator=torch.Generator().manual_seed(1))
    write_tar(index.shards("train")[0].path, members("a", packed(tensors), about))
    (one,) = LatentShards(index, "train")
    for name in ("video", "audio"):
        step = tensors[name].abs().amax() / 127
        assert (getattr(one, name).float() - tensors[name]).abs().max() < 0.51 * step


# --- an index that lies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.update(version=99), "version 99, this ovi reads versions 1 and 2"),
        (lambda c: c.update(format="other"), "not an index of latent shards"),
        (lambda c: c.pop("clock"), "not a whole index.*clock"),
        (lambda c: c["clock"].update(speed=1), "not a whole index.*speed"),
        (lambda c: c["splits"]["train"]["shards"][0].pop("num_bytes"), "not a whole index.*num_bytes"),
        (lambda c: c["splits"]["train"]["shards"][0].update(latent_shapes={"video": [1]}), "not a whole index.*shapes"),
        (
            lambda c: c["splits"]["train"]["shards"][1].update(file="gone.tar"),
            "gone.tar: is in the index but not there",
        ),
        (lambda c: c["splits"]["train"]["shards"][1].update(num_bytes=9999), "bytes, the index says 9999"),
        (lambda c: c["splits"]["train"]["shards"][1].update(num_bytes=7), "would hold 5 samples in 7 bytes"),
        (
            lambda c: c["splits"]["train"]["shards"][1].update(num_samples=-3),
            "-3 is no whole number",
        ),
        (lambda c: c["splits"]["train"]["shards"][1].update(num_samples=2), "train has 19 samples, its shards 16"),
        (lambda c: c["splits"]["train"].update(num_samples=10**9), "train has 1000000000 samples, its shards 19"),
        (
            lambda c: c["splits"]["train"].update(shards=c["splits"]["train"]["shards"][:1] * 2, num_samples=10),
            "is listed 2 times",
        ),
        (lambda c: c["latent_shapes"].update(audio=[4.7, 64]), "not a whole index.*4.7 is no whole number"),
        (lambda c: c["clock"].update(fps=16), "8 latent frames last as long as 15 audio tokens, the samples have 31"),
        (lambda c: c.pop("codecs"), "not a whole index.*codecs"),
        (lambda c: c.update(text="x"), "not a whole index"),
        (lambda c: c.update(dtype="float12"), "not a whole index.*float12"),
    ],
)
def test_an_index_that_lies_is_refused(change, expected, index, tmp_path):
    with pytest.raises(OviError, match=expected):
        ShardIndex.load(copy_set(index, tmp_path / "set", change))


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\x00\x01", "\xff\xfe"])
def test_an_index_that_is_no_json_is_refused(content, tmp_path):
    (tmp_path / "index.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(OviError, match=r"encode the set again|not an index"):
        ShardIndex.load(tmp_path)


def test_a_folder_without_index_is_refused(tmp_path):
    with pytest.raises(OviError, match=r"not found.*data\.path"):
        ShardIndex.load(tmp_path / "nowhere")


def test_unknown_and_empty_splits_are_named(index, tmp_path):
    with pytest.raises(OviError, match="no split 'test'; it has train, val"):
        LatentShards(index, "test")
    empty = write_set(tmp_path, {"train": [1], "val": []})
    with pytest.raises(OviError, match=r"'val' holds no sample.*val_fraction"):
        LatentShards(empty, "val")


# --- damage ----------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(old: bytes, new: bytes, after: bytes = b"clip-0001.safetensors"):
    """Replace bytes within the second sample, leaving the tar itself alone."""

    def harm(path: Path) -> None:
        content = bytearray(path.read_bytes())
        at = content.index(old, content.index(after))
        content[at : at + len(old)] = new
        path.write_bytes(content)

    return harm


def header(path: Path) -> None:
    """Break the tar header of the third sample."""
    content = bytearray(path.read_bytes())
    at = content.index(b"clip-0002.json")
    content[at : at + 4] = b"CLIP"
    path.write_bytes(content)


def rewritten(change):
    def harm(path: Path) -> None:
        content = []
        for n in range(5):
            tensors, about = sample(n)
            if n == 1:
                tensors, about = change(tensors, about)
            content += members(f"clip-{n:04d}", tensors, about)
        write_tar(path, content)

    return harm


def nan(tensors, about):
    tensors["audio"][3, 5] = float("nan")
    return tensors, about


DAMAGES = {
    "cut": (cut, r"has no \.safetensors|is damaged|holds \d samples", {0, 1}),
    "zeros": (lambda path: path.write_bytes(b"\0" * 20480), "holds 0 samples, the index says 5", set()),
    "no tar": (lambda path: path.write_bytes(b"no tar" * 1000), "byte 0 begins no tar header", set()),
    "gone": (lambda path: path.unlink(), "cannot be read: No such file", set()),
    "header": (header, r"holds 2 samples, the index says 5; byte \d+ begins no tar header", {0, 1}),
    "no json": (edit(b'{"', b"??"), "sample clip-0001 is damaged: its header is no JSON", {0, 2, 3, 4}),
    "lies": (edit(b'"F16"', b'"F32"'), "sample clip-0001 is damaged: .* has .* bytes for the shape", {0, 2, 3, 4}),
    "no about": (
        edit(b'{"', b"??", b"clip-0001.json"),
        "sample clip-0001 is damaged: Expecting value",
        {0, 2, 3, 4},
    ),
    "nan": (rewritten(nan), "sample clip-0001 is damaged: audio has numbers that are not finite", {0, 2, 3, 4}),
    "shape": (
        rewritten(lambda t, a: ({**t, "video": t["video"][:, :4].contiguous()}, a)),
        r"video latents are \[12, 4, 2, 2\], the index says \[12, 8, 2, 2\]",
        {0, 2, 3, 4},
    ),
    "no video": (
        rewritten(lambda t, a: ({k: v for k, v in t.items() if k != "video"}, a)),
        "video latents are none, the index says",
        {0, 2, 3, 4},
    ),
    "no text": (
        rewritten(lambda t, a: ({k: v for k, v in t.items() if k != "text"}, a)),
        "it has no text",
        {0, 2, 3, 4},
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_left_out_and_named_and_strict_stops_at_it(damage, index, tmp_path):
    harm, expected, kept = DAMAGES[damage]
    damaged = ShardIndex.load(copy_set(index, tmp_path / "set"))
    harm(tmp_path / "set" / "train-000000.tar")
    batch = LatentShards(damaged, "train").read_batch([0, 1, 2, 3, 4, 5]).unpack()
    assert set(batch.keys) >= {f"clip-{n:04d}" for n in kept} | {"clip-0005"}
    assert len(batch.keys) + len(batch.skipped) == 6
    for row, key in enumerate(batch.keys):
        tensors, _ = sample(int(key[5:]))
        assert torch.equal(batch.video[row], tensors["video"])
        assert torch.equal(batch.audio[row], tensors["audio"])
        assert torch.equal(batch.text[row], tensors["text"])
    import re

    assert all(re.search(expected, str(skip)) and "train-000000.tar" in skip.shard for skip in batch.skipped)
    with pytest.raises(OviError, match=expected):
        LatentShards(damaged, "train", strict=True).read_batch([0, 1, 2, 3, 4, 5])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        keys = [s.key for s in LatentShards(damaged, "train")]
    assert len(keys) + len(said) == 19


def test_a_batch_of_nothing_is_replaced_by_the_next_readable_sample_of_its_shape(tmp_path):
    shapes = [None, {"video": (12, 8, 4, 4), "audio": (31, 64)}, None]
    index = write_set(tmp_path, {"train": [3, 2, 4], "val": []}, shapes=shapes)
    (tmp_path / "train-000000.tar").write_bytes(b"")
    dataset = LatentShards(index, "train")
    for numbers in ([0, 1], [2]):
        batch = dataset.read_batch(numbers).unpack()
        assert batch.keys == ["clip-0005"]
        assert len(batch.skipped) == len(numbers)
    (tmp_path / "train-000001.tar").unlink()
    other = dataset.read_batch([3, 4]).unpack()  # none of its shape is left
    assert (other.keys, len(other.skipped)) == (["clip-0005"], 2)
    (tmp_path / "train-000002.tar").write_bytes(b"")
    with pytest.raises(OviError, match=r"no sample can be read; the first: .*train-000001\.tar"):
        LatentShards(index, "train").read_batch([3, 4])


def test_a_sample_of_another_text_width_is_the_damaged_one(index, tmp_path):
    folder = copy_set(index, tmp_path / "set", lambda c: c.update(text={"dim": 64, "len": 48}))
    content = []
    for n in range(5):
        tensors, about = sample(n)
        tensors = {**tensors, "text": torch.ones(2, 32).half()} if n == 1 else tensors
        content += members(f"clip-{n:04d}", tensors, about)
    write_tar(folder / "train-000000.tar", content)
    batch = LatentShards(ShardIndex.load(folder, verify=False), "train").read_batch([1, 0, 2]).unpack()
    assert batch.keys == ["clip-0000", "clip-0002"]
    (skip,) = batch.skipped
    assert (skip.key, "its text has width 32, the set's 64" in skip.reason) == ("clip-0001", True)


def test_strict_objects_to_more_samples_than_the_index_says(index, tmp_path):
    def less(content):
        content["splits"]["train"]["shards"][0].update(num_samples=4)
        content["splits"]["train"].update(num_samples=18)

    cut_short = ShardIndex.load(copy_set(index, tmp_path / "set", less))
    assert len(LatentShards(cut_short, "train").read_batch([0, 1]).keys) == 2
    with pytest.raises(OviError, match="holds 5 samples, the index says 4"):
        LatentShards(cut_short, "train", strict=True).read_batch([0, 1])


def test_pickles_in_a_shard_are_never_opened(index, tmp_path):
    marker = tmp_path / "opened"
    evil = b"cbuiltins\nopen\n(V" + str(marker).encode() + b"\nVw\ntR."
    folder = copy_set(index, tmp_path / "set")
    path = folder / "train-000000.tar"
    with tarfile.open(path) as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar}
    content |= {f"clip-0000.{suffix}": evil for suffix in ("pyd", "pth", "pickle")}
    write_tar(path, sorted(content.items()))
    tampered = ShardIndex.load(folder, verify=False)
    assert len(list(LatentShards(tampered, "train"))) == 19
    assert not marker.exists()
    pickle.loads(evil)
    assert marker.exists()  # it would have worked
