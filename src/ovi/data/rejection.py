"""Clips that are left out of a set, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ovi.data.plan import ClipJob
from ovi.data.process_pool import Crash
from ovi.data.sources import SourceItem
from ovi.data.stages.base import Rejected


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


def crashed(item: SourceItem, error: Crash) -> Rejection:
    """The rejection of a clip, or a file, that ends its process."""
    message = f"{item.url or item.path}: ended the process that worked on it, twice ({error}); look at the file"
    return Rejection("crashed", message)


def rejection_record(job: ClipJob, rejection: Rejection) -> dict[str, Any]:
    """A line of ``rejected.jsonl``."""
    about = {"file": job.item.file, "start_s": job.start_s, "reason": rejection.reason, "message": rejection.message}
    return {**about, **rejection.more}
