"""`ovi data check`: what is whole passes, every kind of damage is named, and the exit status says which it was."""

import json
import tarfile

import pytest
import torch

from latent_sets import AUDIO, VIDEO, copy_set, members, sample, write_set, write_tar
from ovi.commands.main import main
from ovi.data.reading.tar_index import scan_tar


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"), {"train": [5, 4], "val": [3]})


def check(*words, capsys):
    """(exit status, what was printed) of ``ovi data check``."""
    status = 0
    try:
        main(["data", "check", *map(str, words)])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    return status, said.out + said.err


def test_a_whole_set_passes(index, tmp_path, capsys):
    status, said = check(index.folder, f"out={tmp_path / 'found.json'}", capsys=capsys)
    assert status == 0
    assert "whole: every sample is what the index says" in said
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["whole"], found["num_samples"], found["findings"]) == (True, 12, [])
    assert found["num_bytes"] == sum(s.num_bytes for shards in index.splits.values() for s in shards)


REASON = '{"file": "a.mp4", "reason": "small"}'


def second_sample(change):
    def harm(folder):
        content = []
        for n in range(5):
            tensors, about = sample(n)
            key = f"clip-{n:04d}"
            if n == 1:
                tensors, key = change(tensors, key)
            content += members(key, tensors, about)
        write_tar(folder / "train-000000.tar", content)

    return harm


def full(tensors, key, **other):
    return {**tensors, **other}, key


def cut(folder):
    path = folder / "train-000000.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(folder):
    path = folder / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[content.index(b"clip 1") + 5] = ord("7")  # a caption, which nothing else would notice
    path.write_bytes(content)


def in_index(change):
    def harm(folder):
        content = json.loads((folder / "index.json").read_text())
        change(content)
        (folder / "index.json").write_text(json.dumps(content))

    return harm


def own_shapes(content):
    for entry in content["splits"].values():
        for shard in entry["shards"]:
            shard["latent_shapes"] = {"video": VIDEO, "audio": AUDIO}


@pytest.mark.parametrize(
    ("harm", "kinds"),
    [
        (cut, {"size", "hash", "tar", "count"}),
        (flip, {"hash"}),
        (lambda folder: (folder / "train-000001.tar").unlink(), {"missing"}),
        (second_sample(lambda t, k: full(t, k, audio=t["audio"] / 0)), {"hash", "sample"}),
        (second_sample(lambda t, k: full(t, k, video=t["video"][:3].clone())), {"hash", "size", "sample"}),
        (second_sample(lambda t, k: (t, "clip-0009")), {"hash", "duplicate"}),
        (second_sample(lambda t, k: full(t, k, text=torch.ones(2, 63).half())), {"hash", "text"}),
        (second_sample(lambda t, k: full(t, k, text=torch.ones(99, 64).half())), {"hash", "size", "text"}),
        (in_index(lambda c: c.update(text={"dim": 64, "len": 1})), {"text"}),  # rather than what knobs would allow
        (in_index(lambda c: c.update(text={"dim": 32, "len": 48})), {"text"}),
        (in_index(lambda c: c["clock"].update(audio_stride=500)), {"clock"}),
        (in_index(lambda c: c["splits"]["train"].update(num_samples=8)), {"count"}),
        (in_index(lambda c: c["splits"]["val"]["shards"][0].update(num_samples=2)), {"count"}),
        (in_index(lambda c: c["latent_shapes"].update(audio=[30, 64]) or own_shapes(c)), {"index"}),
        (lambda folder: (folder / "train-000007.tar").write_bytes(b""), {"unlisted"}),
        (lambda folder: (folder / "rejected.jsonl").write_text(REASON + "\n{oops\n" + REASON), {"rejected"}),
        (lambda folder: (folder / "rejected.jsonl").write_text('{"file": "a.mp4"}\n'), {"rejected"}),
    ],
)
def test_every_kind_of_damage_is_named(harm, kinds, index, tmp_path, capsys):
    folder = copy_set(index, tmp_path / "set")
    harm(folder)
    status, said = check(folder, f"out={tmp_path / 'found.json'}", capsys=capsys)
    assert status == 1
    found = {finding["kind"] for finding in json.loads((tmp_path / "found.json").read_text())["findings"]}
    assert found - {"size", "sample"} == kinds - {"size", "sample"}
    assert ("sample" in found) == ("sample" in kinds) or "tar" in kinds
    assert "damaged: " in said


def test_what_lies_beside_the_shards_is_named_by_file_and_line(index, tmp_path, capsys):
    folder = copy_set(index, tmp_path / "set")
    (folder / "rejected.jsonl").write_text(REASON + "\n\n[1]\n")
    (folder / "train-000007.tar").touch()
    (folder / "train-000000.tar").rename(folder / "other-name.tar")
    (folder / "train-000000.tar").symlink_to("other-name.tar")  # listed, by another name
    _, said = check(folder, capsys=capsys)
    assert "rejected.jsonl, line 3: expected one object {...} a line, got [1]" in said
    assert "train-000007.tar: is no shard of the index" in said
    assert "damaged: 1 unlisted, 1 rejected" in said


@pytest.mark.parametrize("size", ["many", "-512", "9" * 5000])
def test_a_damaged_size_of_an_extended_header_is_damage(size, tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, headers in (("a.json", {}), ("b.json", {"size": size})):
            entry = tarfile.TarInfo(name)
            entry.pax_headers = headers
            tar.addfile(entry)
    with open(path, "rb") as file:
        found = scan_tar(file.fileno())
    assert [sample.key for sample in found.samples] == ["a"]
    assert "no readable size in its extension" in found.damage


def test_strict_stops_at_the_first_damaged_shard(index, tmp_path, capsys):
    folder = copy_set(index, tmp_path / "set")
    for name in ("train-000000.tar", "train-000001.tar"):
        (folder / name).unlink()
    status, said = check(folder, "strict=true", capsys=capsys)
    assert status == 1
    assert "train-000000.tar" in said
    assert "train-000001.tar" not in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["chek", "x"], "no 'chek'. Did you mean 'check'"),
        (["check"], "takes one folder, got none"),
        (["check", "a", "b"], "takes one folder, got a, b"),
        (["check", "a", "shw=3"], "does not take 'shw=3'. Did you mean 'show'"),
        (["check", "a", "show=many"], "show cannot be 'many'"),
        (["check", "nowhere"], "not found"),
    ],
)
def test_mistyped_words_are_named(words, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", *words])
    assert stop.value.code == 1
    assert expected in capsys.readouterr().err


def test_help_says_how(capsys):
    main(["data", "--help"])
    assert "ovi data check FOLDER" in capsys.readouterr().out
