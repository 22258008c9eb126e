"""Files of sound alone, or of pictures alone, kept as what they are."""

from __future__ import annotations

from dataclasses import replace

from ovi.data.media import probe
from ovi.data.stages.base import STAGES, Candidate, Filter, Rejected
from ovi.errors import OviError

KEEPS = {"reject": frozenset[str](), "audio": frozenset({"video"}), "video": frozenset({"audio"})}
KEEPS["both"] = KEEPS["audio"] | KEEPS["video"]
"""What a clip may lack, by the value of ``incomplete``."""


@STAGES.register("incomplete")
class Incomplete(Filter):
    """Marks files of sound alone, or of pictures alone, as such; without it whatever reads them rejects them.

    Stages that need what is missing pass them by. It must come before any that do; ``ovi encode`` puts it first.

    Args:
        keep: ``audio`` for files without a picture, ``video`` for files without sound, ``both``, or ``reject``.
    """

    name = "incomplete"
    needs = frozenset()

    def __init__(self, *, keep: str = "both") -> None:
        if keep not in KEEPS:
            raise OviError(f"incomplete.keep must be one of {', '.join(KEEPS)}, got {keep!r}")
        self.keep = keep

    def judge(self, candidate: Candidate) -> Candidate | Rejected:
        info = probe(candidate.path)
        missing = {name for name, there in (("video", info.has_video), ("audio", info.has_audio)) if not there}
        if len(missing) == 2:
            return self.reject(candidate, "unreadable", f"{candidate.path}: has neither pictures nor sound")
        if missing <= KEEPS[self.keep]:
            return replace(candidate, missing=frozenset(missing))
        name = "video" if "video" in missing else "audio"
        message = f"{candidate.path}: has no {name} stream; incomplete={self.keep} keeps none without"
        return self.reject(candidate, f"no_{name}", message)
