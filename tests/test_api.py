"""``import ovi``: light, complete, and the same as the command line."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ovi
from latent_sets import AUDIO, VIDEO, write_set
from ovi.clock import Clock
from ovi.commands.components import component_modules, load_components
from ovi.commands.sample import sampling_asked
from ovi.data.media import Clip, probe, write_clip
from ovi.errors import OviError
from ovi.fusion import FUSIONS, Fusion, NoFusion, OviFusion
from ovi.layout import LatentLayout
from ovi.notebook.experiment import _new_folder
from ovi.registry import REGISTRIES
from ovi.stream import Control, apply_gate

SMALL = ("model.video.dim=24", "model.video.num_heads=2", "model.video.num_blocks=2", "model.video.ffn_dim=40")
QUIET = ("callbacks.joint_eval=null", "callbacks.attention_in_time=null", "callbacks.progress=null")
QUIET += ("callbacks.throughput=null", "callbacks.learning_rate=null", "+trainer.enable_progress_bar=false")


@pytest.fixture(scope="module")
def trained(tiny_shards, tmp_path_factory):
    run = ovi.compose(
        f"data.path={tiny_shards}", *SMALL, *QUIET, "data.batch_size=4", "trainer.max_steps=3", "seed=3",
        "trainer.accelerator=cpu", "flow.text_dropout=0.0", "generation.num_steps=2",
    )  # fmt: skip
    return run.train(tmp_path_factory.mktemp("api") / "run")


def test_import_loads_nothing():
    """In a process of its own: ``import ovi`` and the command's ``--help`` need no torch and no Hydra."""
    code = (
        "import sys, ovi; dir(ovi)\n"
        "from ovi.commands.main import usage; usage()\n"
        "heavy = {'torch', 'hydra', 'lightning', 'IPython', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'compose' in dir(ovi) and 'FUSIONS' in dir(ovi)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_name_is_there():
    for name in (*ovi.__all__, *dir(ovi)):
        assert getattr(ovi, name) is not None
    assert ovi.checkpoint.load_reference is not None
    with pytest.raises(AttributeError, match="no attribute 'compos'"):
        ovi.compos  # noqa: B018
    with pytest.raises(KeyError, match="Did you mean 'bridge'"):
        ovi.FUSIONS["brigde"]


def test_every_registry_is_there_with_all_its_entries():
    load_components()
    shown = {getattr(ovi, name).name: name for name in dir(ovi) if name.isupper()}
    assert shown.keys() == REGISTRIES.keys()
    for registry, name in shown.items():
        modules = set(component_modules(name))
        missing = {REGISTRIES[registry][entry].__module__ for entry in REGISTRIES[registry]} - modules
        missing = {module for module in missing if module.startswith("ovi.")}  # other tests register components too
        assert not missing, f"ovi.{name} alone would not import {missing}"


def test_composed_as_on_the_command_line(capsys, monkeypatch):
    from omegaconf import OmegaConf

    from ovi.commands.main import main

    words = ["experiment=demo", "model/fusion=bridge", "model.fusion.gate=true", "trainer.max_steps=7"]
    monkeypatch.setattr(sys, "argv", ["ovi", "train"])
    main(["train", *words, "--cfg", "job"])
    assert OmegaConf.create(capsys.readouterr().out) == ovi.compose(*words).config


def test_what_is_overridden_is_told():
    run = ovi.compose("model/fusion=bridge", "model.fusion.gate=true", "callbacks.ema=null", "seed=4")
    default = FUSIONS.knobs("bridge")["gate"].default
    assert run.overridden == {
        "model.fusion.gate": (True, default), "callbacks.ema": (None, "{...}"), "seed": (4, 0),
    }  # fmt: skip
    assert run.choices["model/fusion"] == "bridge"
    text = repr(run)
    assert re.search(r"model/fusion +bridge +ovi", text)
    assert "<th" in run._repr_html_()
    assert run.but("seed=5").config.seed == 5
    assert ovi.compose().overridden == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model/fusion=brigde"], "no model/fusion is called 'brigde'. Did you mean 'bridge'"),
        (["+model.fusion.gaet=true", "model/fusion=bridge"], "has no knob 'gaet'. Did you mean 'gate'"),
        (["trainer.max_stepss=3"], "no setting 'trainer.max_stepss'. Did you mean 'max_steps'"),
        (["seed"], "cannot read the override"),
    ],
)
def test_errors_are_ours_and_short(words, said):
    with pytest.raises(OviError, match=re.escape(said)) as caught:
        ovi.compose(*words)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert len(caught.traceback) <= 6


