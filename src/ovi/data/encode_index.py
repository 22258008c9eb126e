"""What the index of an encoded set says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ovi.codecs.bundle import Codecs
from ovi.data.forms import Forms, shard_shapes
from ovi.data.index import FORMAT, SPLITS, VERSION
from ovi.data.plan import ShardPlan
from ovi.data.sources import ClipFormat
from ovi.data.stages.base import limits_of
from ovi.data.stages.chosen import ChosenStages
from ovi.data.stopwatch import Stopwatch


def index_content(
    settings: Mapping[str, Any],
    codecs: Codecs,
    forms: Forms,
    splits: Mapping[str, Any],
    *,
    quantisation: Mapping[str, Any] | None,
    source: Mapping[str, Any],
    rejected: Mapping[str, int],
    stages: ChosenStages,
    throughput: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of ``index.json``.

    Args:
        settings: that decide what the set holds.
        codecs: with their statistics.
        forms: of the clips.
        splits: as ``splits_of`` gives them.
        quantisation: error of 8 bits; None where latents are stored in more.
        source: where the clips came from, in words and counts.
        rejected: clips left out, by reason.
        stages: whose limits are named.
        throughput: as ``throughput_of`` gives it.
    """
    form = forms.form
    return {
        "format": FORMAT,
        "version": VERSION,
        "clock": codecs.clock.to_dict(),
        "codecs": codecs.to_dict(),
        "num_frames": form.num_frames,
        "height": form.height,
        "width": form.width,
        "latent_shapes": shard_shapes(codecs, form),
        "text": {"dim": codecs.text.text_dim, "len": codecs.text.text_len},
        "dtype": settings["dtype"],
        **({"quantisation": quantisation} if quantisation else {}),
        "splits": splits,
        "source": source,
        "rejected": rejected,
        "limits": limits_of(stages.of_level("file", "clip", "set")),
        "throughput": throughput,
        "settings": settings,
    }


def splits_of(records: list[dict[str, Any]], plans: list[ShardPlan], codecs: Codecs) -> dict[str, dict[str, Any]]:
    """What the index says of every split: its samples, and its shards by file, size and checksum.

    Args:
        records: of the shards, by what was written.
        plans: by what was to be.
        codecs: tell the shapes of clips of another form than the set's own.
    """
    shapes_of = {plan.form: shard_shapes(codecs, plan.form) for plan in plans if plan.form is not None}
    return {split: _split(records, plans, split, shapes_of) for split in SPLITS}


def _split(
    records: list[dict[str, Any]], plans: list[ShardPlan], split: str, shapes: Mapping[ClipFormat, Mapping[str, Any]]
) -> dict[str, Any]:
    """What the index says of a split; shards of the set's own length and size have no shapes of their own."""
    plan_of = {plan.file: plan for plan in plans if plan.split == split}
    shards = []
    for record in records:
        plan = plan_of.get(record["file"])
        if plan is None or not record["num_samples"]:
            continue
        shard = {name: record[name] for name in ("file", "num_samples", "num_bytes", "sha256")}
        if plan.form is not None:
            shard["latent_shapes"] = shapes[plan.form]
        shards.append(shard)
    return {"num_samples": sum(shard["num_samples"] for shard in shards), "shards": shards}


def throughput_of(records: list[dict[str, Any]], before: Mapping[str, Any]) -> dict[str, Any]:
    """Clips per second of one process's time, over all processes that worked on the set, and where the time went.

    Args:
        records: of the shards.
        before: seconds and clips by step of what came before them.
    """
    seconds = sum(record["seconds"] for record in records)
    clips = sum(record["num_samples"] + len(record["rejected"]) for record in records)
    watch = Stopwatch()
    for times in (before, *(record.get("steps", {}) for record in records)):
        watch.add(times)
    return {
        "process_seconds": seconds,
        "clips_per_process_second": clips / seconds if seconds else 0.0,
        "steps": {name: {"seconds": of[0], "clips": int(of[1])} for name, of in watch.to_dict().items()},
    }
