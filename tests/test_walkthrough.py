"""The README's 'Add a fusion', done as it says: one file outside the tree, made known both ways, listed and trained."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ovi.block import Block
from ovi.commands.components import load_config_dir
from ovi.commands.restore import read_checkpoint
from ovi.fusion import FUSIONS
from ovi.stream import Control
from plain_pair import pair, randomise, run, without_exchange

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = dict(
    re.findall(r"^```(\w+)\n(.*?)^```", README.partition("## Add a fusion\n")[2], re.DOTALL | re.MULTILINE)[:3]
)
MODULE, CLASS, NAME = "my_fusion", "PromptFusion", "prompt"


def test_a_strategy_is_at_most_fifteen_lines():
    """Of code: blank lines, comments and the docstring, which `ovi list` shows, aside."""
    code = BLOCKS["python"]
    statements = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Expr)]
    texts = [node for node in statements if isinstance(node.value, ast.Constant)]
    docstrings = {line for node in texts for line in range(node.lineno, node.end_lineno + 1)}
    numbered = enumerate(code.splitlines(), 1)
    lines = [n for n, line in numbered if line.strip() and line.strip()[0] != "#" and n not in docstrings]
    assert len(texts) == 1
    assert 10 < len(lines) <= 15


@pytest.fixture
def fusion():
    """The class, and no trace of it afterwards."""
    module = ModuleType(MODULE)
    exec(BLOCKS["python"], module.__dict__)
    yield FUSIONS[NAME]
    del FUSIONS._entries[NAME]


@torch.no_grad()
def test_it_keeps_what_a_fusion_promises(fusion):
    p = pair(dtype=torch.float32)
    made = randomise(fusion(p.video, p.audio, scale=0.5))
    off = without_exchange(p)
    for gate in (0.0, torch.zeros(2)):
        for got, plain in zip(run(made, p, Control(gate, gate)), off):
            assert torch.equal(got, plain)
        hears, sees = run(made, p, Control(1.0, gate)), run(made, p, Control(gate, 1.0))
        assert [torch.equal(x, y) for x, y in zip(hears, off)] == [False, True]
        assert [torch.equal(x, y) for x, y in zip(sees, off)] == [True, False]
    with torch.device("meta"):
        count = sum(q.numel() for q in fusion(Block(48, 3, 8), Block(24, 2, 8)).parameters())
    assert count == 2 * 48 * 24 + 48 + 24


def outside(folder, way):
    """Write the module outside the tree and make it known; returns ``--config-dir`` where that is the way."""
    folder.mkdir()
    (folder / f"{MODULE}.py").write_text(BLOCKS["python"])
    if way == "entry point":
        # What installing a distribution with the README's pyproject lines leaves in site-packages.
        groups = tomllib.loads(BLOCKS["toml"])["project"]["entry-points"]
        lines = [
            f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups.items()
        ]
        about = folder / "my_fusion-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-fusion\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text("\n".join(lines))
        return []
    root, name = re.match(r"# ([^/\n]+)/(\S+)\n", BLOCKS["yaml"]).groups()
    file = folder / root / name
    file.parent.mkdir(parents=True)
    file.write_text(BLOCKS["yaml"])
    return ["--config-dir", str(folder / root)]


def ovi(folder, *words, status=0):
    code = "import sys; from ovi.commands.main import main; main(sys.argv[1:])"
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = done.stdout + done.stderr
    assert done.returncode == status, f"ovi {' '.join(words)}\n{said[-4000:]}"
    return said


SMALL = ["model.video.dim=24", "model.video.num_heads=2", "model.video.num_blocks=2", "model.video.ffn_dim=40"]
SHORT = ["trainer.max_steps=2", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "data.batch_size=2"]
PLACE = ["callbacks.joint_eval=null", "hydra.run.dir=run"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["entry point", "config dir"])
def test_it_is_listed_and_trained_from_outside_the_tree(way, tiny_shards, tmp_path):
    folder = tmp_path / "elsewhere"
    where = outside(folder, way)
    listed = ovi(folder, "list", f"fusion={NAME}", *where)
    assert f"{MODULE}.{CLASS}" in listed
    assert "of what crosses" in listed
    assert "model/fusion=prompt model.fusion.scale=..." in listed

    words = [f"model/fusion={NAME}", "model.fusion.scale=0.5", f"data.path={tiny_shards}", *SMALL, *SHORT, *PLACE]
    ovi(folder, "train", *where, *words)
    checkpoint = read_checkpoint(folder / "run")
    assert checkpoint["ovi"]["model"]["fusion"] == {"_target_": f"{MODULE}.{CLASS}", "_partial_": True, "scale": 0.5}
    weights = {k: v for k, v in checkpoint["state_dict"].items() if ".fusions." in k}
    expected = {
        f"model.fusions.{i}.{part}.{what}" for i in (0, 1) for part in ("hear", "see") for what in ("weight", "bias")
    }
    assert set(weights) == expected
    assert all(w.isfinite().all() and w.abs().max() > 0 for w in weights.values())
    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)
    assert "val/loss" in events.Tags()["scalars"]


@pytest.mark.slow
def test_a_folder_that_names_what_cannot_be_imported_is_refused(tmp_path):
    folder = tmp_path / "elsewhere"
    where = outside(folder, "config dir")
    (folder / f"{MODULE}.py").rename(folder / "moved.py")
    said = ovi(folder, "list", "fusion", *where, status=1)
    assert f"_target_ '{MODULE}.{CLASS}' cannot be imported" in said
    assert "PYTHONPATH" in said
    assert "Traceback" not in said
    said = ovi(folder, "list", "fusion", "--config-dir", "nowhere", status=1)
    assert "--config-dir nowhere: there is no such folder" in said


def test_settings_alone_in_a_folder_are_passed_over(tmp_path):
    (tmp_path / "model" / "fusion").mkdir(parents=True)
    (tmp_path / "model" / "fusion" / "strong.yaml").write_text("scale: 2.0\n")
    load_config_dir(tmp_path)
