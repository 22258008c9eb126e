"""What a prompt in Ovi's notation says will be heard: the description of the sound, and the words to be spoken."""

from __future__ import annotations

import re

_SPEECH = re.compile(r"<S>((?:(?!<S>).)*?)<E>", re.DOTALL)
_CAPTIONS = re.compile(r"<AUDCAP>(.*?)(?:<ENDAUDCAP>|(?=<AUDCAP>)|\Z)", re.DOTALL)
_AUDIO_LINE = re.compile(r"(?<!\w)Audio:")


def audio_caption(prompt: str) -> str | None:
    """The description of the sound in a prompt, in either notation of Ovi's published variants.

    ``<AUDCAP>...<ENDAUDCAP>`` (720x720_5s; several are joined, an unclosed one runs to the end) goes before
    ``Audio: ...`` (the 960x960 variants; from its first place outside of speech to the end of the prompt). Speech
    outside the description is left out, as the description says how it sounds; within it, the words stay and their
    marks go. White space is collapsed.

    Args:
        prompt: as the model got it.

    Returns:
        The description, or None for a prompt without one or with an empty one.
    """
    caption = _plain(" ".join(_CAPTIONS.findall(prompt)))
    if caption:
        return caption
    # Speech is blanked at equal length, so that "Audio:" said aloud does not count and places stay.
    unspoken = _SPEECH.sub(lambda match: " " * len(match.group()), prompt)
    start = _AUDIO_LINE.search(unspoken)
    return (_plain(prompt[start.end() :]) or None) if start else None


def spoken_words(prompt: str) -> list[str]:
    """What is said, in order: each text between ``<S>`` and ``<E>``, white space collapsed, empty ones left out.

    An ``<S>`` without its ``<E>`` says nothing: where it would end is not known.

    Args:
        prompt: as the model got it.
    """
    return [words for words in map(_plain, _SPEECH.findall(prompt)) if words]


def _plain(text: str) -> str:
    return " ".join(re.sub(r"<(?:S|E|AUDCAP|ENDAUDCAP)>", " ", text).split())
