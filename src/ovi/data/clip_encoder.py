"""One clip to the bytes of its sample, in this process or in several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from safetensors.torch import save

from ovi.codecs.bundle import Codecs
from ovi.data.files import json_bytes
from ovi.data.local_copies import LocalCopies
from ovi.data.media import MediaError, VariableFrameRate
from ovi.data.plan import ClipJob
from ovi.data.process_pool import ProcessPool
from ovi.data.quantise import packed
from ovi.data.sources import ClipFormat
from ovi.data.stages.base import Candidate, Rejected, Stage, run_stages
from ovi.data.stages.chosen import ChosenStages
from ovi.errors import OviError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
"""Types of stored latents. Text is stored in the same, beside 8-bit latents in float16."""


@dataclass(frozen=True)
class Rejection:
    """Why a clip was left out.

    Args:
        reason: short code to count by.
        message: what came, what was expected and which knob to turn.
        more: which stage found it, by which figure; JSON-ready.
    """

    reason: str
    message: str
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, rejected: Rejected) -> Rejection:
        """What a stage says."""
        record, told = rejected.record(), ("file", "start_s", "reason", "message")
        more = {name: value for name, value in record.items() if name not in told}
        return cls(rejected.reason, rejected.message, more)


class ClipEncoder:
    """Reads, filters and encodes single clips.

    Args:
        codecs: what encodes them, on whatever device they are.
        form: length, size and rates of a clip.
        dtype: name of the type that tensors are stored in.
        variable_frame_rate: "reject" or "resample".
        stages: those of level "clip" are run on every clip.
        copies: of files that are elsewhere.

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
    ) -> None:
        self.codecs, self.form, self.dtype, self.variable_frame_rate = codecs, form, dtype, variable_frame_rate
        self.stages = stages or ChosenStages({}, {})
        self.copies = copies or LocalCopies("")
        self._filters: dict[str, Stage] | None = None
        self._only_reads = False

    def __reduce__(self) -> tuple[Any, ...]:
        settings = (self.form, self.dtype, self.variable_frame_rate, self.stages, self.copies)
        return _built, (None if self._only_reads else self.codecs.to_dict(), *settings)

    def only_reading(self) -> ClipEncoder:
        """A copy that is sent to another process without its codecs."""
        other = copy(self)
        other._only_reads = True
        return other

    def candidate(self, job: ClipJob) -> Candidate:
        """The job as stages see it."""
        return Candidate(
            job.item.path,
            job.key,
            job.item.file,
            start_s=job.start_s,
            duration_s=self.form.duration_s,
            caption=job.caption,
            extra=job.item.extra,
            figures=job.figures,
            form=self.form,
            variable_frame_rate=cast(VariableFrameRate, self.variable_frame_rate),
            crop=job.crop,
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

    def encode(self, job: ClipJob) -> dict[str, bytes] | Rejection:
        """The job's sample: a safetensors file of its latents and text, and a json file of what is known about it."""
        candidate = self.read(job)
        return candidate if isinstance(candidate, Rejection) else self.encode_read(job, candidate)

    def encode_read(self, job: ClipJob, candidate: Candidate) -> dict[str, bytes] | Rejection:
        """The sample of a job that was read."""
        clip = candidate.clip
        assert clip is not None
        video, audio = self.codecs.encode_clip(torch.from_numpy(clip.frames), torch.from_numpy(clip.waveform))
        text = self.codecs.text.encode([candidate.caption])[0]
        in_8_bits = self.dtype == "int8"
        latents, words = (torch.float32, torch.float16) if in_8_bits else (DTYPES[self.dtype],) * 2
        tensors = {
            name: tensor.to("cpu", dtype).contiguous()
            for name, tensor, dtype in (("video", video, latents), ("audio", audio, latents), ("text", text, words))
        }
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if broken:
            return Rejection(
                "not_finite",
                f"{job.item.url or job.item.path}: {', '.join(broken)} latents exceed {self.dtype}: raise fit_clips or "
                f"dtype",
            )
        if in_8_bits:
            tensors = packed(tensors)
        about = {
            **candidate.extra,
            "caption": candidate.caption,
            "file": candidate.file,
            "start_s": candidate.start_s,
            "duration_s": self.form.duration_s,
        }
        if candidate.figures:
            about["figures"] = candidate.record()["figures"]
        return {"safetensors": save(tensors), "json": json_bytes(about)}


Result = tuple[ClipJob, dict[str, bytes] | Rejection]


@contextmanager
def encoded(encoder: ClipEncoder, jobs: Iterable[ClipJob], num_workers: int) -> Iterator[Iterator[Result]]:
    """The jobs' samples in the jobs' order, made by ``num_workers`` processes; up to 1 stays in this process.

    With codecs on an accelerator the processes read and filter, and this one encodes.

    Args:
        encoder: does the work.
        jobs: taken a few ahead of what is asked for.
        num_workers: processes beside this one.

    Raises:
        OviError: from the iterator, when a process is killed.
    """
    if num_workers <= 1:
        yield ((job, encoder.encode(job)) for job in jobs)
        return
    here = encoder.codecs.video.mean.device.type != "cpu"
    with ProcessPool(num_workers, encoder.only_reading() if here else encoder) as pool:
        # A clip that was read is hundreds of times the size of its latents.
        work, ahead = (ClipEncoder.read, num_workers + 2) if here else (ClipEncoder.encode, 4 * num_workers)
        results = pool.ordered(jobs, work, ahead=ahead)
        yield ((job, encoder.encode_read(job, r) if isinstance(r, Candidate) else r) for job, r in results)


def _built(codecs: dict[str, Any] | None, *settings: Any) -> ClipEncoder:
    return ClipEncoder(cast(Codecs, None) if codecs is None else Codecs.from_dict(codecs), *settings)


__all__ = ["DTYPES", "ClipEncoder", "Rejection", "Result", "encoded"]
