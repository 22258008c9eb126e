"""``stages=paper`` as composed: what order the stages have, and which sizes pass."""

from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from ovi.commands.components import load_components, store_components
from ovi.data.media import Clip, write_clip
from ovi.data.stages.base import Candidate, Rejected, run_stages


def judged(path: Path, *words: str) -> Candidate | Rejected:
    """A file's candidate after those of the paper's stages that look at its picture's size."""
    load_components()
    store_components()
    with initialize_config_module(config_module="ovi.conf", version_base=None):
        config = compose("encode", overrides=["stages=paper", f"out={path.parent}", *words])
        chosen = {name: config.stages[name] for name in config.stages if name in ("borders", "size")}
        stages = {name: instantiate(node, _convert_="all") for name, node in chosen.items() if node is not None}
    rejected: list[Rejected] = []
    kept = list(run_stages(stages, [Candidate(path, "a")], rejected.append))
    (one,) = kept + rejected
    return one


@pytest.fixture(scope="module")
def letterboxed(tmp_path_factory):
    """A film of 96x128 pixels whose picture is 72x128."""
    frames = np.zeros((8, 96, 128, 3), np.uint8)
    frames[:, 12:84] = np.random.default_rng(0).integers(90, 250, (8, 72, 128, 1))
    path = tmp_path_factory.mktemp("films") / "film.mp4"
    write_clip(path, Clip(frames, np.zeros(16000, np.float32), 8, 16000))
    return path


def test_the_size_that_counts_is_that_without_borders(letterboxed):
    small = judged(letterboxed, "height=80", "width=80")
    assert isinstance(small, Rejected)
    assert (small.stage, small.reason, small.candidate.figures["height"], small.threshold) == ("size", "small", 72, 80)
    assert isinstance(judged(letterboxed, "height=80", "width=80", "stages.borders=null"), Candidate)


@pytest.mark.parametrize(
    ("height", "width", "passes"), [(72, 128, True), (73, 128, False), (72, 129, False), (64, 64, True)]
)
def test_no_clip_is_enlarged(letterboxed, height, width, passes):
    assert isinstance(judged(letterboxed, f"height={height}", f"width={width}"), Candidate) == passes
