"""A file that ends the process which reads it: found when the encoding is continued, and left out."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ovi.data.at_work import AtWork
from ovi.data.clip_encoder import ClipEncoder
from ovi.data.process_pool import Crash
from ovi.data.readers import CarefulReader, Reader
from ovi.data.sources import Folder
from test_encode import FORM, SIZE, SPECS, codecs, samples, write_folder


def test_a_note_is_seen_once_its_process_has_ended(tmp_path):
    mine, other = AtWork(tmp_path / "notes"), AtWork(tmp_path / "notes")
    with mine.on("a longer key"):
        assert other.left_behind() == set(), "its process lives"
    gone = AtWork(tmp_path / "notes")
    gone._note("clip_07")
    os.close(gone._file)  # all that the system does at the end of a process
    assert other.left_behind() == {"clip_07"}
    other.clear()
    assert [path.name for path in (tmp_path / "notes").iterdir()] == [mine._path.name]
    mine.clear()
    assert not (tmp_path / "notes").exists()


def test_what_was_at_work_is_tried_in_another_process_and_nothing_else(tmp_path, monkeypatch):
    items = Folder(path=str(write_folder(tmp_path / "in", 3))).items(FORM)
    gone, tried = AtWork(tmp_path / "notes"), []
    gone._note(items[1].key)
    os.close(gone._file)

    def other(self, work, task):
        tried.append(task.key)
        raise Crash("signal 11, SIGSEGV")

    monkeypatch.setattr("ovi.data.process_pool.SingleProcess.__call__", other)
    with CarefulReader(Reader(ClipEncoder(codecs(), FORM, "float32", "reject")), AtWork(tmp_path / "notes")) as reader:
        reader.look_around()
        results = [reader(Reader.cut, item) for item in items]
    assert tried == [items[1].key]
    assert [[one["reason"] for one in result["rejected"]] for result in results] == [[], ["crashed"], []]


RUN = """
import sys
import encode_plugins
from ovi.codecs import Codecs
from ovi.data.encode import encode
from ovi.data.sources import Folder
if __name__ == "__main__":
    stages = {{"deadly": {{"name": "tests_deadly", "knobs": {{"file": "clip 03.mp4"}}}}}}
    encode(Folder(path=sys.argv[1]), Codecs.build({specs}, fps=8), sys.argv[2], **{size}, shard_size=2, stages=stages)
"""


@pytest.mark.slow
def test_a_file_that_kills_the_run_itself_is_left_out_of_the_next(tmp_path):
    source, out, script = write_folder(tmp_path / "in", 6), tmp_path / "out", tmp_path / "run.py"
    script.write_text(RUN.format(specs=SPECS, size=SIZE))
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    run = [sys.executable, str(script), str(source), str(out)]
    assert subprocess.run(run, env=environment, capture_output=True).returncode == -signal.SIGSEGV
    again = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    (line,) = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    assert (line["file"], line["reason"]) == ("clip 03.mp4", "crashed")
    assert len(samples(out)) == 5
    assert not (out / ".encode" / "at-work").exists()