def test_a_running_hydra_is_left_alone():
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_module("ovi.conf", version_base="1.3"):
        ovi.compose("seed=2")
        assert GlobalHydra.instance().is_initialized()
        assert compose("train", ["seed=9"]).seed == 9


def test_a_built_model_is_that_of_training(tiny_shards):
    """Drawn with the experiment's seed, whatever was drawn before; nothing else is reseeded."""
    layout = LatentLayout(4, 6, 8, 5, Clock(fps=8, video_stride=1, causal_first_frame=False))
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    a, b = ovi.build("seed=5", *SMALL, layout=layout), ovi.build(ovi.compose("seed=5", *SMALL), layout=layout)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    other = ovi.build("seed=6", *SMALL, layout=layout)
    assert not torch.equal(a.video.blocks[0].self_attn.q.weight, other.video.blocks[0].self_attn.q.weight)
    from_set = ovi.build(*SMALL, f"data.path={tiny_shards}")
    assert from_set.video.patch_embedding.channels == ovi.latents(tiny_shards).layout.video_channels
    with pytest.raises(OviError, match=r"data\.path is not set: give layout"):
        ovi.build("model/fusion=none")
    with pytest.raises(OviError, match=r"memory://nowhere"):  # asked, not taken for a folder
        ovi.build("data.path=memory://nowhere")
    with pytest.raises(OviError, match=r"data\.path is nowhere, where nothing is"):
        ovi.build("data.path=nowhere")


def test_training_leaves_a_run_like_any_other(trained, tiny_shards):
    folder = trained.folder
    summary = json.loads((folder / "summary.json").read_text())
    assert trained.step == summary["steps"] == 3
    assert str(folder / "checkpoints") in (folder / "config.yaml").read_text()
    assert trained.metrics["val/loss"] == pytest.approx(summary["metrics"]["val/loss"])
    assert "trained" in repr(trained)
    curves = trained.curves()
    assert float(curves[curves.tag == "val/loss"].value.iloc[-1]) == pytest.approx(trained.metrics["val/loss"])
    again = ovi.load(folder / "checkpoints" / "last.ckpt")
    state = again.model.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in trained.model.state_dict().items())
    assert again.folder == folder
    with pytest.raises(OviError, match="there is no such checkpoint"):
        ovi.load("nowhere")


def test_a_folder_is_never_two_runs(tiny_shards, tmp_path, monkeypatch):
    """Trained again in its folder, a run is the new one alone, but not for settings that cannot be trained."""
    words = (f"data.path={tiny_shards}", *SMALL, *QUIET, "trainer.accelerator=cpu", "data.batch_size=2")
    words += ("+trainer.limit_val_batches=0", "trainer.log_every_n_steps=1")
    first = ovi.compose(*words, "trainer.max_steps=2", "seed=1").train(tmp_path / "run")
    (tmp_path / "run" / "mine.txt").write_text("kept")
    for wrong, said in (
        ("init_from=nowhere", "no such checkpoint"),
        ("callbacks.checkpoint=null", "cannot be null here"),
    ):
        with pytest.raises(OviError, match=said):
            ovi.compose(*words, wrong).train(tmp_path / "run")
    assert ovi.load(tmp_path / "run").step == 2
    again = ovi.compose(*words, "trainer.max_steps=1", "seed=2").train(tmp_path / "run")
    assert (again.step, again.run.seed, int(again.curves().step.max())) == (1, 2, 0)
    name = "video.blocks.0.self_attn.q.weight"
    assert not torch.equal(again.model.state_dict()[name], first.model.state_dict()[name])
    assert (tmp_path / "run" / "mine.txt").is_file()
    # Without a folder each training has one of its own, however soon it follows.
    monkeypatch.chdir(tmp_path)
    run, places = ovi.compose("name=soon"), []
    for _ in range(3):
        places.append(_new_folder(run))
        places[-1].mkdir(parents=True)
    assert len(set(places)) == 3
    assert {str(place.parent) for place in places} == {"runs/soon"}


