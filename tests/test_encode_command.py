"""``ovi encode``: a process's place among others, another set's codecs, links that lead back."""

import json
import os

import pytest

from ovi.commands.encode import place_among_processes
from ovi.commands.main import main
from ovi.data.index import ShardIndex
from ovi.data.sources import media_files
from ovi.errors import OviError
from test_encode import write_folder


def array(task, first, last, step, count):
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    return {f"SLURM_ARRAY_TASK_{name}": str(n) for name, n in zip(names, (task, first, last, step, count))}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"RANK": "3", "WORLD_SIZE": "8", **array(5, 0, 9, 1, 10)}, (3, 8)),
        (array(5, 0, 9, 1, 10), (5, 10)),
        (array(1, 1, 10, 1, 10), (0, 10)),
        (array(10, 1, 10, 1, 10), (9, 10)),
        (array(17, 5, 20, 4, 4), (3, 4)),  # --array=5-20:4 is 5, 9, 13, 17
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, (0, 1)),  # the job script itself, not srun
        ({"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_STEP_ID": "0"}, (9, 16)),
        ({**array(3, 1, 4, 1, 4), "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, (5, 8)),
    ],
)
def test_the_place_among_processes(environment, expected):
    assert place_among_processes(environment) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (array(7, 1, 7, 1, 3), "task 7 of a SLURM array of 3 from 1"),  # --array=1,3,7
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK=first is no number"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_COUNT=None is no number"),
    ],
)
def test_places_that_cannot_be_told_are_named(environment, expected):
    with pytest.raises(OviError, match=f"{expected}.*set rank and world_size"):
        place_among_processes(environment)


def run(source, out, *words):
    size = ("num_frames=8", "height=16", "width=16", "num_workers=0", "val_fraction=0")
    main(["encode", f"source.path={source}", f"out={out}", *size, *words])


def test_a_set_takes_the_codecs_of_another_so_that_both_can_be_mixed(tmp_path, capsys):
    first, second = write_folder(tmp_path / "1", 3), write_folder(tmp_path / "2", 4)
    run(first, tmp_path / "a", "fps=8", "codec.text.text_dim=32")
    run(second, tmp_path / "own", "fps=8", "codec.text.text_dim=32")
    run(second, tmp_path / "b", "fps=8", f"codecs_of={tmp_path / 'a'}")
    a, b, own = (ShardIndex.load(tmp_path / name) for name in ("a", "b", "own"))
    assert b.content["codecs"] == a.content["codecs"]
    assert a.differences(b) == []
    assert "encode one with codecs_of=FOLDER of the other" in a.differences(own)[-1]
    with pytest.raises(SystemExit):
        run(second, tmp_path / "c", "fps=12", f"codecs_of={tmp_path / 'a'}")
    assert "8 frames per second, fps is 12: set fps=8" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_an_array_of_ones_own_numbers_is_encoded_whole(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "in", 2)
    for name, value in array(6, 4, 6, 2, 2).items():
        monkeypatch.setenv(name, value)
    run(source, tmp_path / "out", "fps=8")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["splits"]["train"]["num_samples"] == 2


def test_pipes_are_no_media_files(tmp_path):
    """Opening one waits until somebody writes to it."""
    (tmp_path / "a.mp4").touch()
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.mp4")
    assert sorted(path.name for path in media_files(tmp_path)) == ["a.mp4", "gone.mp4"]


def test_links_are_followed_but_not_round_and_round(tmp_path):
    for name in ("a/x.mp4", "a/deep/y.mp4", "b/z.mp4", "elsewhere/w.mp4", ".hidden/h.mp4"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "in" / "elsewhere").rename(tmp_path / "elsewhere")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "a" / "deep" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "a" / "to_b").symlink_to(tmp_path / "in" / "b")
    (tmp_path / "in" / "b" / "to_a").symlink_to(tmp_path / "in" / "a")
    found = sorted(path.relative_to(tmp_path / "in").as_posix() for path in media_files(tmp_path / "in"))
    direct = ["a/deep/y.mp4", "a/to_b/z.mp4", "a/x.mp4", "b/to_a/deep/y.mp4", "b/to_a/x.mp4", "b/z.mp4", "linked/w.mp4"]
    assert found == direct
