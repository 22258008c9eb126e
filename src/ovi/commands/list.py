"""``ovi list``: what can be swapped, and what it costs. Everything shown comes from the registries."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ovi.commands.components import load_components, load_config_dir
from ovi.commands.hints import did_you_mean
from ovi.errors import OviError
from ovi.registry import REGISTRIES, Registry

_PIPED_WIDTH = 120


def main(argv: list[str]) -> None:
    """Run ``ovi list [WHAT] [--cost [model=...]] [--json]``."""
    parser = argparse.ArgumentParser(prog="ovi list", description="What can be swapped, and its knobs.")
    parser.add_argument("what", nargs="?", help="a registry, as in 'fusion', or one entry, as in 'fusion=ovi'")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--config-dir", help="a folder of your own: show what its yaml files name, too")
    parser.add_argument("--cost", action="store_true", help="of 'fusion': parameters, FLOPs, memory, time beside none")
    parser.add_argument("--latent", type=int, nargs=3, metavar=("F", "H", "W"), help="video latents for --cost")
    parser.add_argument("--audio-tokens", type=int, metavar="L", help="audio latents for --cost")
    parser.add_argument("--rounds", type=int, default=5, help="times measured of each for --cost; 0 for none")
    parser.add_argument("--device", default="cpu", help="where times are measured for --cost")
    parser.add_argument("overrides", nargs="*", help="of the model for --cost, as in 'model=ovi_720p_5s'")
    arguments = parser.parse_intermixed_args(argv)
    load_components()
    if arguments.config_dir:
        load_config_dir(arguments.config_dir)

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPED_WIDTH)
    if arguments.cost:
        rows = cost_rows(arguments)
        _print_json(rows) if arguments.json else _print_costs(console, rows)
        return
    if arguments.overrides:
        raise OviError(f"{' '.join(arguments.overrides)}: overrides of the model go with --cost")
    if not arguments.what:
        if arguments.json:
            _print_json({name: describe_registry(registry) for name, registry in sorted(REGISTRIES.items())})
        for registry in [] if arguments.json else [REGISTRIES[name] for name in sorted(REGISTRIES)]:
            _print_registry(console, registry)
        return
    name, entry_asked, entry = arguments.what.partition("=")
    registry = _registry(name)
    if arguments.json:
        _print_json(describe(registry, entry) if entry_asked else describe_registry(registry))
    elif entry_asked:
        _print_entry(console, registry, entry)
    else:
        _print_registry(console, registry)


def cost_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of ``ovi.commands.cost.table`` for the model that the arguments compose.

    Raises:
        OviError: for another registry than fusion, or a model that does not compose.
    """
    if arguments.what != "fusion":
        raise OviError(f"--cost is there for 'fusion', not for {arguments.what or 'all registries'!r}")
    from ovi.commands.cost import costs, size_of, table
    from ovi.commands.model import model_builder
    from ovi.fusion import FUSIONS

    build, config = model_builder(arguments.overrides)
    size = size_of(config)
    if arguments.latent:
        size = replace(size, latent=tuple(arguments.latent))
    if arguments.audio_tokens:
        size = replace(size, audio_tokens=arguments.audio_tokens)
    found = costs(
        FUSIONS, lambda name: build(name, size.layout), size, rounds=arguments.rounds, device=arguments.device
    )
    return table(found, size)


def describe_registry(registry: Registry) -> dict[str, Any]:
    """A registry as plain data."""
    entries = {name: describe(registry, name) for name in registry}
    return {"doc": registry.doc, "group": registry.group, "entries": entries}


def describe(registry: Registry, name: str) -> dict[str, Any]:
    """An entry as plain data: ``summary``, ``doc``, ``target``, ``override``, ``wiring`` and ``knobs``.

    Raises:
        UnknownNameError: when the registry has no such entry.
    """
    node, docs = registry.node(name), argument_docs(registry[name])
    knobs = {
        knob.name: {
            "default": None if knob.required else node[knob.name],
            "required": knob.required,
            "annotation": knob.annotation,
            "doc": docs.get(knob.name, ""),
        }
        for knob in registry.knobs(name).values()
    }
    return {
        "summary": registry.summary(name),
        "doc": inspect.getdoc(registry[name]) or "",
        "target": node["_target_"],
        "override": f"{registry.group}={name}",
        "wiring": {argument: docs.get(argument, "") for argument in registry.wiring(name)},
        "knobs": knobs,
    }


