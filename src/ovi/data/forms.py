"""The lengths and sizes that clips of one set may have, checked against its codecs before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ovi.codecs.bundle import Codecs
from ovi.data.sources import ClipFormat
from ovi.errors import OviError

Lengths = Sequence[int] | Mapping[str, int]
"""Frames of a clip: those listed, or every ``step`` from ``min`` to ``max``."""


@dataclass(frozen=True)
class Forms:
    """What clips of a set are read as.

    Args:
        form: of the set: its own length and size.
        sizes: (height, width) that a clip may have, in pixels.
        lengths: frames that it may have, ascending.
    """

    form: ClipFormat
    sizes: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(
        cls,
        codecs: Codecs,
        num_frames: int,
        height: int,
        width: int,
        *,
        sizes: Sequence[Sequence[int]] | None = None,
        lengths: Lengths | None = None,
    ) -> Forms:
        """Those of a set's settings.

        Args:
            codecs: must be able to encode all of them.
            num_frames, height, width: of the set.
            sizes: pairs of height and width; None is the set's alone.
            lengths: frames; None is the set's alone.

        Raises:
            OviError: for one that does not fit the codecs, naming the nearest that does.
        """
        codecs.latent_shapes(num_frames, height, width)
        form = ClipFormat(codecs.clock.fps, num_frames, height, width, codecs.clock.sample_rate)
        made = cls(form, _sizes(sizes) or ((height, width),), _lengths(lengths) or (num_frames,))
        unfit = [n for n in made.lengths if not _fits(codecs, n)]
        if unfit:
            nearest = [_nearest(codecs, n) for n in unfit]
            raise OviError(
                f"lengths: {_some(unfit)} frames do not fit the codecs' latent frames and audio tokens: the nearest "
                f"{'that does is' if len(unfit) == 1 else 'that do are'} {_some(list(dict.fromkeys(nearest)))}"
            )
        for size in made.sizes:
            try:
                codecs.latent_shapes(made.lengths[0], *size)
            except OviError as error:
                raise OviError(f"sizes: {error}") from None
        return made

    def settings(self) -> dict[str, Any]:
        """JSON-ready: what the set's own length and size do not say."""
        said: dict[str, Any] = {}
        if self.sizes != ((self.form.height, self.form.width),):
            said["sizes"] = [list(size) for size in self.sizes]
        if self.lengths != (self.form.num_frames,):
            said["lengths"] = list(self.lengths)
        return said


def shard_shapes(codecs: Codecs, form: ClipFormat) -> dict[str, tuple[int, ...]]:
    """Shapes of the latents of clips of one form; what they are without is absent."""
    stride = codecs.video.spatial_stride
    shapes = codecs.latent_shapes(form.num_frames, form.height or stride, form.width or stride)
    return {name: shape for name, shape in shapes.items() if name not in form.missing}


def _sizes(given: Sequence[Sequence[int]] | None) -> tuple[tuple[int, int], ...]:
    if given is None:
        return ()
    try:
        sizes = tuple((int(height), int(width)) for height, width in given)
    except (TypeError, ValueError):
        sizes = ()
    if not sizes:
        raise OviError(f"sizes must be pairs [height, width] in pixels, got {given!r}")
    return tuple(dict.fromkeys(sizes))


def _lengths(given: Lengths | None) -> tuple[int, ...]:
    if given is None:
        return ()
    asked = f"lengths must be a list of frames, or min, max and step; got {given!r}"
    if isinstance(given, Mapping):
        if set(given) != {"min", "max", "step"} or not all(isinstance(value, int) for value in given.values()):
            raise OviError(asked)
        if not 0 < given["min"] <= given["max"] or given["step"] < 1:
            raise OviError(f"{asked}, where 0 < min <= max and step is at least 1")
        return tuple(range(given["min"], given["max"] + 1, given["step"]))
    if isinstance(given, str) or not given or not all(isinstance(n, int) and n > 0 for n in given):
        raise OviError(asked)
    return tuple(sorted(set(given)))


def _fits(codecs: Codecs, num_frames: int) -> bool:
    try:
        return codecs.clock.lengths(num_frames)[1] > 0
    except OviError:
        return False


def _nearest(codecs: Codecs, num_frames: int) -> int:
    """The nearest number of frames that fits; the lower of two."""
    stride = codecs.clock.video_stride
    # Among as many frames as one latent frame has there is one that fits, but for clips shorter than an audio token.
    far = 0
    while True:
        for near in (num_frames - far, num_frames + far):
            if near > 0 and _fits(codecs, near):
                return near
        far += 1
        if far > num_frames + 1000 * stride:
            return num_frames


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"


__all__ = ["Forms", "Lengths", "shard_shapes"]
