"""`ovi data report` over a real encoded set: every clip is counted once, kept or rejected."""

import base64
import re

import fsspec
import pytest

from ovi.commands.data import main
from ovi.commands.data_report import kept_records
from ovi.data.encode import encode
from ovi.data.index import ShardIndex
from ovi.data.sources import Folder
from ovi.errors import OviError
from test_encode import SIZE, codecs, write_folder


def test_a_set_becomes_one_page_with_its_figures(tmp_path, capsys, monkeypatch):
    from ovi.data.stages import loudness  # noqa: F401

    source = write_folder(tmp_path / "in", 8)
    stages = {"loud": {"name": "loudness", "knobs": {"min_db": None}}}
    encode(Folder(path=str(source)), codecs(), tmp_path / "all", **SIZE, stages=stages)
    records = list(kept_records(ShardIndex.load(tmp_path / "all")))
    assert len(records) == 8
    limit = sorted(record["figures"]["loudness_db"] for record in records)[3]
    stages = {"loud": {"name": "loudness", "knobs": {"min_db": limit}}}
    encode(Folder(path=str(source)), codecs(), tmp_path / "out", **SIZE, stages=stages)
    main(["report", str(tmp_path / "out")])
    page = tmp_path / "out" / "report.html"
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text()
    assert "quiet" in text
    assert re.search(r"<td[^>]*>\s*3\s*<", text)  # rejected
    picture = re.search(r"data:image/png;base64,([A-Za-z0-9+/=]+)", text)
    assert base64.b64decode(picture[1])[:8] == b"\x89PNG\r\n\x1a\n"
    main(["report", str(tmp_path / "out"), f"out={tmp_path / 'r.png'}"])
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.chdir(tmp_path)
    for url in (f"file://{tmp_path}/out", "memory://report/out"):
        if url.startswith("memory"):
            fsspec.filesystem("memory").put(f"{tmp_path}/out/", "/report/out/", recursive=True)
        main(["report", url])
        assert capsys.readouterr().out.split()[-1] == "report.html"
        assert (tmp_path / "report.html").read_bytes() == page.read_bytes()
        (tmp_path / "report.html").unlink()


def test_a_damaged_shard_is_no_matter_of_credentials(tmp_path):
    encode(Folder(path=str(write_folder(tmp_path / "in", 2))), codecs(), tmp_path / "out", **SIZE)
    shard = next((tmp_path / "out").glob("*.tar"))
    shard.write_bytes(b"x" * shard.stat().st_size)
    for where in (str(tmp_path / "out"), f"file://{tmp_path}/out"):
        with pytest.raises(OviError, match=r"(?s)cannot be read .*ovi data check"):
            main(["report", where, f"out={tmp_path / 'r.html'}"])


def test_bad_words_are_named(tmp_path):
    with pytest.raises(OviError, match="takes one folder"):
        main(["report"])
    with pytest.raises(OviError, match="does not take 'colour=red'"):
        main(["report", str(tmp_path), "colour=red"])
    with pytest.raises(OviError, match=r"memory://nowhere/index\.json: not found"):
        main(["report", "memory://nowhere"])
