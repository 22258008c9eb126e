"""Lists of prompts: csv, jsonl, txt; whole captions or Verse-Bench's parts."""

import pytest

from ovi.commands.prompt_table import Prompt, captions_for, read_prompt_table
from ovi.errors import OviError


def test_a_csv_names_clips_and_prompts_and_keeps_other_fields(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('﻿file,caption,set\na b.mp4,"A ball, red",1\nünï.mp4,Two,2\n', encoding="utf-8")
    assert read_prompt_table(path) == [
        Prompt("A ball, red", "a b.mp4", {"set": "1"}),
        Prompt("Two", "ünï.mp4", {"set": "2"}),
    ]


def test_parts_become_one_prompt_in_the_models_format(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("id,video_prompt,speech_prompt,audio_prompt\n7,A man.,Hello,Rain\n8,A dog.,,\n", encoding="utf-8")
    first, second = read_prompt_table(path)
    assert (first.file, first.caption) == ("7", "A man. <S>Hello<E> <AUDCAP>Rain<ENDAUDCAP>")
    assert second.caption == "A dog."
    assert first.extra["audio_prompt"] == "Rain"


def test_jsonl_and_txt(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"file": "a.mp4", "prompt": "x", "count": 3}\n\n', encoding="utf-8")
    (tmp_path / "p.txt").write_text("one\n\n two \n", encoding="utf-8")
    assert read_prompt_table(tmp_path / "p.jsonl") == [Prompt("x", "a.mp4", {"count": 3})]
    assert [p.caption for p in read_prompt_table(tmp_path / "p.txt")] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.csv", "file,words\na.mp4,x\n", "line 2: has no prompt.*caption or prompt.*its fields are file, words"),
        ("p.jsonl", '{"caption": "x"}\n{oops\n', "line 2: is not JSON"),
        ("p.jsonl", "[1]\n", "line 1: expected one object"),
        ("p.txt", "\n\n", "holds no prompt"),
        ("p.xlsx", "", r"expected a .csv, .jsonl or .txt"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, name, content, words):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(OviError, match=words):
        read_prompt_table(tmp_path / name)
    with pytest.raises(OviError, match="cannot be read"):
        read_prompt_table(tmp_path / "absent.csv")


def test_prompts_find_their_files_by_path_or_stem():
    prompts = [Prompt("x", "sub/a.mp4", {}), Prompt("y", "7", {})]
    assert captions_for(["a.mov", "7.mp4", "8.mp4"], prompts, "p") == {"a.mov": prompts[0], "7.mp4": prompts[1]}
    with pytest.raises(OviError, match=r"two prompts for 'a\.mp4'"):
        captions_for(["a.mp4"], [Prompt("x", "a.mp4", {}), Prompt("y", "a.mp4", {})], "p")
    with pytest.raises(OviError, match="says no file"):
        captions_for(["a.mp4"], [Prompt("x", "", {})], "p")
