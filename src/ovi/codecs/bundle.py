"""The three codecs of a data set together, with the clock that follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ovi.clock import Clock
from ovi.codecs.base import AUDIO_CODECS, TEXT_ENCODERS, VIDEO_CODECS, AudioCodec, Moments, TextEncoder, VideoCodec
from ovi.errors import OviError

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
    def from_dict(cls, stored: Mapping[str, Any]) -> Codecs:
        """Inverse of ``to_dict``.

        Raises:
            OviError: as ``build`` does, or when the stored clock, statistics or weights are not those of the codecs.
        """
        codecs = cls.build({kind: stored[kind] for kind in REGISTRIES}, fps=stored["clock"]["fps"])
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
        self.video.load_state(state["video"])
        self.audio.load_state(state["audio"])
        load_text = getattr(self.text, "load_state", None)
        if load_text is not None and "text" in state:
            load_text(state["text"])

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
        """Take both latents' statistics from clips (frames uint8 [T, H, W, 3], waveform [N]) in one pass.

        Returns:
            How many clips came.

        Raises:
            OviError: when none came.
        """
        video, audio, count = Moments(), Moments(), 0
        for frames, waveform in clips:
            pixels, sound = self._signals(frames, waveform)
            self.video.gather(video, pixels)
            self.audio.gather(audio, sound)
            count += 1
        self.video.set_statistics(video)
        self.audio.set_statistics(audio)
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
        pixels, sound = self._signals(frames, waveform)
        return self.video.encode(pixels)[0], self.audio.encode(sound)[0]

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

    def _signals(self, frames: Tensor, waveform: Tensor) -> tuple[Tensor, Tensor]:
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != torch.uint8:
            raise OviError(f"expected frames uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
        if waveform.ndim != 1:
            raise OviError(f"expected a mono waveform [N], got {list(waveform.shape)}")
        device = self.video.mean.device
        pixels = rearrange(frames.to(device).float() / 127.5 - 1, "t h w c -> 1 c t h w")
        sound = fit_length(waveform.to(device).float(), self.clock.num_samples(frames.shape[0]))
        return pixels, sound[None]


def _whole_spec(kind: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Spec with every knob spelled out: what is stored keeps its meaning when a default changes."""
    defaults = {k.name: k.default for k in REGISTRIES[kind].knobs(spec["name"]).values() if not k.required}
    return {"name": spec["name"], "knobs": {**defaults, **spec.get("knobs", {})}}


def fit_length(waveform: Tensor, num_samples: int) -> Tensor:
    """Waveform [..., N] cut, or padded with silence at the end, to [..., num_samples]."""
    return functional.pad(waveform, (0, num_samples - waveform.shape[-1]))