def test_a_run_of_another_machine(trained, tmp_path, monkeypatch):
    """Codecs are looked for where one says, and a checkpoint alone needs no run around it."""
    with pytest.raises(OviError, match="has no weights to look for"):
        ovi.load(trained.folder, codec_paths={"video": "elsewhere"})
    (tmp_path / "last.ckpt").write_bytes((trained.folder / "checkpoints" / "last.ckpt").read_bytes())
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    monkeypatch.chdir(tmp_path)
    assert ovi.load("last.ckpt").run is None


def test_samples_depend_on_seed_and_number_alone(trained):
    two = trained.sample(["a ball", "two balls"], seed=1)
    assert two.captions == ["a ball", "two balls"]
    assert two[0].frames.shape == (12, 32, 32, 3)
    one = trained.sample("a ball", seed=1)
    assert np.abs(one[0].frames.astype(int) - two[0].frames).max() <= 1
    assert np.abs(trained.sample("a ball", seed=2)[0].waveform - one[0].waveform).max() > 1e-4
    assert trained.sample("a ball", "generation/sampler=euler", steps=1)[0].frames.shape == (12, 32, 32, 3)
    with pytest.raises(OviError, match="trained without text dropout"):
        trained.sample("a ball", "generation/guidance=cfg")
    with pytest.raises(OviError, match="needs a prompt"):
        trained.sample([])


OWN = {
    "_target_": "ovi.generate.Generator",
    "num_steps": 7,
    "seed": 3,
    "batch_size": 5,
    "passes_at_once": None,
    "sampler": {"_target_": "own.sampler", "shift": 1.0},
    "guidance": {"_target_": "own.cfg", "video_scale": 4.0},
}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["generation.num_steps=25"], {"num_steps": 25}),  # the default of `ovi sample`, and asked for
        (["negative_audio=noise", "height=64"], {}),
        (["generation.sampler.shift=5"], {"sampler": {"_target_": "own.sampler", "shift": 5}}),
        (["generation.sampler={shift: 5.0}"], {"sampler": {"_target_": "own.sampler", "shift": 5.0}}),
        (["generation.guidance.video_scale=6"], {"guidance": {"_target_": "own.cfg", "video_scale": 6}}),
    ],
)
def test_overrides_change_what_they_name_in_a_runs_own_way(words, expected):
    asked = sampling_asked(words, OWN)
    assert asked.generation == {**OWN, **expected}
    assert asked.negatives == ("", "noise" if "negative_audio=noise" in words else "")
    assert asked.size == (None, 64 if "height=64" in words else None, None)


def test_another_component_is_taken_whole_and_a_set_takes_the_place_of_all():
    usual = sampling_asked([]).generation
    asked = sampling_asked(["generation.guidance.video_scale=6", "generation/guidance=cfg"], OWN).generation
    assert asked["sampler"] == OWN["sampler"]
    assert asked["guidance"]["_target_"] != OWN["guidance"]["_target_"] != usual["guidance"]["_target_"]
    assert asked["guidance"]["video_scale"] == 6
    whole = sampling_asked(["generation={num_steps: 5}"], OWN).generation
    assert whole == {**usual, "num_steps": 5}
    demo = sampling_asked(["set=demo_sampling"], OWN).generation
    assert demo == sampling_asked(["set=demo_sampling"]).generation
    assert (demo["num_steps"], demo["batch_size"], demo["seed"]) == (40, 32, usual["seed"])
    assert sampling_asked(["set=ovi_960p_10s"], OWN).size == (241, 960, 960)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("device=cpu", "device is an argument beside them"),
        ("attention=flex", "overrides here set generation"),
        ("~generation.sampler", "overrides here set generation"),
        ("generation.sampler.shfit=2", "no setting 'generation.sampler.shfit'.* there is shift"),
        ("generation.num_steps", "num_steps"),
    ],
)
def test_overrides_that_would_do_nothing_are_refused(word, message):
    with pytest.raises(OviError, match=message):
        sampling_asked([word], OWN)


