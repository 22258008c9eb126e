"""Captions checked, and turned into the variant that a model was trained on."""

from __future__ import annotations

from dataclasses import replace

from ovi.data.caption_format import VARIANTS, CaptionFormatError, Variant, format_caption, parse_caption
from ovi.data.stages.base import STAGES, Candidate, Filter, Limit, Rejected
from ovi.errors import OviError


@STAGES.register("captions")
class Captions(Filter):
    """Keeps clips whose caption keeps to Ovi's format, in the variant asked for.

    Figures: ``caption_words``, without tags, and ``speeches``.

    Args:
        variant: ``audcap`` or ``audio`` rewrites the sound's description as the 720x720 or the 960x960 releases have
            it; None leaves captions as they are.
        required: whether there must be a caption.
        audio_required: whether it must describe the sound.
        min_words: shortest caption; None is no limit.
        max_words: longest caption; None is no limit.
    """

    name = "captions"
    needs = frozenset()
    level = "clip"  # it reads none, but must see what a captioner has written

    def __init__(
        self,
        *,
        variant: Variant | None = None,
        required: bool = False,
        audio_required: bool = False,
        min_words: int | None = None,
        max_words: int | None = None,
    ) -> None:
        if variant is not None and variant not in VARIANTS:
            raise OviError(f"captions.variant must be one of {', '.join(VARIANTS)} or null, got {variant!r}")
        self.variant, self.required, self.audio_required = variant, required, audio_required
        self.limits = (
            Limit("caption_words", "short_caption", "captions.min_words", low=min_words),
            Limit("caption_words", "long_caption", "captions.max_words", high=max_words),
        )

    def judge(self, candidate: Candidate) -> Candidate | Rejected:
        text = candidate.caption
        if not text.strip():
            candidate = candidate.with_figures({"caption_words": 0, "speeches": 0})
            if self.required:
                message = f"{candidate.path}: has no caption; captions.required asks for one"
                return self.reject(candidate, "no_caption", message)
            return self.within_limits(candidate)
        try:
            parts = parse_caption(text)
            written = self.variant if parts.variant is not None else None
            text = text if written in (None, parts.variant) else format_caption(parts, written)
        except CaptionFormatError as error:
            return self.reject(candidate, f"caption_{error.reason}", f"{candidate.path}: caption, {error}")
        words = " ".join([parts.visual_text, *parts.speeches, parts.audio or ""]).split()
        candidate = candidate.with_figures({"caption_words": len(words), "speeches": len(parts.speeches)})
        if self.audio_required and parts.audio is None:
            message = f"{candidate.path}: the caption does not describe the sound; captions.audio_required asks for it"
            return self.reject(candidate, "no_audio_caption", message)
        return self.within_limits(replace(candidate, caption=text))
