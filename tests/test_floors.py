"""Who may import whom: the floors of the house, read off the import statements.

A new module or folder of ``ovi`` needs a line in ``MAY_IMPORT``: saying on which floor it stands is part of adding it.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import ovi

ROOT = Path(ovi.__file__).parent

GROUND = {"errors", "registry", "clock", "layout"}
TENSORS = GROUND | {"stream", "attention", "rope", "lean"}
NETWORK = TENSORS | {"block", "patch", "tower", "fusion", "recompute", "plan", "rope_scaling", "geometry", "twin"}
MATHS = GROUND | {"flow", "guidance", "sampling"}
DATA = GROUND | {"codecs", "data"}
METRICS = GROUND | {"metrics"}
BELOW_TRAINING = NETWORK | MATHS | DATA | METRICS | {"checkpoint", "generate", "attention_maps", "adapters"}

MAY_IMPORT = {
    "errors": set(),
    "registry": {"errors"},
    "clock": {"errors"},
    "layout": GROUND,
    "stream": TENSORS,
    "attention": TENSORS,
    "rope": TENSORS,
    "lean": TENSORS,
    "recompute": GROUND,
    "plan": GROUND,
    "rope_scaling": GROUND,
    "block": TENSORS,
    "patch": TENSORS,
    "fusion": TENSORS | {"block", "fusion"},  # a strategy sees the block's interface, never a tower
    "tower": TENSORS | {"block", "patch"},
    "geometry": TENSORS | {"patch", "tower"},
    "twin": NETWORK,
    "attention_maps": NETWORK,
    "adapters": GROUND,
    "flow": MATHS,  # the maths knows no network
    "guidance": MATHS,
    "sampling": MATHS,
    "codecs": DATA - {"data"},
    "data": DATA,
    "metrics": METRICS,
    "checkpoint": BELOW_TRAINING,
    "generate": BELOW_TRAINING,
    "runs": METRICS | {"data", "runs"},  # folders of runs, read: no training, no network
    "report": GROUND | {"data", "runs", "report"},
    "training": BELOW_TRAINING | {"training"},
    "commands": BELOW_TRAINING | {"training", "runs", "report", "commands", ""},  # "" is the package itself
    "notebook": BELOW_TRAINING | {"training", "runs", "report", "commands", "notebook"},
    "": {"errors", "fusion", "notebook"},  # for type checkers alone: names are loaded when asked for
}

# A library and the folders that may know it.
ONLY_IN = {
    "hydra": ["commands"],
    "omegaconf": ["commands"],
    "lightning": ["training", "commands"],
    "lightning_fabric": ["training", "commands"],
    "pytorch_lightning": ["training", "commands"],
    "webdataset": ["data"],
    "tensorboard": ["training/callbacks"],
    "torch.utils.tensorboard": ["training/callbacks"],
}
STDLIB_ONLY = {"errors", "registry", "clock"}
HEAVY = {"laion_clap", "diffusers", "transformers", "ray", "flash_attn"}
SIDE_EFFECTS = {
    "print": "printing",
    "os.environ": "the environment",
    "os.getenv": "the environment",
    "torch.manual_seed": "a global seed",
    "random.seed": "a global seed",
    "np.random.seed": "a global seed",
}


class Import(NamedTuple):
    """An imported module, its line, and whether importing the file runs it."""

    module: str
    line: int
    at_import: bool


FILES = sorted(f for f in ROOT.rglob("*.py") if f.relative_to(ROOT).parts[0] != "conf")
UPPER = ("training", "commands", "notebook")


def unit(file: Path) -> str:
    """First part of a module's path below ``ovi``; empty for the package itself."""
    return file.relative_to(ROOT).with_suffix("").parts[0].removeprefix("__init__")


def imports(file: Path) -> Iterator[Import]:
    """Every import of a file, those inside functions too."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = ["ovi", *file.relative_to(ROOT).parts][: -child.level] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                # `from ovi import tower` imports ovi.tower; elsewhere the module alone says enough.
                names = [f"{module}.{alias.name}" for alias in child.names] if module == "ovi" else [module]
                yield from (Import(name, child.lineno, at_import) for name in names)
            else:
                lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, at_import and not lazy and not typing)

    return walk(ast.parse(file.read_text()), True)


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


files = pytest.mark.parametrize("file", FILES, ids=name_of)


def is_of(module: str, library: str) -> bool:
    return module == library or module.startswith(library + ".")


def test_every_module_stands_on_a_floor():
    assert {unit(f) for f in FILES} - {""} <= set(MAY_IMPORT), "add the new module to MAY_IMPORT"


@files
def test_imports_go_down(file):
    mine = unit(file)
    for found in imports(file):
        if is_of(found.module, "ovi"):
            theirs = found.module.partition(".")[2].partition(".")[0]
            assert theirs in MAY_IMPORT.get(mine, set()), f"{file}:{found.line}: {mine} may not import {found.module}"


@files
def test_libraries_stay_in_their_folder(file):
    path = file.relative_to(ROOT).as_posix()
    for found in imports(file):
        for library, folders in ONLY_IN.items():
            if is_of(found.module, library):
                assert any(path.startswith(f + "/") for f in folders), (
                    f"{file}:{found.line}: {library} only in {folders}"
                )


@files
def test_heavy_libraries_are_imported_where_they_are_used(file):
    for found in imports(file):
        if found.at_import:
            heavy = [library for library in HEAVY if is_of(found.module, library)]
            assert not heavy, f"{file}:{found.line}: import {heavy[0]} inside the function that uses it"


@pytest.mark.parametrize("name", sorted(STDLIB_ONLY))
def test_ground_floor_is_stdlib(name):
    for found in imports(ROOT / f"{name}.py"):
        assert found.module.split(".")[0] in {*sys.stdlib_module_names, "ovi"}, f"{name}.py:{found.line}"


@pytest.mark.parametrize("file", [f for f in FILES if unit(f) not in UPPER], ids=name_of)
def test_no_side_effects_below_training(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            pytest.fail(f"{file}:{node.lineno}: .cuda() below training; take a device")
        if isinstance(node, ast.Name | ast.Attribute):
            name = ast.unparse(node).removeprefix("builtins.")
            assert name not in SIDE_EFFECTS, f"{file}:{node.lineno}: {SIDE_EFFECTS.get(name)} below training"


def test_the_reader_sees_what_it_must(tmp_path, monkeypatch):
    """The checks above are only worth something if the import reader misses none of the forms."""
    monkeypatch.setattr("test_floors.ROOT", tmp_path)
    file = tmp_path / "fusion" / "new.py"
    file.parent.mkdir()
    file.write_text(
        "import ray.data as r\nfrom ovi import tower\nfrom ..twin import TwinDiT\nfrom .base import FUSIONS\n"
        "class C:\n    import hydra\n    def f(self):\n        from diffusers import X\n"
        "if TYPE_CHECKING:\n    import transformers\ntry:\n    import lightning\nexcept ImportError:\n    pass\n"
    )
    assert [(i.module, i.at_import) for i in imports(file)] == [
        ("ray.data", True),
        ("ovi.tower", True),
        ("ovi.twin", True),
        ("ovi.fusion.base", True),
        ("hydra", True),
        ("diffusers", False),
        ("transformers", False),
        ("lightning", True),
    ]