def test_latents_of_several_shapes_and_of_sound_alone(tmp_path):
    """A batch has one shape, and a clip pictures and sound: what has not is named."""
    alone = {"video": (*VIDEO[:1], 0, 0, 0), "audio": AUDIO}
    write_set(tmp_path / "set", {"train": [2, 2]}, shapes=[None, alone])
    data = ovi.latents(tmp_path / "set")
    assert len(data.batch([0, 1])) == len(data.batch([2, 3])) == 2
    with pytest.raises(OviError, match=r"several shapes.* \[1\] are like sample 1"):
        data.batch([1, 2])
    with pytest.raises(OviError, match="have no pictures"):
        data.clips([2, 3])


def test_codecs_of_are_for_weights_alone(trained):
    with pytest.raises(OviError, match="names its codecs"):
        ovi.load(trained.folder, codecs_of="elsewhere")


def test_weights_alone_want_codecs(published_run, tiny_shards, tmp_path):
    from ovi.checkpoint import save_reference

    save_reference(ovi.load(published_run).model, tmp_path / "w.safetensors", allow_differences=True)
    with pytest.raises(OviError, match="give codecs_of=FOLDER"):
        ovi.load(tmp_path / "w.safetensors")
    loaded = ovi.load(tmp_path / "w.safetensors", codecs_of=tiny_shards)
    assert loaded.step is None
    assert loaded.sample("a ball", steps=1)[0].frames.shape == (12, 32, 32, 3)
    with pytest.raises(OviError, match="it has no run"):
        loaded.curves()


def test_latents_to_look_at(tiny_shards):
    data = ovi.latents(tiny_shards)
    batch = data.batch([2, 0])
    assert [c == data.batch(1).captions[0] for c in batch.captions] == [False, True]
    assert len(data.clips(3)) == len(data.batch(3)) == 3
    clip = data.clips([2])[0]
    frames, waveform = data.codecs.decode(batch.video[:1], batch.audio[:1])
    assert np.array_equal(clip.frames, frames[0].numpy())
    assert np.array_equal(clip.waveform, waveform[0].numpy())
    with pytest.raises(OviError, match="has samples 0 to"):
        data.batch([999])
    with pytest.raises(OviError, match="splits: train, val"):
        data.batch(1, split="test")


@pytest.fixture
def clip():
    seconds = np.arange(16000) / 16000
    wave = (0.5 * np.sin(2 * np.pi * 1000 * seconds) * (seconds > 0.5)).astype(np.float32)
    return Clip(np.full((12, 32, 32, 3), 80, np.uint8), wave, 12, 16000)


def test_a_player_holds_its_clip_with_sound(clip, tmp_path):
    html = ovi.show([clip, clip], ["<b>one</b>", "two"])._repr_html_()
    assert html.count("<video controls") == 2
    assert "<b>one" not in html
    assert "&lt;b&gt;one&lt;/b&gt;" in html
    data = re.search(r'src="data:video/mp4;base64,([^"]+)"', html)[1]
    file = tmp_path / "held.mp4"
    file.write_bytes(base64.b64decode(data))
    found = probe(file)
    assert (found.has_video, found.has_audio, found.width, found.sample_rate) == (True, True, 32, 16000)
    assert found.duration_s == pytest.approx(1.0)
    files = (ovi.show(clip) + ovi.show(clip)).save(tmp_path / "clips")
    assert [f.name for f in files] == ["000.mp4", "001.mp4"]


def test_the_spectrogram_is_right(clip):
    """A full-scale sine of half the amplitude: -6 dB, at its frequency, from its beginning on."""
    from ovi.notebook.pictures import spectrogram_db

    times_s, hz, level = spectrogram_db(clip)
    late = (times_s > 0.6) & (times_s < 0.9)
    assert hz[level[:, late].mean(1).argmax()] == pytest.approx(1000, abs=16)
    assert level[:, late].max() == pytest.approx(20 * np.log10(0.5), abs=0.3)
    assert level[:, times_s < 0.4].max() < -80
    figure = ovi.picture(clip, marks_s=[0.5])
    assert [line.get_xdata()[0] for line in figure.axes[1].lines] == [0.5]
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim() == (0, 1)


