"""Disks that fill up below several processes, below an upload and below local copies."""

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from ovi.data.encode import encode
from ovi.data.sources import Folder
from ovi.errors import OviError
from test_encode import SIZE, SPECS, codecs, hashes, samples, write_folder

RUN = """
import resource, sys
from ovi.codecs import Codecs
from ovi.data.encode import encode
from ovi.data.sources import Folder
from ovi.errors import OviError
if __name__ == "__main__":
    source, out, rank, limit = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    try:
        encode(Folder(path=source), Codecs.build({specs}, fps=8), out, **{size}, shard_size=6, val_fraction=0.0,
               rank=int(rank), world_size=2)
    except OviError as error:
        sys.exit(str(error))
"""
LIMIT = 40_000
"""Bytes of a file: a shard of six clips needs more, every record less."""


@contextmanager
def files_end_at(num_bytes: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("full") / "ein Ordner", 12)


@pytest.mark.slow
def test_every_process_says_so_and_the_set_is_continued(folder, tmp_path):
    whole, out, script = tmp_path / "whole", tmp_path / "ein Ziel ü", tmp_path / "run.py"
    encode(Folder(path=str(folder)), codecs(), whole, **SIZE, shard_size=6, val_fraction=0.0)
    assert min(path.stat().st_size for path in whole.glob("*.tar")) > LIMIT
    script.write_text(RUN.format(specs=SPECS, size=SIZE))

    def both(limit: int) -> list[tuple[int, str]]:
        runs = [
            subprocess.Popen(
                [sys.executable, str(script), str(folder), str(out), str(rank), str(limit)],
                stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(2)
        ]  # fmt: skip
        said = [run.communicate(timeout=120)[1] for run in runs]
        return [(run.returncode, text) for run, text in zip(runs, said)]

    for code, text in both(LIMIT):
        assert code == 1
        assert "no space left to write it" in text
        assert "run the same command again to continue" in text
    assert not list(out.glob("*.tar*"))
    assert not (out / "index.json").exists()
    assert [code for code, _ in both(2**30)] == [0, 0]
    assert hashes(out) == hashes(whole)


def test_no_room_for_what_is_to_be_uploaded(folder, tmp_path):
    out = tmp_path / "out"
    with files_end_at(LIMIT), pytest.raises(OviError, match=r"no space left.*run the same command again to continue"):
        encode(Folder(path=str(folder)), codecs(), f"file://{out}", **SIZE, shard_size=6, val_fraction=0.0)
    assert not list(out.glob("*.tar*"))
    encode(Folder(path=str(folder)), codecs(), f"file://{out}", **SIZE, shard_size=6, val_fraction=0.0)
    assert len(samples(out)) == 12


def test_no_room_for_a_local_copy_is_no_reason_to_reject_it(folder, tmp_path):
    source, scratch = Folder(path=f"file://{folder}"), tmp_path / "scratch"
    smallest = min(path.stat().st_size for path in folder.glob("*.mp4"))
    with files_end_at(smallest - 1), pytest.raises(OviError, match=r"ovi-media.*no space left"):
        encode(source, codecs(), tmp_path / "out", **SIZE, scratch_dir=str(scratch))
    assert not list(scratch.iterdir())
    summary = encode(source, codecs(), tmp_path / "out", **SIZE, scratch_dir=str(scratch))
    assert (sum(summary.num_samples.values()), summary.rejected) == (12, {})
    assert json.loads((tmp_path / "out" / "index.json").read_text())["rejected"] == {}
