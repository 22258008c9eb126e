"""The three codecs of a data set together, with the clock that follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ovi.clock import Clock
from ovi.codecs.base import AUDIO_CODECS, TEXT_ENCODERS, VIDEO_CODECS, AudioCodec, Moments, TextEncoder, VideoCodec
from ovi.errors import OviError
from ovi.registry import UnknownNameError

REGISTRIES = {"video": VIDEO_CODECS, "audio": AUDIO_CODECS, "text": TEXT_ENCODERS}


class Codecs(nn.Module):
    """Video codec, audio codec and text encoder, and the clock their strides and a frame rate make.

    Build one from specs (``build``) or from what an ``index.json`` stores (``from_dict``); the constructor takes
    objects together with the specs that made them.

    Args:
        video: pixels <-> latents.
        audio: waveforms <-> latents.
        text: prompts -> embeddings.
        fps: pixel frames per second.
        specs: the registry spec of each, under "video", "audio" and "text"; what ``to_dict`` stores.
    """

    def __init__(
        self, video: VideoCodec, audio: AudioCodec, text: TextEncoder, *, fps: float, specs: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.video, self.audio, self.text = video, audio, text
        self.specs = {kind: _whole_spec(kind, specs[kind]) for kind in REGISTRIES}
        self.clock = Clock(
            fps=fps,
            video_stride=video.temporal_stride,
            causal_first_frame=video.causal_first_frame,
            sample_rate=audio.sample_rate,
            audio_stride=audio.stride,
        )

    @classmethod
    def build(cls, specs: Mapping[str, Any], *, fps: float) -> Codecs:
        """Codecs of registry specs ``{"video": {"name", "knobs"}, "audio": ..., "text": ...}``.

        Raises:
            OviError: for a kind that is missing or unknown, an unknown name, or knobs that do not fit.
        """
        if set(specs) != set(REGISTRIES):
            raise OviError(f"codecs need a spec for each of {', '.join(REGISTRIES)}; got {', '.join(specs) or 'none'}")
        video, audio, text = (registry.build(specs[kind]) for kind, registry in REGISTRIES.items())
        return cls(video, audio, text, fps=fps, specs=specs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: specs, fitted statistics, clock; ``from_dict`` gives the very same codecs back."""
        return {
            **self.specs,
            "state": self.state(),
            "clock": self.clock.to_dict(),
        }

    @classmethod
    def from_dict(
        cls, stored: Mapping[str, Any], paths: Mapping[str, str | None] | None = None, *, text: bool = True
    ) -> Codecs:
        """Inverse of ``to_dict``.

        Args:
            stored: what it gave, here or on another machine.
            paths: where weights lie instead, as ``with_paths`` takes them.
            text: whether to build the text encoder, often the largest of the three; decoding does without.

        Raises:
            OviError: as ``build`` does, or when the stored clock, statistics or weights are not those of the codecs.
        """
        stored = with_paths(stored, paths)
        built: dict[str, Any] = {} if text else {"text": NoTextEncoder()}
        for kind, registry in REGISTRIES.items():
            if kind in built:
                continue
            with _naming_codec_paths(kind, stored[kind]):
                built[kind] = registry.build(stored[kind])
        codecs = cls(**built, fps=stored["clock"]["fps"], specs={kind: stored[kind] for kind in REGISTRIES})
        differences = codecs.clock.differences(Clock(**stored["clock"]))
        if differences:
            raise OviError(f"the stored clock is not that of the stored codecs: {'; '.join(differences)}")
        codecs.load_state(stored["state"])
        return codecs

    def state(self) -> dict[str, Any]:
        """JSON-ready: fitted statistics, and digests of the weights where codecs and text encoder have them."""
        state = {"video": self.video.state(), "audio": self.audio.state()}
        of_text = getattr(self.text, "state", None)
        return state if of_text is None else {**state, "text": of_text()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state``; sets of earlier versions say nothing of the text's weights.

        Raises:
            OviError: when it is not of these codecs, or of other weights.
        """
        for kind in REGISTRIES:
            load = getattr(getattr(self, kind), "load_state", None)
            if load is not None and (kind in state or kind != "text"):
                with _naming_codec_paths(kind, self.specs[kind]):
                    load(state[kind])

    def latent_shapes(self, num_frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one clip's latents: ``{"video": (C, F, h, w), "audio": (L, C)}``.

        Raises:
            OviError: when the frames or the size do not fit the video codec, or the sound is shorter than a token.
        """
        stride = self.video.spatial_stride
        if height < 1 or width < 1 or height % stride or width % stride:
            near = [max(1, round(size / stride)) * stride for size in (height, width)]
            raise OviError(
                f"{height}x{width} pixels do not divide by the video codec's stride of {stride}: "
                f"the nearest height and width that do are {near[0]} and {near[1]}"
            )
        frames, tokens = self.clock.lengths(num_frames)
        if not tokens:
            raise OviError(
                f"{num_frames} frames last {self.clock.duration_s(num_frames):g} s, less than one audio token of "
                f"{1 / self.clock.tokens_per_s:g} s: raise num_frames"
            )
        return {
            "video": (self.video.latent_channels, frames, height // stride, width // stride),
            "audio": (tokens, self.audio.latent_channels),
        }

    @property
    def fitted(self) -> bool:
        """Whether both latent codecs know their statistics."""
        return self.video.fitted and self.audio.fitted

    @torch.no_grad()
    def fit(self, clips: Iterable[tuple[Tensor, Tensor]]) -> int:
        """Take the latents' statistics from clips (frames uint8 [T, H, W, 3], waveform [N]) in one pass.

        Clips of sound alone have frames [T, 0, 0, 3], those of pictures alone no samples; a codec that no clip has
        anything for stays without statistics, and one that has some keeps them.

        Returns:
            How many clips came.

        Raises:
            OviError: when none came.
        """
        video, audio, count, seen = Moments(), Moments(), 0, set[str]()
        for frames, waveform in clips:
            pixels, sound = self._signals(frames[None], waveform[None])
            if pixels is not None:
                if not self.video.fitted:
                    self.video.gather(video, pixels)
                seen.add("video")
            if sound is not None:
                if not self.audio.fitted:
                    self.audio.gather(audio, sound)
                seen.add("audio")
            count += 1
        for kind, codec, moments in (("video", self.video, video), ("audio", self.audio, audio)):
            if not codec.fitted and (kind in seen or not seen):
                codec.set_statistics(moments)
        return count

    @torch.no_grad()
    def encode_clip(self, frames: Tensor, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """One clip to its normalised latents.

        Args:
            frames: uint8 [T, H, W, 3].
            waveform: [N] in -1..1, at the codec's rate; cut or padded with silence to the frames' length.

        Returns:
            (video [C, F, h, w], audio [L, C]), float32.
        """
        waveform = fit_length(waveform, self.clock.num_samples(len(frames)))
        video, audio = self.encode_clips(frames[None], waveform[None])
        if video is None or audio is None:
            raise OviError(f"expected frames uint8 [T, H, W, 3] of some pixels, got {list(frames.shape)}")
        return video[0], audio[0]

    @torch.no_grad()
    def encode_clips(self, frames: Tensor, waveforms: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Clips of one length and size to their normalised latents, in one pass of each codec.

        Args:
            frames: uint8 [B, T, H, W, 3]; H = W = 0 for sound alone.
            waveforms: [B, N] in -1..1, at the codec's rate; cut or padded with silence to the frames' length. N = 0
                for pictures alone.

        Returns:
            (video [B, C, F, h, w], audio [B, L, C]), float32; None for what the clips are without.
        """
        pixels, sound = self._signals(frames, waveforms)
        video = None if pixels is None else self.video.encode(pixels)
        return video, None if sound is None else self.audio.encode(sound)

    @torch.no_grad()
    def decode(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised latents to clips.

        Args:
            video: [B, C, F, h, w].
            audio: [B, L, C].

        Returns:
            (frames uint8 [B, T, H, W, 3], waveforms float32 [B, N] in -1..1), N being exactly the frames' length.
        """
        pixels = self.video.decode(video.to(self.video.mean))
        frames = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        waveforms = self.audio.decode(audio.to(self.audio.mean)).clamp(-1, 1)
        num_samples = self.clock.num_samples(frames.shape[2])
        return rearrange(frames, "b c t h w -> b t h w c"), fit_length(waveforms, num_samples)

    def _signals(self, frames: Tensor, waveforms: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What the codecs take: pixels [B, 3, T, H, W] and sound [B, N]; None for what the clips are without."""
        if frames.ndim != 5 or frames.shape[4] != 3 or frames.dtype != torch.uint8:
            raise OviError(f"expected frames uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape[1:])}")
        if waveforms.ndim != 2 or len(waveforms) != len(frames):
            raise OviError(f"expected a mono waveform [N] for each clip, got {list(waveforms.shape[1:])}")
        device, pixels, sound = self.video.mean.device, None, None
        if frames.shape[2] and frames.shape[3]:
            pixels = rearrange(frames.to(device).float() / 127.5 - 1, "b t h w c -> b c t h w")
        if waveforms.shape[1]:
            sound = fit_length(waveforms.to(device).float(), self.clock.num_samples(frames.shape[1]))
        return pixels, sound


class NoTextEncoder(TextEncoder):
    """Stands in codecs that were built for decoding alone."""

    def __init__(self) -> None:
        super().__init__(0, 0)

    def encode(self, prompts: list[str]) -> list[Tensor]:
        """No embeddings.

        Raises:
            OviError: always.
        """
        raise OviError("these codecs were built without their text encoder, for decoding alone: build them with it")


def _whole_spec(kind: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Spec with every knob spelled out: what is stored keeps its meaning when a default changes."""
    defaults = {k.name: k.default for k in REGISTRIES[kind].knobs(spec["name"]).values() if not k.required}
    return {"name": spec["name"], "knobs": {**defaults, **spec.get("knobs", {})}}


def with_paths(stored: Mapping[str, Any], paths: Mapping[str, str | None] | None) -> dict[str, Any]:
    """Stored codecs with their weights elsewhere than where they lay when they were stored.

    Args:
        stored: as ``Codecs.to_dict`` gives them.
        paths: folder, or hub repository, of the ``video`` codec's, ``audio`` codec's and ``text`` encoder's weights;
            what is absent or None stays.

    Raises:
        OviError: for another kind, or a codec without weights of its own.
    """
    moved = dict(stored)
    for kind, path in (paths or {}).items():
        if kind not in REGISTRIES:
            raise OviError(f"codec_paths has no {kind!r}, it has {', '.join(REGISTRIES)}")
        if path is None:
            continue
        name = stored[kind]["name"]
        if "path" not in REGISTRIES[kind].knobs(name):
            raise OviError(f"codec_paths.{kind}={path}: {name!r} has no weights to look for; leave it away")
        moved[kind] = {**stored[kind], "knobs": {**stored[kind].get("knobs", {}), "path": str(path)}}
    return moved


@contextmanager
def _naming_codec_paths(kind: str, spec: Mapping[str, Any]) -> Iterator[None]:
    """Have an error about weights that are not where they were name the knob that says where they are."""
    try:
        yield
    except UnknownNameError:
        raise
    except OviError as error:
        if (path := spec.get("knobs", {}).get("path")) is None:
            raise
        raise OviError(
            f"{error}. Weights of stored codecs were looked for in {path}; if they lie elsewhere on this machine, "
            f"set codec_paths.{kind}=FOLDER"
        ) from error


def fit_length(waveform: Tensor, num_samples: int) -> Tensor:
    """Waveform [..., N] cut, or padded with silence at the end, to [..., num_samples]."""
    return functional.pad(waveform, (0, num_samples - waveform.shape[-1]))
