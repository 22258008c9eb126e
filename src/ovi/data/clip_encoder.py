"""Clips to the bytes of their samples."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ovi.codecs.bundle import REGISTRIES, Codecs
from ovi.data.files import json_bytes
from ovi.data.local_copies import LocalCopies
from ovi.data.media import MediaError, VariableFrameRate
from ovi.data.plan import ClipJob
from ovi.data.quantise import packed
from ovi.data.rejection import Rejection
from ovi.data.sources import ClipFormat
from ovi.data.stages.base import Candidate, Rejected, Stage, run_stages
from ovi.data.stages.chosen import ChosenStages
from ovi.data.stopwatch import step
from ovi.errors import OviError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
"""Types of stored latents. Text is stored in the same, beside 8-bit latents in float16."""
_RUN = 4
"""Batches are made of the clips that pass among this many times as many: a shard's are not all read by one process."""
_KEPT_TEXTS = 64
"""Captions whose embeddings are kept: clips of one file, which come one after another, mostly share theirs."""

Read = Callable[[ClipJob], Candidate | Rejection]
"""Gives a job's frames and sound, or why it is left out."""
Sample = dict[str, bytes]
"""A safetensors file of latents and text, and a json file of what is known about them."""


class ClipEncoder:
    """Reads, filters and encodes clips.

    Args:
        codecs: what encodes them, on whatever device they are.
        form: length, size and rates of a clip that has none of its own.
        dtype: name of the type that tensors are stored in.
        variable_frame_rate: "reject" or "resample".
        stages: those of level "clip" are run on every clip.
        copies: of files that are elsewhere.
        batch_size: clips that the codecs take at a time.

    Sent to another process it is built there anew, on the CPU.
    """

    def __init__(
        self,
        codecs: Codecs,
        form: ClipFormat,
        dtype: str,
        variable_frame_rate: str,
        stages: ChosenStages | None = None,
        copies: LocalCopies | None = None,
        batch_size: int = 1,
    ) -> None:
        self.codecs, self.form, self.dtype, self.variable_frame_rate = codecs, form, dtype, variable_frame_rate
        self.stages = stages or ChosenStages({}, {})
        self.copies = copies or LocalCopies("")
        self.batch_size = batch_size
        self._filters: dict[str, Stage] | None = None
        self._texts: OrderedDict[tuple[str, ...], list[Tensor]] = OrderedDict()
        self._only_reads = False

    def __reduce__(self) -> tuple[Any, ...]:
        settings = (self.form, self.dtype, self.variable_frame_rate, self.stages, self.copies, self.batch_size)
        if self._only_reads:
            return _built, (None, (), *settings)
        return _built, (self.codecs.to_dict(), _modules(self.codecs), *settings)

    def only_reading(self) -> ClipEncoder:
        """A copy that is sent to another process without its codecs."""
        # Not copy(): it would build the codecs anew, as in another process.
        settings = (self.form, self.dtype, self.variable_frame_rate, self.stages, self.copies, self.batch_size)
        other = ClipEncoder(self.codecs, *settings)
        other._only_reads = True
        return other

    def runs(self, jobs: Sequence[ClipJob]) -> Iterator[Sequence[ClipJob]]:
        """A shard's clips in the runs that batches are formed in: the same whoever encodes them."""
        length = 1 if self.batch_size == 1 else _RUN * self.batch_size
        return (jobs[at : at + length] for at in range(0, len(jobs), length))

    def candidate(self, job: ClipJob) -> Candidate:
        """The job as stages see it."""
        form = job.form or self.form
        return Candidate(
            job.item.path,
            job.key,
            job.item.file,
            start_s=job.start_s,
            duration_s=form.duration_s,
            caption=job.caption,
            extra=job.item.extra,
            figures=job.figures,
            form=form,
            variable_frame_rate=cast(VariableFrameRate, self.variable_frame_rate),
            crop=job.crop,
            missing=form.missing,
        )

    def read(self, job: ClipJob) -> Candidate | Rejection:
        """The job's frames and sound, if all stages of level "clip" let it pass."""
        if self._filters is None:
            self._filters = self.stages.of_level("clip")
        left_out: list[Rejected] = []
        try:
            with self.copies.of(job.item) as item:
                candidate = self.candidate(replace(job, item=item))
                found = next(run_stages(self._filters, [candidate], left_out.append), None)
                if found is not None:
                    return found.decoded()
                rejection = Rejection.of(left_out[0])
        except MediaError as error:
            rejection = Rejection(error.reason, str(error))
        except OSError as error:
            rejection = Rejection("unreadable", f"{job.item.url or job.item.path}: {error.strerror or error}")
        except (OviError, MemoryError):
            raise
        except Exception as error:  # one odd file must not end the work on all others
            what = f"a stage failed ({type(error).__name__}: {error})"
            rejection = Rejection("failed", f"{job.item.url or job.item.path}: {what}")
        return replace(rejection, message=self.copies.said(rejection.message, job.item))

    def encode(self, job: ClipJob) -> Sample | Rejection:
        """The job's sample."""
        return self.encode_run([job])[0]

    def encode_run(self, jobs: Sequence[ClipJob], read: Read | None = None) -> list[Sample | Rejection]:
        """The samples of a run of jobs of one form, in batches of those that pass.

        Args:
            jobs: one after another.
            read: gives what was read of each elsewhere; None reads here.
        """
        results: dict[int, Sample | Rejection] = {}
        waiting: dict[int, Candidate] = {}
        for place, job in enumerate(jobs):
            found = (read or self.read)(job)
            if isinstance(found, Rejection):
                results[place] = found
            else:
                waiting[place] = found
            # No more are held than the codecs take.
            if waiting and (len(waiting) == self.batch_size or place + 1 == len(jobs)):
                results |= zip(waiting, self.encode_batch([(jobs[at], one) for at, one in waiting.items()]))
                waiting = {}
        return [results[place] for place in range(len(jobs))]

    def encode_read(self, job: ClipJob, candidate: Candidate) -> Sample | Rejection:
        """The sample of a job that was read."""
        return self.encode_batch([(job, candidate)])[0]

    def encode_batch(self, batch: Sequence[tuple[ClipJob, Candidate]]) -> list[Sample | Rejection]:
        """The samples of jobs of one form that were read, in one pass of each codec."""
        try:
            latents, texts = self._latents([candidate for _, candidate in batch]), self._embeddings(batch)
        except (MemoryError, RuntimeError) as error:
            if not _for_want_of_memory(error):
                raise
            if len(batch) > 1:
                return [self.encode_read(job, candidate) for job, candidate in batch]
            form = batch[0][1].form or self.form
            message = (
                f"{_where(batch[0][0])}: the codecs have no memory for {form.num_frames} frames of "
                f"{form.height}x{form.width}: set their tiles, or take shorter or smaller clips"
            )
            return [Rejection("out_of_memory", message)]
        return [
            self._sample(job, candidate, {**{name: of[place] for name, of in latents.items()}, "text": texts[place]})
            for place, (job, candidate) in enumerate(batch)
        ]

    def _latents(self, candidates: Sequence[Candidate]) -> dict[str, Tensor]:
        """Video and audio latents, as far as there are pictures and sound, [B, ...] in the type that is stored."""
        clips = [candidate.clip for candidate in candidates if candidate.clip is not None]
        frames = torch.from_numpy(clips[0].frames[None] if len(clips) == 1 else np.stack([c.frames for c in clips]))
        waveforms = torch.from_numpy(np.stack([clip.waveform for clip in clips]))
        dtype = torch.float32 if self.dtype == "int8" else DTYPES[self.dtype]
        latents: dict[str, Tensor] = {}
        # One after the other: how long each takes is known, and memory of one is free for the other.
        if frames.shape[2]:
            with step("video codec", len(clips)):
                video, _ = self.codecs.encode_clips(frames, waveforms[:, :0])
                assert video is not None
                latents["video"] = video.to("cpu", dtype)
        if waveforms.shape[1]:
            with step("audio codec", len(clips)):
                _, audio = self.codecs.encode_clips(frames[:, :, :0, :0], waveforms)
                assert audio is not None
                latents["audio"] = audio.to("cpu", dtype)
        return latents

    def _embeddings(self, batch: Sequence[tuple[ClipJob, Candidate]]) -> list[Tensor]:
        """Of each caption; equal ones are embedded once, and a batch's together."""
        captions = [candidate.caption for _, candidate in batch]
        # All of a batch are one entry: an encoder may pad to the longest, and its last bits then hang on the others.
        wanted = tuple(sorted(set(captions)))
        found = self._texts.pop(wanted, None)
        if found is None:
            dtype = torch.float16 if self.dtype == "int8" else DTYPES[self.dtype]
            with step("text", len(wanted)):
                found = [text.to("cpu", dtype) for text in self.codecs.text.encode(list(wanted))]
        self._texts[wanted] = found
        while sum(map(len, self._texts)) > _KEPT_TEXTS and len(self._texts) > 1:
            self._texts.popitem(last=False)
        by_caption = dict(zip(wanted, found))
        return [by_caption[caption] for caption in captions]

    def _sample(self, job: ClipJob, candidate: Candidate, tensors: dict[str, Tensor]) -> Sample | Rejection:
        in_8_bits = self.dtype == "int8"
        # A row of a batch holds on to all of it, and would be stored with it.
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if broken:
            return Rejection(
                "not_finite",
                f"{_where(job)}: {', '.join(broken)} latents exceed {self.dtype}: raise fit_clips or dtype",
            )
        if in_8_bits:
            tensors = packed(tensors)
        about = {
            **candidate.extra,
            "caption": candidate.caption,
            "file": candidate.file,
            "start_s": candidate.start_s,
            "duration_s": (candidate.form or self.form).duration_s,
        }
        if candidate.figures:
            about["figures"] = candidate.record()["figures"]
        return {"safetensors": save(tensors), "json": json_bytes(about)}


def _where(job: ClipJob) -> str:
    return job.item.url or str(job.item.path)


def _for_want_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return "out of memory" in str(error).lower() or "can't allocate memory" in str(error)


def _modules(codecs: Codecs) -> tuple[str, ...]:
    """Where the codecs are registered: another process imports these before it asks for them."""
    return tuple(sorted({registry[codecs.specs[kind]["name"]].__module__ for kind, registry in REGISTRIES.items()}))


def _built(codecs: dict[str, Any] | None, modules: Sequence[str], *settings: Any) -> ClipEncoder:
    for module in modules:
        importlib.import_module(module)
    return ClipEncoder(cast(Codecs, None) if codecs is None else Codecs.from_dict(codecs), *settings)


__all__ = ["DTYPES", "ClipEncoder", "Read", "Sample"]
