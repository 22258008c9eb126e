"""Ovi's prompt formats: prompts taken apart, faults named with their place, one variant turned into the other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovi.data.caption_format import (
    CaptionFormatError,
    CaptionParts,
    convert_caption,
    format_caption,
    parse_caption,
)
from ovi.data.synthetic import caption, sample_scene
from ovi.errors import OviError

OLD = "A man nods. He says, <S>We go, now!<E> and <S>Run.<E> leaves. <AUDCAP>A deep voice; steps on gravel.<ENDAUDCAP>"
NEW = "A man nods. He says, <S>We go, now!<E> and <S>Run.<E> leaves. Audio: A deep voice; steps on gravel."


def test_both_variants_say_the_same():
    old, new = parse_caption(OLD), parse_caption(NEW)
    assert old == CaptionParts(
        "A man nods. He says, <S>We go, now!<E> and <S>Run.<E> leaves.",
        ("We go, now!", "Run."),
        "A deep voice; steps on gravel.",
        "audcap",
    )
    assert (new.visual, new.speeches, new.audio, new.variant) == (old.visual, old.speeches, old.audio, "audio")
    assert old.visual_text == "A man nods. He says, and leaves."


def test_conversion_is_lossless_both_ways():
    assert convert_caption(OLD, "audio") == NEW
    assert convert_caption(NEW, "audcap") == OLD
    assert convert_caption(OLD, "audcap") == OLD
    assert convert_caption("Only seen.", "audio") == "Only seen."
    assert convert_caption("<AUDCAP>Only heard.<ENDAUDCAP>", "audio") == "Audio: Only heard."
    assert convert_caption("Audio: Only heard.", "audcap") == "<AUDCAP>Only heard.<ENDAUDCAP>"


def test_the_synthetic_captions_keep_to_the_format():
    import numpy as np

    text = caption(sample_scene(np.random.default_rng(0)))
    parts = parse_caption(text)
    assert parts.variant == "audcap"
    assert parts.audio.endswith("one at each bounce.")
    assert convert_caption(convert_caption(text, "audio"), "audcap") == text


@pytest.mark.parametrize(
    ("text", "reason", "position"),
    [
        ("He says <S>hello", "unbalanced", 8),
        ("He says hello<E>", "unbalanced", 13),
        ("He says <S>a <S>b<E><E>", "nested", 13),
        ("He says <S>a <AUDCAP>b<ENDAUDCAP><E>", "nested", 13),
        ("x <AUDCAP>He says <S>a<E><ENDAUDCAP>", "nested", 18),
        ("Audio: he says <S>a<E>", "nested", 15),
        ("He says <S> <E>", "empty_speech", 8),
        ("Rain. <AUDCAP>  <ENDAUDCAP>", "empty_audio", 6),
        ("Rain. Audio:  ", "empty_audio", 6),
        ("Rain. <AUDCAP>a<E>", "unbalanced", 15),
        ("Rain. <AUDCAP>drops", "unbalanced", 6),
        ("Rain. drops<ENDAUDCAP>", "unbalanced", 11),
        ("<AUDCAP>a<ENDAUDCAP> <AUDCAP>b<ENDAUDCAP>", "two_audios", 21),
        ("Rain. Audio: a Audio: b", "two_audios", 15),
        ("Rain. <AUDCAP>a<ENDAUDCAP> Audio: b", "two_audios", 27),
        ("<AUDCAP>a<ENDAUDCAP> He says <S>b<E>", "text_after_audio", 29),
        ("He says <s>hello<E>", "unknown_tag", 8),
        ("He says <S>hello</S>", "unknown_tag", 16),
        ("Rain. <AUDCAP>drops</AUDCAP>", "unknown_tag", 19),
        ("Rain. <AUDCAP>drops<ENDAUDCAP", "unknown_tag", 19),
    ],
)
def test_faults_are_named_with_their_place(text, reason, position):
    with pytest.raises(CaptionFormatError) as caught:
        parse_caption(text)
    assert (caught.value.reason, caught.value.position) == (reason, position)
    assert f"at character {position}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "meant"), [("<s>a<E>", "<S>"), ("<S>a</S>", "<E>"), ("<AUDCAP>a<ENDAUDCAP", "<ENDAUDCAP>")]
)
def test_misspelt_tags_come_with_what_was_meant(text, meant):
    with pytest.raises(CaptionFormatError, match=f"did you mean {meant}"):
        parse_caption(text)


def test_words_that_only_look_like_tags_are_words():
    for text in ("a < b and c > d", "<html> <sub>", "The sign reads Audio:on.", "Radio says <S>Audio: test<E>."):
        assert parse_caption(text).audio is None


def test_what_the_audio_variant_cannot_hold_is_refused():
    with pytest.raises(CaptionFormatError, match="nothing can follow") as caught:
        convert_caption("Rain. <AUDCAP>Drops.<ENDAUDCAP> The end.", "audio")
    assert caught.value.reason == "text_after_audio"
    with pytest.raises(CaptionFormatError, match="'Audio:'"):
        convert_caption("A screen. <AUDCAP>A voice reads Audio: on.<ENDAUDCAP>", "audio")
    with pytest.raises(OviError, match="variant must be one of audcap, audio"):
        format_caption(parse_caption("x"), "both")


words = st.lists(
    st.sampled_from(["a", "man,", "dog!", "barks?", "<3", "5>4", "Audio", "über", "犬", "'so'", "-"]), min_size=1
).map(" ".join)


@given(st.lists(st.tuples(words, st.one_of(st.none(), words)), min_size=1, max_size=4), words)
def test_any_prompt_of_the_format_survives_both_ways(pieces, audio):
    visual = " ".join(text if speech is None else f"{text} <S>{speech}<E>" for text, speech in pieces)
    old = f"{visual} <AUDCAP>{audio}<ENDAUDCAP>"
    new = f"{visual} Audio: {audio}"
    assert parse_caption(old).speeches == tuple(speech for _, speech in pieces if speech is not None)
    assert convert_caption(old, "audio") == new
    assert convert_caption(new, "audcap") == old