def argument_docs(component: Callable[..., Any]) -> dict[str, str]:
    """Text of each argument in the ``Args:`` section of a docstring, of a class or of its ``__init__``."""
    own = inspect.getdoc(component) or ""
    init = inspect.getdoc(component.__init__) or "" if inspect.isclass(component) else ""
    return {**_args_section(init), **_args_section(own)}


def _args_section(doc: str) -> dict[str, str]:
    section = re.search(r"^Args:\n((?:[ ]+.*\n|\n)*)", doc + "\n", re.MULTILINE)
    docs: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc("\n" + section[1]).splitlines() if section else []:
        start = re.match(r"\*{0,2}(\w+)(?: ?\([^)]*\))?: *(.*)", line)
        if start:
            name = start[1]
            docs[name] = start[2]
        elif name:
            docs[name] = f"{docs[name]} {line.strip()}".strip()
    return docs


def _registry(name: str) -> Registry:
    if name not in REGISTRIES:
        raise OviError(
            f"no registry is called {name!r}.{did_you_mean(name, REGISTRIES)} "
            f"There are: {', '.join(sorted(REGISTRIES)) or 'none'}"
        )
    return REGISTRIES[name]


def _print_registry(console: Console, registry: Registry) -> None:
    # Text everywhere: docstrings are full of [B, H, L, d], which rich would take for markup.
    console.print(Text.assemble((registry.name, "bold"), f": {registry.doc}   ({registry.group}=NAME)"))
    table = _grid(3)
    for name in registry:
        knobs = ", ".join(map(str, registry.knobs(name).values()))
        table.add_row(Text(name, style="cyan"), Text(registry.summary(name)), Text(knobs, style="dim"))
    console.print(Padding(table, (0, 0, 1, 2)) if len(registry) else Text("  nothing registered\n"))


def _print_entry(console: Console, registry: Registry, name: str) -> None:
    entry = describe(registry, name)
    console.print(Text.assemble((f"{registry.name}={name}", "bold"), f"   {entry['target']}\n"))
    console.print(Text(_without_args(entry["doc"]) + "\n"))
    if entry["wiring"]:
        table = _grid(2)
        for argument, doc in entry["wiring"].items():
            table.add_row(Text(argument, style="cyan"), Text(doc))
        console.print(Text("wiring, given by the code"), Padding(table, (0, 0, 1, 2)), sep="\n")
    if entry["knobs"]:
        table = _grid(2)
        for knob in registry.knobs(name).values():
            kind = f": {knob.annotation}" if knob.annotation else ""
            default = " (required)" if knob.required else f" = {knob.default!r}"
            declared = Text.assemble((knob.name, "cyan"), kind, default)
            table.add_row(declared, Text(entry["knobs"][knob.name]["doc"]))
        console.print(Text("knobs"), Padding(table, (0, 0, 1, 2)), sep="\n")
    prefix = registry.group.replace("/", ".")
    settings = " ".join(f"{prefix}.{knob}=..." for knob in entry["knobs"])
    console.print(Text(f"to use it:  {entry['override']} {settings}".rstrip()), soft_wrap=True)


def _print_costs(console: Console, rows: list[dict[str, Any]]) -> None:
    heads = ("fusion", "parameters", "FLOPs forward", "of none", "kept for backward", "of none", "forward", "step")
    table = Table(*heads, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    refused = []
    for row in rows:
        if row["error"]:
            refused.append(f"{row['name']}: {row['error']}")
            continue
        ratios = (f"{row[k]:.2f}x" if row[k] else "-" for k in ("forward_ratio", "step_ratio"))
        table.add_row(
            Text(row["name"], style="cyan"),
            f"{row['parameters'] / 1e6:,.2f} M",
            f"{row['forward_flops'] / 1e9:,.2f} G",
            f"{row['flops_ratio']:.3f}x",
            f"{row['activation_bytes'] / 2**20:,.1f} MiB",
            f"{row['activation_ratio']:.3f}x",
            *ratios,
        )
    console.print(Text(rows[0]["size"]), table, sep="\n")
    for line in refused:
        console.print(Text(line))
    if not rows[0]["forward_s"]:
        console.print(Text("times: not measured here, the model is too large for this machine (or --rounds 0)"))


def _grid(columns: int) -> Table:
    """Columns that wrap instead of being cut; the first, a name, keeps its width."""
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(overflow="fold", no_wrap=columns == 3, min_width=8)
    for _ in range(columns - 1):
        table.add_column(overflow="fold")
    return table


def _without_args(doc: str) -> str:
    return re.sub(r"^Args:\n(?:[ ]+.*\n|\n)*", "", doc + "\n", flags=re.MULTILINE).strip()


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, default=str))
