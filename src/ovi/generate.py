"""Prompts to clips with sound: noise, guided sampling, decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ovi.codecs.bundle import Codecs
from ovi.data.media import Clip
from ovi.errors import OviError
from ovi.guidance import Guidance, Prompts, guided, no_guidance, no_text
from ovi.sampling import Sampler, sample, unipc


class Generator:
    """How clips are generated; a callable over a model, codecs and prompts.

    Every clip's noise depends on (seed, its index) alone: the same clips come whatever the batch size or the number
    of ranks.

    Args:
        sampler: builds the solver of one modality from the number of steps.
        num_steps: solver steps.
        guidance: passes and weights.
        seed: of the noise.
        batch_size: clips denoised together.
        passes_at_once: guidance passes that go through the network as one batch; None for all, 1 for least memory.

    Raises:
        OviError: when a count is below 1.
    """

    def __init__(
        self,
        *,
        sampler: Sampler = unipc,
        num_steps: int = 50,
        guidance: Guidance | Callable[[], Guidance] = no_guidance,
        seed: int = 0,
        batch_size: int = 8,
        passes_at_once: int | None = None,
    ) -> None:
        counts = {"num_steps": num_steps, "batch_size": batch_size, "passes_at_once": passes_at_once}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise OviError(f"generation: {name} must be at least 1, got {value}")
        self.sampler, self.num_steps, self.seed, self.batch_size = sampler, num_steps, seed, batch_size
        self.passes_at_once = passes_at_once
        self.guidance = guidance if isinstance(guidance, Guidance) else guidance()

    def latents(
        self,
        model: Callable[..., Any],
        shapes: tuple[tuple[int, ...], tuple[int, ...]],
        texts: Sequence[Tensor],
        indices: Sequence[int],
        negatives: tuple[Tensor, Tensor] | None = None,
        first_frame: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents of one batch after another, [b, C, F, H, W] and [b, L, C].

        Args:
            model: called as TwinDiT is; its latents live on the device of ``texts``.
            shapes: of one video latent [C, F, H, W] and one audio latent [L, C].
            texts: prompt embeddings [n_i, text_dim], one a clip.
            indices: number of each clip, which its noise depends on.
            negatives: embeddings of the video's and the audio's negative prompt; None guides away from no text.
            first_frame: clean latents [N, C, 1, H, W] of given first frames.
        """
        for start in range(0, len(texts), self.batch_size):
            chunk = slice(start, start + self.batch_size)
            text, size = list(texts[chunk]), len(texts[chunk])
            device = text[0].device
            noises = [self._noise(shapes, i) for i in indices[chunk]]
            video, audio = (torch.stack(n).to(device) for n in zip(*noises))
            empty = no_text(text[0])
            negative_video, negative_audio = negatives or (empty, empty)
            prompts = Prompts(text, text, [negative_video] * size, [negative_audio] * size)
            conditions = {} if first_frame is None else {"clean_first_frame": True}
            field = guided(model, self.guidance, prompts, passes_at_once=self.passes_at_once, **conditions)
            given = None if first_frame is None else first_frame[chunk].to(device)
            yield sample(field, video, audio, sampler=self.sampler, num_steps=self.num_steps, first_frame=given)

    def clips(
        self,
        model: Callable[..., Any],
        codecs: Codecs,
        shapes: tuple[tuple[int, ...], tuple[int, ...]],
        texts: Sequence[Tensor],
        indices: Sequence[int],
        **options: Any,
    ) -> Iterator[Clip]:
        """Decoded clips, one after another, as soon as their batch is done; arguments as for ``latents``."""
        for video, audio in self.latents(model, shapes, texts, indices, **options):
            yield from decoded(codecs, video, audio)

    def _noise(self, shapes: tuple[tuple[int, ...], tuple[int, ...]], index: int) -> tuple[Tensor, Tensor]:
        # On the host: a device's generator gives other numbers than another's.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        video, audio = shapes
        return torch.randn(video, generator=generator), torch.randn(audio, generator=generator)


@torch.no_grad()
def decoded(codecs: Codecs, video: Tensor, audio: Tensor) -> list[Clip]:
    """Latents of a batch to clips."""
    frames, waveforms = codecs.decode(video.float(), audio.float())
    clock = codecs.clock
    return [
        Clip(f.cpu().numpy(), w.cpu().numpy(), fps=clock.fps, sample_rate=clock.sample_rate)
        for f, w in zip(frames, waveforms)
    ]
