"""How a notebook shows what has no picture of its own: clips, batches, layouts, twins, registries.

The classes know nothing of notebooks; IPython is told here, by name, so that nothing is imported before it is shown.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from ovi.notebook.tables import html_table, text_table

Table = tuple[str, list[tuple[Any, ...]]]


def register(shell: Any) -> None:
    """Tell an IPython shell how to show our objects."""
    # Libraries that we never use the bars of ask for widgets when they are imported.
    warnings.filterwarnings("ignore", message="IProgress not found")
    html, plain = (shell.display_formatter.formatters[kind] for kind in ("text/html", "text/plain"))
    for (module, name), table in TABLES.items():
        html.for_type_by_name(module, name, _as_html(table))
        plain.for_type_by_name(module, name, _as_text(table))
    html.for_type_by_name("ovi.data.media.clip", "Clip", _clip_html)
    plain.for_type_by_name("ovi.data.media.clip", "Clip", lambda clip, printer, cycle: printer.text(_clip_text(clip)))
    shell.display_formatter.formatters["image/png"].for_type_by_name("matplotlib.figure", "Figure", _png)


def layout_table(layout: Any) -> Table:
    """A latent layout's channels and rates."""
    rows = [
        ("video latent", f"{layout.video_channels} channels, {_rate(layout.clock.latent_fps)} latent frames/s"),
        ("audio latent", f"{layout.audio_channels} channels, {_rate(layout.clock.tokens_per_s)} tokens/s"),
        ("text", f"{layout.text_dim} wide, at most {layout.text_len} tokens"),
    ]
    return "LatentLayout", [*rows, *clock_table(layout.clock)[1]]


def clock_table(clock: Any) -> Table:
    """A clock's rates and what follows from them."""
    first = ", the first latent frame is one picture" if clock.causal_first_frame else ""
    return "Clock", [
        ("pictures", f"{clock.fps:g} frames/s, {clock.video_stride} a latent frame{first}"),
        ("sound", f"{clock.sample_rate} Hz, {clock.audio_stride} samples a token"),
        ("ratio", f"{clock.ratio:.5f} latent frames a token"),
    ]


def batch_table(batch: Any) -> Table:
    """A batch's shapes and prompts."""
    rows: list[tuple[Any, ...]] = [
        ("video", f"{_shape(batch.video)} = samples, channels, latent frames, height, width"),
        ("audio", f"{_shape(batch.audio)} = samples, tokens, channels"),
        ("text", f"{len(batch.text)} prompts of {', '.join(str(len(t)) for t in batch.text[:8])} tokens"),
    ]
    rows += [(f"prompt {i}", caption) for i, caption in enumerate(batch.captions[:4])]
    if len(batch.captions) > 4:
        rows.append(("", f"and {len(batch.captions) - 4} more"))
    return f"LatentBatch of {len(batch)}", rows


def twin_table(model: Any) -> Table:
    """A twin's towers, exchange and size."""
    from ovi.plan import fused_pairs
    from ovi.twin import num_parameters

    rows: list[tuple[Any, ...]] = []
    for name in ("video", "audio"):
        tower = getattr(model, name)
        size = f"{len(tower.blocks)} blocks, {tower.dim} wide, {tower.num_heads} heads"
        rows.append((f"{name} tower", size, f"{num_parameters(tower):,} parameters"))
    kinds = sorted({type(fusion).__name__ for fusion in model.fusions})
    exchange = f"{', '.join(kinds) or 'none'} in {len(fused_pairs(model.plan))} pairs of blocks"
    rows.append(("fusion", exchange, f"{num_parameters(model.fusions):,} parameters"))
    rows.append(("whole", "", f"{num_parameters(model):,} parameters"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trained != num_parameters(model):
        rows.append(("trained", "", f"{trained:,} parameters"))
    return "TwinDiT", rows


def registry_table(registry: Any) -> Table:
    """A registry's entries and what each does."""
    return f"{registry.name}: {registry.doc}", [(name, registry.summary(name)) for name in registry]


def index_table(index: Any) -> Table:
    """A shard set's samples and shapes."""
    counts = ", ".join(f"{index.num_samples(split)} {split}" for split in index.splits)
    size = f"{index.num_frames} frames of {index.height}x{index.width}, {index.clock.duration_s(index.num_frames):g} s"
    shapes = [(f"{kind} latent", " x ".join(map(str, shape))) for kind, shape in index.latent_shapes.items()]
    return f"ShardIndex of {index.folder}", [("samples", counts), ("clips", size), *shapes]


TABLES: dict[tuple[str, str], Callable[[Any], Table]] = {
    ("ovi.layout", "LatentLayout"): layout_table,
    ("ovi.clock", "Clock"): clock_table,
    ("ovi.data.batch", "LatentBatch"): batch_table,
    ("ovi.twin", "TwinDiT"): twin_table,
    ("ovi.registry", "Registry"): registry_table,
    ("ovi.data.index", "ShardIndex"): index_table,
}
"""Classes, and what is told of an object of each: a title and rows."""


def _as_html(table: Callable[[Any], Table]) -> Callable[[Any], str]:
    def show(thing: Any) -> str:
        title, rows = table(thing)
        return html_table(rows, title=title)

    return show


def _as_text(table: Callable[[Any], Table]) -> Callable[[Any, Any, bool], None]:
    def show(thing: Any, printer: Any, cycle: bool) -> None:
        title, rows = table(thing)
        printer.text(text_table(rows, title=title))

    return show


def _clip_html(clip: Any) -> str:
    from ovi.notebook.clips import video_html

    return video_html(clip)


def _clip_text(clip: Any) -> str:
    frames, height, width = clip.frames.shape[:3]
    return (
        f"Clip of {clip.duration_s:g} s: {frames} frames of {height}x{width} at {clip.fps:g} frames/s, "
        f"{len(clip.waveform)} samples at {clip.sample_rate} Hz"
    )


def _png(figure: Any) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    return buffer.getvalue()


def _shape(tensor: Any) -> str:
    return " x ".join(map(str, tensor.shape))


def _rate(value: float) -> str:
    return f"{value:.4g}"
