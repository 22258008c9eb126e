"""Whether a set of shards is what its index says: every byte read, every sample looked at."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ovi.codecs.base import TEXT_ENCODERS
from ovi.data.index import REJECTED, Shard, ShardIndex, clock_problem
from ovi.data.lines import json_record
from ovi.data.reading.remote import ShardCache, is_remote
from ovi.data.reading.tar_index import scan_tar
from ovi.data.shards import Damage, LatentShards
from ovi.errors import OviError


@dataclass(frozen=True)
class Finding:
    """Something wrong: its kind, a word to count by, where, and what."""

    kind: str
    where: str
    message: str


@dataclass
class ShardReport:
    """What was seen of one shard."""

    shard: str
    split: str
    num_samples: int = 0
    num_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)


@dataclass
class Report:
    """What was seen of a set."""

    folder: str
    shards: list[ShardReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def all_findings(self) -> list[Finding]:
        return [*self.findings, *(finding for shard in self.shards for finding in shard.findings)]

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return {
            "folder": self.folder,
            "num_samples": sum(shard.num_samples for shard in self.shards),
            "num_bytes": sum(shard.num_bytes for shard in self.shards),
            "whole": not self.all_findings,
            "findings": [vars(finding) for finding in self.all_findings],
        }


def check_set(
    index: ShardIndex,
    cache: ShardCache | None = None,
    *,
    strict: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read a whole set and say what is not as it should be.

    Looks at sizes and hashes of shards; every sample's members, types and shapes; numbers that are not finite; text of
    another width than the encoder's, or longer; keys that come twice anywhere in the set; sound and pictures whose
    lengths differ on the set's clock; and, in a folder on this machine, shards that the index does not list and lines
    of rejected.jsonl that cannot be read.

    Args:
        index: loaded with ``verify=False``, so that what is missing is found here.
        cache: for a set elsewhere.
        strict: look no further than the first shard with a finding.
        on_progress: called with shards done and shards in all.
    """
    report = Report(str(index.folder))
    seen: dict[str, str] = {}
    total, done = sum(len(shards) for shards in index.splits.values()), 0
    text = _text_limits(index)
    if not is_remote(str(index.folder)):
        report.findings += _beside(index)
    for split, shards in index.splits.items():
        said = index.content["splits"][split].get("num_samples")
        if said is not None and said != index.num_samples(split):
            message = f"split {split} has {said} samples, its shards {index.num_samples(split)} together"
            report.findings.append(Finding("count", "index.json", message))
        for shard in shards:
            one = ShardReport(Path(shard.location).name, split)
            report.shards.append(one)
            try:
                file = _open(shard, cache)
            except OSError as error:
                one.findings.append(Finding("missing", one.shard, str(error.strerror or error)))
            else:
                try:
                    _check_bytes(file, shard, one)
                    _check_clock(index, shard, one)
                finally:
                    os.close(file)
                _check_samples(index, split, shard, one, seen, text, cache)
            if strict and report.all_findings:
                return report
            done += 1
            if on_progress:
                on_progress(done, total)
    if not report.all_findings:
        report.findings += [Finding("index", "index.json", problem) for problem in index.contradictions()]
    return report


def _beside(index: ShardIndex) -> Iterator[Finding]:
    """What is wrong with files of the folder that the index does not speak of."""
    folder = Path(index.folder)
    listed = {shard.path.resolve() for shards in index.splits.values() for shard in shards}
    for file in sorted(folder.glob("*.tar")):
        if file.resolve() not in listed:
            yield Finding(
                "unlisted", file.name, "is no shard of the index, nothing reads it: of another set? remove it"
            )
    rejected = folder / REJECTED
    try:
        text = rejected.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        yield Finding("rejected", REJECTED, f"cannot be read ({error})")
        return
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{REJECTED}, line {number}"
        try:
            if line.strip() and "reason" not in json_record(line, where):
                yield Finding("rejected", where, "gives no reason")
        except OviError as error:
            yield Finding("rejected", where, str(error).removeprefix(f"{where}: "))


def _open(shard: Shard, cache: ShardCache | None) -> int:
    if not is_remote(shard.location):
        return os.open(shard.location, os.O_RDONLY)
    if cache is None:
        raise OviError(f"{shard.location} is elsewhere: name a folder for copies with cache_dir=FOLDER")
    return cache.open(shard.location, shard.num_bytes, shard.sha256)


def _check_bytes(file: int, shard: Shard, report: ShardReport) -> None:
    report.num_bytes = os.fstat(file).st_size
    if report.num_bytes != shard.num_bytes:
        message = f"{report.num_bytes} bytes, the index says {shard.num_bytes}"
        report.findings.append(Finding("size", report.shard, message))
    with open(file, "rb", closefd=False) as content:
        if hashlib.file_digest(content, "sha256").hexdigest() != shard.sha256:
            report.findings.append(Finding("hash", report.shard, "its sha256 is not the index's"))
    tar = scan_tar(file)
    if tar.damage:
        report.findings.append(Finding("tar", report.shard, tar.damage))
    if len(tar.samples) != shard.num_samples:
        message = f"{len(tar.samples)} samples, the index says {shard.num_samples}"
        report.findings.append(Finding("count", report.shard, message))


def _check_clock(index: ShardIndex, shard: Shard, report: ShardReport) -> None:
    if problem := clock_problem(index.clock, shard.shapes):
        report.findings.append(Finding("clock", report.shard, problem))


def _check_samples(
    index: ShardIndex,
    split: str,
    shard: Shard,
    report: ShardReport,
    seen: dict[str, str],
    text: tuple[int, int] | None,
    cache: ShardCache | None,
) -> None:
    samples = LatentShards(index, split, cache=cache).only(shard)
    samples.text_dim = None  # text of another width is a finding of its own
    for number in range(len(samples)):
        try:
            sample = samples[number]
        except Damage as error:
            if error.skipped.key:
                report.findings.append(Finding("sample", f"{report.shard}: {error.skipped.key}", error.skipped.reason))
                continue
            break  # that the shard holds fewer is said already
        report.num_samples += 1
        where = f"{report.shard}: {sample.key}"
        if sample.key in seen:
            report.findings.append(Finding("duplicate", where, f"the same key as one in {seen[sample.key]}"))
        seen.setdefault(sample.key, report.shard)
        length, width = sample.text.shape
        if text is not None and (width != text[0] or length > text[1] or not length):
            message = f"text is {[length, width]}, the encoder's has 1 to {text[1]} rows of {text[0]}"
            report.findings.append(Finding("text", where, message))
    samples.close()


def _text_limits(index: ShardIndex) -> tuple[int, int] | None:
    """Width and largest length of the text, as the index says, else its encoder's knobs; None where neither does."""
    try:
        if (text := index.content.get("text")) is not None:
            return int(text["dim"]), int(text["len"])
        spec = index.content["codecs"]["text"]
        defaults = {knob.name: knob.default for knob in TEXT_ENCODERS.knobs(spec["name"]).values()}
        knobs = {**defaults, **spec.get("knobs", {})}
        return int(knobs["text_dim"]), int(knobs["text_len"])
    except (KeyError, TypeError, ValueError):
        return None