def test_ipython_shows_our_objects(clip, tiny_shards):
    pytest.importorskip("IPython")
    from IPython.core.interactiveshell import InteractiveShell

    from ovi.notebook.reprs import register

    shell = InteractiveShell()
    register(shell)
    data = ovi.latents(tiny_shards)
    model = ovi.build(*SMALL, layout=data)
    shown = {
        "12 frames of 32x32": clip, "latent frames/s": data.layout, "LatentBatch of 2": data.batch(2),
        "OviFusion in 2 pairs": model, "attention": ovi.FUSIONS, "12 frames of 32x32, 1.5 s": data.index,
    }  # fmt: skip
    for words, thing in shown.items():
        formats = shell.display_formatter.format(thing)[0]
        assert "text/html" in formats, words
        assert words in formats["text/plain"], words
    assert shell.display_formatter.format(ovi.picture(clip))[0]["image/png"][:4] == b"\x89PNG"


@pytest.mark.parametrize("fusion", list(FUSIONS))
def test_every_fusion_passes_its_check(fusion):
    report = ovi.check_fusion(FUSIONS[fusion])
    assert set(report.failures) == ({"on, something crosses"} if fusion == "none" else set()), report


class Leaky(OviFusion):
    """Ignores its gates."""

    def forward(self, v, a, video, audio, control):
        return super().forward(v, a, video, audio, Control())


class Swapped(OviFusion):
    """Takes one direction's gate for the other's."""

    def forward(self, v, a, video, audio, control):
        return super().forward(v, a, video, audio, Control(control.v2a, control.a2v))


class Idle(NoFusion):
    """Has weights that nothing uses."""

    def __init__(self, video, audio):
        super().__init__(video, audio)
        self.unused = nn.Linear(2, 2)


class Mixing(Fusion):
    """Video hears the mean over the batch, padding included, and asks the device for a number."""

    def __init__(self, video, audio):
        super().__init__(video, audio)
        self.hear, self.see = nn.Linear(audio.dim, video.dim), nn.Linear(video.dim, audio.dim)

    def forward(self, v, a, video, audio, control):
        heard = self.hear(a.tokens.mean((0, 1), keepdim=True))
        seen = self.see(v.tokens.mean((0, 1), keepdim=True))
        scale = 1.0 if float(heard.sum()) > 1e9 else 0.5
        both = (
            v.with_tokens(v.tokens + apply_gate(scale * heard.expand_as(v.tokens), control.a2v)),
            a.with_tokens(a.tokens + apply_gate(seen.expand_as(a.tokens), control.v2a)),
        )
        return video(both[0]), audio(both[1])


@pytest.mark.parametrize(
    ("fusion", "broken"),
    [
        (Leaky, {"off is exactly off", "on, something crosses"}),
        (Swapped, {"each gate rules its own direction"}),
        (Idle, {"gradients reach every parameter", "on, something crosses"}),
        (
            Mixing,
            {
                "samples do not see each other", "masked audio tokens change nothing",
                "the host never waits for the device",
            },
        ),
        (lambda video, audio: 1 / 0, None),
    ],
)  # fmt: skip
def test_what_is_broken_is_found(fusion, broken):
    report = ovi.check_fusion(fusion)
    assert not report.passed
    if broken is None:
        assert len(report.failures) == len(report.checks)
        assert "ZeroDivisionError" in repr(report)
    else:
        assert broken <= set(report.failures), report
        assert "holds" in report._repr_html_()


def test_a_fusion_of_a_cell_trains_and_loads(tiny_shards, tmp_path):
    with FUSIONS.temporary("mixed", Swapped):
        words = (f"data.path={tiny_shards}", *SMALL, *QUIET, "model/fusion=mixed", "trainer.max_steps=1")
        done = ovi.fit(ovi.compose(*words, "trainer.accelerator=cpu", "data.batch_size=2"), tmp_path / "run")
    assert type(done.model.fusions[0]) is Swapped


def test_clips_on_disk_are_untouched_by_showing(clip, tmp_path):
    write_clip(tmp_path / "a.mp4", clip)
    before = sorted(Path(tmp_path).iterdir())
    ovi.show(clip)._repr_html_()
    assert sorted(Path(tmp_path).iterdir()) == before
