"""Ovi's prompt formats: what is seen, what is said in it, and what is heard.

Speech stands where it is spoken, between ``<S>`` and ``<E>``, in every release. The description of the sound follows
the picture's: the 720x720 5 s release has it as ``<AUDCAP>...<ENDAUDCAP>``, the 960x960 ones as ``Audio: ...`` up to
the end. Both say the same, so one is turned into the other without loss but for white space at the seam.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from ovi.errors import OviError

Variant = Literal["audcap", "audio"]
VARIANTS: tuple[Variant, ...] = ("audcap", "audio")

_TAGS = ("<S>", "<E>", "<AUDCAP>", "<ENDAUDCAP>")
_TAG = re.compile("|".join(_TAGS))
_TAG_LIKE = re.compile(r"<\s*/?\s*(?:s|e|audcap|endaudcap|end_audcap)\s*/?\s*>", re.IGNORECASE)
_UNCLOSED_TAG = re.compile(r"<(?:END)?AUDCAP(?!>)")
_AUDIO = re.compile(r"(?:(?<=\s)|^)Audio:(?=\s|$)", re.MULTILINE)


class CaptionFormatError(OviError):
    """A prompt that does not keep to the format.

    Args:
        reason: short code to count by: ``unknown_tag``, ``unbalanced``, ``nested``, ``empty_speech``, ``empty_audio``,
            ``two_audios``, ``text_after_audio``, ``ambiguous_audio``.
        position: of the first character at fault, from 0.
        text: the prompt.
        message: what is wrong there.
    """

    def __init__(self, reason: str, position: int, text: str, message: str) -> None:
        super().__init__(reason, position, text, message)
        self.reason, self.position = reason, position

    def __str__(self) -> str:
        _, position, text, message = self.args
        begin, end = max(0, position - 20), position + 20
        around = f"{'...' if begin else ''}{text[begin:end]}{'...' if end < len(text) else ''}"
        return f"at character {position}, {around!r}: {message}"


@dataclass(frozen=True)
class CaptionParts:
    """A prompt taken apart.

    Attributes:
        visual: what is seen, with speech in its tags where it is spoken.
        speeches: what is said, in order, without tags.
        audio: description of the sound; None without one.
        variant: how the prompt wrote that; None without one.
        after: text behind ``<ENDAUDCAP>``, empty in prompts as published.
    """

    visual: str
    speeches: tuple[str, ...]
    audio: str | None
    variant: Variant | None
    after: str = ""

    @property
    def visual_text(self) -> str:
        """What is seen, speech and its tags left out."""
        return re.sub(r"\s{2,}", " ", re.sub(r"<S>.*?<E>", " ", self.visual, flags=re.DOTALL)).strip()


def parse_caption(text: str) -> CaptionParts:
    """Take a prompt apart, checking it.

    Args:
        text: in either variant, or without a description of the sound.

    Raises:
        CaptionFormatError: for tags that are misspelt, unbalanced or nested, for empty speech or sound, for two
            descriptions of the sound, and for speech inside or after one.
    """
    _check_spelling(text)
    speeches: list[str] = []
    spoken: list[tuple[int, int]] = []
    blocks: list[tuple[int, int, int, int]] = []
    opened: re.Match[str] | None = None
    for tag in _TAG.finditer(text):
        if tag[0] in ("<S>", "<AUDCAP>"):
            if opened is not None:
                message = f"{tag[0]} inside {opened[0]} of character {opened.start()}; close that first"
                raise CaptionFormatError("nested", tag.start(), text, message)
            opened = tag
            continue
        begins = "<S>" if tag[0] == "<E>" else "<AUDCAP>"
        if opened is None or opened[0] != begins:
            message = f"{tag[0]} without {begins} before it"
            raise CaptionFormatError("unbalanced", tag.start(), text, message)
        inner = text[opened.end() : tag.start()]
        if not inner.strip():
            what = "empty_speech" if begins == "<S>" else "empty_audio"
            raise CaptionFormatError(what, opened.start(), text, f"nothing between {begins} and {tag[0]}")
        if begins == "<S>":
            speeches.append(inner)
            spoken.append((opened.start(), tag.end()))
        else:
            blocks.append((opened.start(), opened.end(), tag.start(), tag.end()))
        opened = None
    if opened is not None:
        closes = "<E>" if opened[0] == "<S>" else "<ENDAUDCAP>"
        raise CaptionFormatError("unbalanced", opened.start(), text, f"{opened[0]} without {closes} after it")
    return _with_audio(text, tuple(speeches), spoken, blocks)


def format_caption(parts: CaptionParts, variant: Variant) -> str:
    """The prompt in a variant; one without a description of the sound stays as it is.

    Args:
        parts: of a prompt.
        variant: ``audcap`` or ``audio``.

    Raises:
        CaptionFormatError: when ``Audio: ...`` cannot hold it: there is text behind the sound's description, or
            "Audio:" stands in the text itself.
    """
    if variant not in VARIANTS:
        raise OviError(f"caption variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    if parts.audio is None:
        return parts.visual
    gap = " " if parts.visual else ""
    if variant == "audcap":
        return f"{parts.visual}{gap}<AUDCAP>{parts.audio}<ENDAUDCAP>{parts.after}"
    text = f"{parts.visual}{gap}Audio: {parts.audio}"
    if parts.after:
        raise CaptionFormatError(
            "text_after_audio",
            len(text),
            text + parts.after,
            "'Audio: ...' lasts to the end, so nothing can follow: move this before the sound's description",
        )
    again = parse_caption(text)
    if (again.visual, again.audio) != (parts.visual, parts.audio):  # pragma: no cover - refused while parsing
        raise CaptionFormatError("ambiguous_audio", len(parts.visual), text, "cannot be read back")
    return text


def convert_caption(text: str, variant: Variant) -> str:
    """A prompt in the other variant, or checked and unchanged when it is in this one.

    Raises:
        CaptionFormatError: as ``parse_caption`` and ``format_caption``.
    """
    parts = parse_caption(text)
    return text if parts.variant in (None, variant) else format_caption(parts, variant)


def _check_spelling(text: str) -> None:
    for found in _TAG_LIKE.finditer(text):
        if found[0] not in _TAGS:
            letters = re.sub(r"[^A-Z]", "", found[0].upper())
            meant = {"S": "<E>" if "/" in found[0] else "<S>", "E": "<E>"}.get(letters)
            if meant is None:
                meant = "<ENDAUDCAP>" if letters.startswith("END") or "/" in found[0] else "<AUDCAP>"
            raise CaptionFormatError(
                "unknown_tag", found.start(), text, f"{found[0]} is no tag; did you mean {meant}? Tags are capitals"
            )
    unclosed = _UNCLOSED_TAG.search(text)
    if unclosed:
        meant = difflib.get_close_matches(unclosed[0], _TAGS, n=1)[0]
        raise CaptionFormatError("unknown_tag", unclosed.start(), text, f"the tag does not end; did you mean {meant}?")


def _with_audio(
    text: str, speeches: tuple[str, ...], spoken: list[tuple[int, int]], blocks: list[tuple[int, int, int, int]]
) -> CaptionParts:
    if len(blocks) > 1:
        message = f"a second <AUDCAP>; the first is at character {blocks[0][0]}. Join them"
        raise CaptionFormatError("two_audios", blocks[1][0], text, message)
    marks = [m for m in _AUDIO.finditer(text) if not any(begin <= m.start() < end for begin, end in spoken)]
    if blocks:
        begin, inner, ends, end = blocks[0]
        if marks:
            message = "'Audio:' beside <AUDCAP>: one prompt has one of the two"
            raise CaptionFormatError("two_audios", marks[0].start(), text, message)
        late = [at for at, _ in spoken if at > begin]
        if late:
            message = "<S> after the sound's description; speech belongs before it"
            raise CaptionFormatError("text_after_audio", late[0], text, message)
        return CaptionParts(text[:begin].rstrip(), speeches, text[inner:ends].strip(), "audcap", text[end:].rstrip())
    if not marks:
        return CaptionParts(text, speeches, None, None)
    if len(marks) > 1:
        message = f"a second 'Audio:'; the first is at character {marks[0].start()}. Reword one"
        raise CaptionFormatError("two_audios", marks[1].start(), text, message)
    mark = marks[0]
    late = [at for at, _ in spoken if at > mark.start()]
    if late:
        message = "<S> after 'Audio:', which lasts to the end; speech belongs before it"
        raise CaptionFormatError("nested", late[0], text, message)
    if not text[mark.end() :].strip():
        raise CaptionFormatError("empty_audio", mark.start(), text, "nothing after 'Audio:'")
    return CaptionParts(text[: mark.start()].rstrip(), speeches, text[mark.end() :].strip(), "audio")
