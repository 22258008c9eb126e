"""Lists of prompts: csv, jsonl, txt; whole captions or Verse-Bench's parts."""

import pytest

from ovi.commands.pairing import paired
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


def test_a_quoted_field_of_a_csv_keeps_its_lines(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes('file,caption\r\na.mp4,"One.\r\nTwo\u2028three\x0cfour"\r\nb.mp4,Five\r\n'.encode())
    assert read_prompt_table(path) == [
        Prompt("One.\r\nTwo\u2028three\x0cfour", "a.mp4", {}),
        Prompt("Five", "b.mp4", {}),
    ]


def test_files_of_one_name_in_two_folders_are_told_apart_by_path():
    files = ["a/0001.mp4", "b/0001.mp4"]
    first, second = Prompt("x", "a/0001.mp4", {}), Prompt("y", "./b/0001.mp4", {})
    assert captions_for(files, [first, second], "p") == {files[0]: first, files[1]: second}
    # What names one file by its path is no prompt of the other.
    assert captions_for(files, [first], "p") == {files[0]: first}
    assert captions_for(files, [Prompt("x", "b/0001", {})], "p").keys() == {files[1]}


@pytest.mark.parametrize(
    ("files", "names"),
    [(["0001.mp4"], ["c/0001.mp4", "d/0001.mp4"]), (["a/0001.mp4", "b/0001.mp4"], ["0001"])],
)
def test_a_bare_name_counts_only_where_it_is_clear_which_is_meant(files, names):
    with pytest.raises(OviError, match=r"p\.csv: .*0001.*of clips: give paths inside clips"):
        captions_for(files, [Prompt("x", name, {}) for name in names], "p.csv", "clips")


def test_names_pair_by_path_before_suffix_before_bare_name():
    files = ["a/x.mp4", "a/y.mp4", "z.mp4", "v1.5.mp4"]
    names = ["b/z.mov", "a/y.mov", "a/x.mp4", "x.mp4", "v1.5", "v1"]
    assert paired(files, names, of="files", to="names") == {
        "a/x.mp4": "a/x.mp4",
        "a/y.mp4": "a/y.mov",
        "z.mp4": "b/z.mov",
        "v1.5.mp4": "v1.5",
    }
