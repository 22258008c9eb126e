"""Every experiment and preset composes and builds; the commands run end to end on real files."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ovi.attention import use_attention
from ovi.clock import Clock
from ovi.commands.components import load_components, store_components
from ovi.commands.convert import parser as convert_parser
from ovi.commands.knobs import check_knobs
from ovi.commands.main import COMMANDS
from ovi.commands.restore import restore
from ovi.data.media import probe
from ovi.errors import OviError
from ovi.flow import DENSITIES, TIMESTEPS
from ovi.fusion import FUSIONS
from ovi.guidance import GUIDANCES
from ovi.layout import LatentLayout
from ovi.rope import ROPE_ALIGNMENTS

CONF = Path(__file__).parents[1] / "conf"
LAYOUT = LatentLayout(12, 48, 64, 24)


def names(group):
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


@pytest.fixture(autouse=True)
def composer():
    load_components()
    store_components()
    GlobalHydra.instance().clear()
    with initialize_config_module("ovi.conf", version_base="1.3"):
        yield


def composed(config, *overrides):
    cfg = compose(config, overrides=list(overrides), return_hydra_config=True)
    check_knobs(cfg)
    cfg.hydra.runtime.output_dir = "somewhere"
    OmegaConf.set_struct(cfg, False)
    hydra = cfg.pop("hydra")
    # What hydra.main resolves at run time, by hand: paths alone.
    for logger in (cfg.get("logger") or {}).values():
        logger.save_dir = hydra.runtime.output_dir
    if "callbacks" in cfg:
        cfg.callbacks.checkpoint.dirpath = "somewhere"
    return cfg


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_composes_and_builds(experiment, tiny_shards):
    cfg = composed("train", f"experiment={experiment}", f"data.path={tiny_shards}")
    data = instantiate(cfg.data)
    model = instantiate(cfg.model, _convert_="all")(data.layout)
    optim = instantiate(cfg.optim, _convert_="all")
    optimizer = optim["optimizer"](model.parameters())
    if optim["schedule"] is not None:
        optim["schedule"](optimizer, num_training_steps=10)
    callbacks = instantiate(cfg.callbacks, _convert_="all")
    assert callbacks["joint_eval"].generator.num_steps == cfg.generation.num_steps
    trainer = instantiate(cfg.trainer, _convert_="all", logger=False)
    assert trainer.max_steps == cfg.trainer.max_steps
    flow = instantiate(cfg.flow, _convert_="all")
    assert flow["timesteps"](4, torch.Generator(), flow["density"], (64, 16)).video.shape == (4,)


@pytest.mark.parametrize("preset", names("set"))
def test_every_preset_composes_with_its_command(preset):
    command = "sample" if preset.endswith("sampling") else "encode"
    cfg = composed(command, f"set={preset}")
    if command == "encode" and OmegaConf.is_missing(cfg.source, "path"):
        cfg.source.path = "a folder"
    assert instantiate(cfg.generation if command == "sample" else cfg.source, _convert_="all") is not None


@pytest.mark.parametrize("fusion", list(FUSIONS))
@pytest.mark.parametrize("alignment", list(ROPE_ALIGNMENTS))
def test_every_registered_component_is_a_word_on_the_command_line(fusion, alignment):
    cfg = composed("train", "data.path=x", f"model/fusion={fusion}", f"model/rope_alignment={alignment}")
    model = instantiate(cfg.model, _convert_="all")(LAYOUT)
    assert isinstance(model.fusions[0], FUSIONS[fusion])
    assert model.rope_alignment.func is ROPE_ALIGNMENTS[alignment]


@pytest.mark.parametrize("density", list(DENSITIES))
@pytest.mark.parametrize("timesteps", list(TIMESTEPS))
def test_noise_levels_are_words_on_the_command_line(density, timesteps):
    words = [
        f"flow/density={density}",
        "flow.density.shift=3",
        f"flow/timesteps={timesteps}",
        "flow.exchange_dropout=0.1",
    ]
    flow = instantiate(composed("train", "data.path=x", *words).flow, _convert_="all")
    assert flow["density"].func is DENSITIES[density]
    assert flow["density"].keywords["shift"] == 3
    assert flow["timesteps"].func is TIMESTEPS[timesteps]
    assert flow["exchange_dropout"] == 0.1


def test_training_defaults_to_one_logit_normal_level_for_both():
    flow = instantiate(composed("train", "data.path=x").flow, _convert_="all")
    assert flow["density"].func is DENSITIES["logit_normal"]
    assert flow["density"].keywords == {"mean": 0.0, "std": 1.0, "shift": 1.0}
    assert flow["timesteps"].func is TIMESTEPS["shared"]


@pytest.mark.parametrize("guidance", list(GUIDANCES))
def test_every_guidance_composes_in_training_and_sampling(guidance):
    word = f"generation/guidance={guidance}"
    for cfg in (composed("train", "data.path=x", word), composed("sample", "checkpoint=x", "prompts=y", word)):
        assert instantiate(cfg.generation, _convert_="all").guidance == GUIDANCES[guidance]()


def test_scales_of_guidance_are_set_on_the_command_line():
    words = ["text_video=2.5", "exchange_audio=1.5", "perturb_video=1", "perturb_blocks=[1,2]", "rescale=0"]
    words = [f"generation.guidance.{word}" for word in words]
    cfg = composed("sample", "checkpoint=x", "prompts=y", "generation/guidance=modality", *words)
    rule = instantiate(cfg.generation, _convert_="all").guidance
    assert rule.video_weights == (2.5 + 1 + 3 - 1, 1 - 2.5, -1, 1 - 3)
    assert rule.audio_weights == (7 + 0 + 1.5 - 1, 1 - 7, 0, 1 - 1.5)
    assert rule.passes[2].perturb_blocks == (1, 2)


def test_audio_takes_the_video_towers_size_unless_told():
    cfg = composed("train", "data.path=x", "model.video.dim=64", "model.audio.ffn_dim=100")
    model = instantiate(cfg.model, _convert_="all")(LAYOUT)
    assert model.audio.dim == model.video.dim == 64
    assert model.audio.blocks[0].ffn[0].out_features == 100


def ovi(*words, cwd, status=0):
    code = "import sys; from ovi.commands.main import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, f"ovi {' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


TINY = ["model.video.dim=24", "model.video.num_heads=2", "model.video.num_blocks=1", "data.batch_size=2"]
QUICK = ["generation.num_steps=2", "callbacks.joint_eval.num_clips=1", "hydra.run.dir=run"]


@pytest.fixture(scope="module")
def trained(tiny_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    steps = ["trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.accelerator=cpu"]
    said = ovi("train", f"data.path={tiny_shards}", "seed=3", *TINY, *QUICK, *steps, cwd=folder)
    return folder, said


def test_train_leaves_a_folder_that_says_how_it_came_to_be(trained, tiny_shards):
    folder, _ = trained
    run = folder / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["metrics"]["val/loss"] > 0
    assert summary["peak_memory_gb"] > 0.1
    config = OmegaConf.load(run / "config.yaml")
    assert config.seed == 3
    assert config.model.audio.dim == 24
    versions = json.loads((run / "versions.json").read_text())
    assert versions["packages"]["torch"] == torch.__version__.split("+")[0]
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert list((run / "tensorboard").glob("events*"))
    assert (run / "samples" / "step_000004" / "000.mp4").is_file()


def test_a_checkpoint_alone_restores_model_and_codecs(trained):
    folder, _ = trained
    restored = restore(folder / "run")
    assert restored.step == 4
    assert restored.model.video.dim == 24
    assert restored.codecs.fitted


def test_sample_writes_a_clip_for_every_prompt(trained):
    folder, _ = trained
    (folder / "prompts.txt").write_text("a red ball\n\na blue ball\n")
    ovi("sample", "checkpoint=run", "prompts=prompts.txt", "generation.num_steps=2", "out=made", cwd=folder)
    lines = [json.loads(line) for line in (folder / "made" / "samples.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == ["a red ball", "a blue ball"]
    assert all(probe(folder / "made" / line["file"]).has_audio for line in lines)


@pytest.mark.slow
def test_sample_starts_from_a_picture_and_takes_another_length(trained):
    folder, _ = trained
    from PIL import Image

    Image.new("RGB", (80, 60), (200, 30, 30)).save(folder / "red.png")
    words = ["prompts='one, two'", "first_frame=red.png", "num_frames=16", "generation.num_steps=2", "out=started"]
    ovi("sample", "checkpoint=run", *words, cwd=folder)
    from ovi.data.media import read_clip

    file = folder / "started" / "000.mp4"
    clip = read_clip(file, fps=8, num_frames=16, height=32, width=32, sample_rate=16000)
    red, green, blue = clip.frames[0].reshape(-1, 3).mean(0)
    assert red > 150
    assert max(green, blue) < 90


@pytest.mark.slow
def test_training_resumes_and_starts_from_weights(trained, tiny_shards):
    folder, _ = trained
    more = [f"data.path={tiny_shards}", *TINY, "generation.num_steps=2", "callbacks.joint_eval=null"]
    more += ["trainer.accelerator=cpu", "trainer.val_check_interval=2"]
    ovi("train", *more, "resume=run", "init_from=gone", "trainer.max_steps=6", "hydra.run.dir=more", cwd=folder)
    assert json.loads((folder / "more" / "summary.json").read_text())["steps"] == 6
    ovi("train", *more, "init_from=run", "trainer.max_steps=1", "hydra.run.dir=fine", cwd=folder)
    assert json.loads((folder / "fine" / "summary.json").read_text())["steps"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "data.path=nowhere"], "nowhere"),
        (["train", "data.path={data}", "model.expects={{video_channels: 48}}"], "video_channels 5 where the model"),
        (["train", "data.path={data}", "model.video.num_heads=7"], "num_heads"),
        (["train", "data.path={data}", "model.fusion.zero_inti=true"], "zero_init"),
        (["train", "data.path={data}", "model.plan=first:40"], "have only 4 pairs"),
        (["train", "data.path={data}", "model/rope_scaling=ntk", "model.rope_scaling.factor=0.5"], "at least 1"),
        (["train", "data.path={data}", "attention=flash", "attention.version=4"], "use attention=sdpa"),
        (["train", "data.path={data}", "resume=nowhere"], "neither a checkpoint"),
        (["train", "data.path={data}", "init_from=nowhere"], "nowhere: there is no such checkpoint"),
        (["train", "data.path={data}", "init_from={data}/index.json"], "cannot be read as safetensors"),
        (["sample", "checkpoint=run", "prompts=missing.txt"], "missing.txt"),
        (["sample", "checkpoint=run"], "prompts"),
        (["encode", "source.path=empty", "out=x"], "no .mp4"),
        (["encode", "source.path=empty"], "out"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_message(words, says, trained, tiny_shards):
    folder, _ = trained
    (folder / "empty").mkdir(exist_ok=True)
    said = ovi(*(w.format(data=tiny_shards) for w in words), cwd=folder, status=1)
    assert says in said
    assert "Traceback" not in said


def test_latents_of_another_clock_are_refused_by_a_checkpoint(trained, tiny_shards, tmp_path):
    folder, _ = trained
    index = json.loads((tiny_shards / "index.json").read_text())
    for clock in (index["clock"], index["codecs"]["clock"]):
        clock["fps"] = 10
    index["latent_shapes"]["audio"][0] = 37  # as long as its frames are then
    for shard in tiny_shards.glob("*.tar"):
        (tmp_path / shard.name).symlink_to(shard)
    (tmp_path / "index.json").write_text(json.dumps(index))
    said = ovi("train", f"data.path={tmp_path}", "init_from=run", *TINY, cwd=folder, status=1)
    assert "fps 8 against 10" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_guidance_without_text_dropout_is_refused(trained, tiny_shards):
    folder, _ = trained
    words = [f"data.path={tiny_shards}", *TINY, "callbacks.joint_eval=null", "trainer.max_steps=1"]
    ovi("train", *words, "flow.text_dropout=0", "hydra.run.dir=bare", "trainer.accelerator=cpu", cwd=folder)
    words = ["checkpoint=bare", "prompts=a", "generation.num_steps=1", "generation/guidance=cfg"]
    said = ovi("sample", *words, "out=never", cwd=folder, status=1)
    assert "flow.text_dropout" in said
    ovi("sample", *words, "negative_video=b", "negative_audio=c", "out=guided", cwd=folder)
    assert (folder / "guided" / "000.mp4").is_file()


def readme_commands():
    text = (CONF.parent / "README.md").read_text()
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line.startswith("ovi ")]


@pytest.mark.parametrize("line", readme_commands())
def test_every_command_of_the_readme_composes(line):
    _, command, *words = shlex.split(line)
    if "-m" in words:  # a sweep: each of its first and last jobs
        words.remove("-m")
        values = [w if "," not in w else w.split("=")[0] + "=" + w.split("=")[1].split(",")[-1] for w in words]
        words = [w.split(",")[0] for w in words]
        assert composed(command, *values)
    if command in ("train", "encode", "sample"):
        assert composed(command, *words)
    elif command == "convert":
        assert convert_parser().parse_args(words).target.suffix == ".safetensors"
    else:
        assert command in COMMANDS


def test_the_readme_shows_each_command():
    assert {line.split()[1] for line in readme_commands()} >= {"encode", "train", "sample", "convert", "list"}


PUBLISHED = ("ovi_720p_5s", "ovi_960p_5s", "ovi_960p_10s")


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_published_network_has_the_published_size(preset):
    """5.000 B + 5.528 B + 1.133 B parameters (spec, 'Sizes'), built without storage."""
    cfg = composed("train", "data.path=x", f"model={preset}")
    with torch.device("meta"):
        model = instantiate(cfg.model, _convert_="all")(LatentLayout(48, 20, 4096, 512))
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.video, model.audio, model.fusions)]
    assert [round(count / 1e9, 3) for count in counts] == [5.0, 5.528, 1.133]
    assert model.rope_alignment.keywords["factor"] == 0.19676
    with pytest.raises(OviError, match="video_channels 12 where the model expects 48"):
        instantiate(cfg.model, _convert_="all")(LAYOUT)


@pytest.mark.parametrize(
    ("preset", "latent_frames", "area"), list(zip(PUBLISHED, (31, 31, 61), (720**2, 960**2, 960**2)))
)
def test_clips_of_the_published_variants_have_their_latents(preset, latent_frames, area):
    """The table of variants (spec, 'Sizes'); pictures divide into patches of 2x2 latents of 16x16 pixels."""
    cfg = composed("encode", f"set={preset}")
    clock = Clock()
    assert cfg.fps == clock.fps
    assert clock.num_latent_frames(cfg.num_frames) == latent_frames
    assert cfg.height % 32 == cfg.width % 32 == 0
    assert cfg.height * cfg.width == pytest.approx(area, rel=0.001)


@pytest.mark.parametrize(
    "overrides",
    [
        ["attention=flex", "model/recompute=operation"],
        ["attention=sdpa", "model/recompute=block", "model.recompute.every=2", "model.plan=every:2"],
        ["model/rope_scaling=yarn", "model/rope_alignment@model.self_alignment=none", "model.time_axis_only=true"],
        ["model.plan=[0,3]", "model.video.num_blocks=5", "model.audio.num_blocks=4"],
    ],
    ids=" ".join,
)
def test_what_the_readme_sweeps_composes_and_builds(overrides):
    cfg = composed("train", "data.path=x", *overrides)
    model = instantiate(cfg.model, _convert_="all")(LAYOUT)
    use_attention(model, instantiate(cfg.attention, _convert_="all"))
    if "model.plan=every:2" in overrides:
        assert [v for v, a in model.plan if a == v] == [0, 2]
    if "model.plan=[0,3]" in overrides:
        assert model.plan[-1] == (4, None)
    assert (model.self_alignment is model.rope_alignment) != ("model.time_axis_only=true" in overrides)
