"""A result as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table


def show(result: dict[str, Any], console: Console) -> None:
    """Print times, memory and the computed floor."""
    for title, kind in (("Forward", "forward"), ("Training step (forward and backward)", "step")):
        console.print(_times(result, title, kind))
    console.print(_memory(result))
    console.print(_floor(result["computed_floor"]))
    for task, names in _names(result).items():
        baseline = result["models"][names[0]]["baseline"]
        console.print(f"{task} models ({', '.join(names)}): ratios to {baseline}")
    console.print(f"matmul peak of this run: {result['matmul_peak_flops_per_s'] / 1e12:.3g} TFLOP/s")
    for modality, found in result["agreement"].items():
        console.print(
            f"{modality} velocity against the original's on the same weights: max difference "
            f"{found['max_difference']:.2g} of outputs up to {found['max_output']:.2g}"
        )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    return table


def _names(result: dict[str, Any]) -> dict[str, list[str]]:
    tasks: dict[str, list[str]] = {}
    for name, figures in _rows(result):
        tasks.setdefault(figures["task"], []).append(name)
    return tasks


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from sorted(result["models"].items(), key=lambda item: item[1]["task"])


def _times(result: dict[str, Any], title: str, kind: str) -> Table:
    table = _table(title, "model", "params", "GFLOP", "median ms", "min-max", "peak share", "speed")
    for name, figures in _rows(result):
        found = figures[kind]
        table.add_row(
            name,
            f"{figures['parameters'] / 1e6:.1f} M",
            f"{figures['flops'][kind] / 1e9:,.1f}",
            _ms(found["median_s"]),
            f"{_ms(found['min_s'])}-{_ms(found['max_s'])}",
            f"{found['share_of_peak']:.0%}",
            _against(found["speed"], name, figures["baseline"]),
        )
    return table


def _memory(result: dict[str, Any]) -> Table:
    table = _table("Peak memory, MiB", "model", "forward", "step, activations", "step with gradients", "activations")
    for name, figures in _rows(result):
        found = figures["memory"]
        table.add_row(
            name,
            *(f"{found[k] / 2**20:.1f}" for k in ("forward_bytes", "step_bytes", "step_with_gradients_bytes")),
            _against(found["memory"], name, figures["baseline"]),
        )
    return table


def _floor(floor: dict[str, Any]) -> Table:
    title = f"Computed, not measured: {floor['chip']['name']}, 720x720, 5 s, bfloat16"
    table = _table(title, "setting", "TFLOP", "GB", "floor ms", "at target ms")
    for name, setting in floor["settings"].items():
        for kind, label in (("forward", "forward"), ("step", "training step")):
            found = setting[kind]
            table.add_row(
                f"{name}, {label}",
                f"{found['flops'] / 1e12:.1f}",
                f"{found['bytes'] / 1e9:.1f}",
                f"{found['floor_s'] * 1e3:.1f}",
                f"{found['at_target_share_s'] * 1e3:.1f} ({floor['target_share'][kind]:.0%})",
            )
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 1 else f"{seconds * 1e3:.3g}"


def _against(ratio: float | None, name: str, baseline: str | None) -> str:
    if ratio is None:
        return "-"
    return "baseline" if name == baseline else f"{ratio:.2f}x"
