"""CLAP score: planted embeddings, and a tiny network of transformers whose own forward pass is the reference."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ovi.errors import OviError
from ovi.metrics.clap.backend import CLAP_BACKENDS, ClapBackend, heard
from ovi.metrics.clap.hub import TransformersClap
from ovi.metrics.clap.laion import LaionClap
from ovi.metrics.clap.score import CLAPScore, clap_score
from ovi.metrics.features.base import AUDIO_FEATURES, build_features
from ovi.metrics.features.clap import ClapFeatures
from ovi.metrics.prompts import audio_caption, spoken_words

FPS, RATE = 8.0, 16_000
OVI = "A man waves. He says, <S>Hello you.<E> <AUDCAP>A calm male voice, wind.<ENDAUDCAP>"


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        (OVI, "A calm male voice, wind."),
        ("A dog runs.\nAudio: Barks,\n  far away.", "Barks, far away."),
        ("A dog runs. Audio:Barks. Audio: twice.", "Barks. Audio: twice."),
        ("<AUDCAP>One<ENDAUDCAP> then <AUDCAP>two", "One two"),
        ("<AUDCAP>A voice says <S>Stop<E> twice.<ENDAUDCAP>", "A voice says Stop twice."),
        ("He says <S>Audio: check<E> and nods.", None),
        ("He says <S>Audio: check<E>. Audio: A voice.", "A voice."),
        ("Audio: old. <AUDCAP>new<ENDAUDCAP>", "new"),
        ("A radio. HiAudio: none. audio: none", None),
        ("A dog. <AUDCAP>  <ENDAUDCAP>", None),
        ("A dog. Audio: ", None),
        ("A dog.", None),
        ("", None),
    ],
)
def test_prompt_to_description_of_the_sound(prompt: str, caption: str | None) -> None:
    assert audio_caption(prompt) == caption


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (OVI, ["Hello you."]),
        ("<S>One\n two<E>, then <S> three <E>", ["One two", "three"]),
        ("<AUDCAP>A voice says <S>Stop<E>.<ENDAUDCAP>", ["Stop"]),
        ("<S>never <S>closed<E> <S>open", ["closed"]),
        ("<S> <E>no one speaks<E>", []),
        ("A dog.", []),
    ],
)
def test_prompt_to_words(prompt: str, words: list[str]) -> None:
    assert spoken_words(prompt) == words


# --- the figure ------------------------------------------------------------------------------------------------------


def test_mean_cosine() -> None:
    texts = [[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]]
    sounds = np.float32([[5.0, 0.0], [4.0, 3.0], [0.0, -1.0]])
    assert clap_score(torch.tensor(texts), sounds).item() == pytest.approx((1.0 + 24 / 25 - 1.0) / 3, abs=1e-12)


@pytest.mark.parametrize(
    ("texts", "sounds"),
    [
        ([[1.0, 0.0]], [[1.0, 0.0, 0.0]]),
        ([1.0, 0.0], [1.0, 0.0]),
        ([[0.0, 0.0]], [[1.0, 0.0]]),
        ([[math.nan, 0.0]], [[1.0, 0.0]]),
        (np.zeros((0, 4)), np.zeros((0, 4))),
    ],
)
def test_embeddings_without_an_angle(texts: Any, sounds: Any) -> None:
    with pytest.raises(OviError, match="embeddings must be"):
        clap_score(np.asarray(texts), np.asarray(sounds))


class Planted(ClapBackend):
    """Embeds a sound by its level, at an angle of as many radians, and a text by the number it is.

    Args:
        seen: whatever.
    """

    def __init__(self, *, seen: int = 2) -> None:
        super().__init__()
        self.name, self.digest, self.embed_dim = "planted", "d" * 64, seen
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.texts_seen: list[str] = []
        self.freeze()

    def texts(self, captions: list[str]) -> Tensor:
        self.texts_seen += captions
        angles = torch.tensor([float(caption.split()[0]) for caption in captions])
        return 3.0 * torch.stack([angles.cos(), angles.sin()], 1)

    def window(self, waveform: Tensor) -> Tensor:
        level = waveform[:4_000].abs().max()
        return 7.0 * torch.stack([level.cos(), level.sin()])

    def count_tokens(self, caption: str) -> int:
        return len(caption)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Any:
    def build(**knobs: Any) -> CLAPScore:
        with CLAP_BACKENDS.temporary("planted", Planted):
            return CLAPScore(FPS, RATE, backend={"name": "planted"}, **knobs)

    return build


def square(level: float, seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    """A wave that is at +level or -level, 100 times a second; resampled to 48 kHz, it overshoots."""
    return np.where(np.arange(round(seconds * rate)) % (rate // 100) < rate // 200, level, -level).astype(np.float32)


def add(metric: CLAPScore, caption: str, sound: np.ndarray, real: np.ndarray | None = None) -> None:
    frames = np.zeros((round(FPS * len(sound) / metric.sample_rate), 4, 4, 3), np.uint8)
    metric.update(frames, sound, caption=caption, real_waveform=real)


def at_48k(metric: CLAPScore) -> CLAPScore:
    metric.sample_rate = 48_000
    return metric


def test_planted_embeddings_give_their_mean(planted: Any) -> None:
    metric = at_48k(planted())
    clips = [
        ("0.9", 0.2, 0.5),
        ("0.1", 0.4, None),
        ("", 0.3, 0.3),
        ("0.5", 0.0, 0.2),
        ("0.5", 0.6, 0.0),
        ("", 0.1, None),
    ]
    for caption, level, real in clips:
        add(metric, caption, square(level, rate=48_000), None if real is None else square(real, rate=48_000))
    found = {tag: value.item() for tag, value in metric.compute().items()}
    assert found == pytest.approx(
        {
            "clap_planted": (math.cos(0.7) + math.cos(0.3) + math.cos(0.1)) / 3,
            "clap_planted_n": 3,
            "clap_planted_coverage": 3 / 6,
            "clap_planted_cut_prompt": 0,
            "clap_audio_planted": (math.cos(0.3) + 1.0) / 2,
            "clap_audio_planted_n": 2,
            "clap_audio_planted_coverage": 2 / 6,
        },
        abs=1e-6,
    )


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_parts_add_up(planted: Any) -> None:
    whole, parts = at_48k(planted()), [at_48k(planted()) for _ in range(3)]  # the third sees nothing
    for n, level in enumerate([0.1, 0.2, 0.7]):
        for metric in (whole, parts[n % 2]):
            add(metric, "0.4", square(level, rate=48_000), square(0.5, rate=48_000))
    for name in ("clips", *CLAPScore.SUMS):
        setattr(parts[2], name, sum(getattr(part, name) for part in parts))
        assert parts[2]._reductions[name](torch.ones(3)) == 3
    found, expected = ({tag: value.item() for tag, value in m.compute().items()} for m in (parts[2], whole))
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_to_measure_is_nan(planted: Any) -> None:
    metric = at_48k(planted())
    assert metric.compute()["clap_planted_n"] == 0
    add(metric, "0.5", np.full(48_000, 0.25, np.float32))  # the mean is taken off: silence
    found = metric.compute()
    assert found["clap_planted"].isnan()
    assert "clap_audio_planted" not in found
    assert (found["clap_planted_n"], found["clap_planted_coverage"]) == (0, 0)


def test_prompts_are_reduced_when_asked(planted: Any) -> None:
    prompts = ["0.5 A dog. <AUDCAP>0.1 barks<ENDAUDCAP>", "0.3 rain", "0.2 " + "x" * 100 + " Audio: 0.2"]
    expected = {
        False: [prompts, 0, 1, (0.5, 0.3, 0.2)],
        True: [["0.1 barks", "0.3 rain", "0.2"], 1, 0, (0.1, 0.3, 0.2)],
    }
    for asked, (texts, whole, cut, angles) in expected.items():
        metric = at_48k(planted(audio_only_caption=asked))
        for prompt in prompts:
            add(metric, prompt, square(0.5, rate=48_000))
        found = metric.compute()
        assert metric.backend.texts_seen == texts
        # Reduced captions are not the published protocol's, and the tag says so.
        tag = "clap_planted_audio_caption" if asked else "clap_planted"
        assert ("clap_planted" in found) is not asked
        assert found.get(f"{tag}_whole_prompt", 0) == whole
        assert found[f"{tag}_cut_prompt"] == cut
        assert found[tag].item() == pytest.approx(np.mean([math.cos(0.5 - a) for a in angles]), abs=1e-6)


def test_sound_comes_at_48_khz(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    metric, lengths = planted(), []
    monkeypatch.setattr(metric.backend, "embed_audio", lambda w: (lengths.append(len(w)), torch.ones(2))[1])
    add(metric, "0.5", square(0.5, seconds=2.0))
    assert lengths == [96_000]


def test_identity_says_what_decides(planted: Any) -> None:
    plain = planted().identity()
    assert (plain["backend"], plain["digest"]) == ("planted", "d" * 64)
    assert plain != planted(audio_only_caption=True).identity()


@pytest.mark.parametrize(
    ("sound", "message"),
    [(np.full(RATE, np.nan), "NaN"), (square(0.5, 2.0), "rates wrong"), (np.zeros((RATE, 2)), "mono")],
)
def test_bad_sound(planted: Any, sound: np.ndarray, message: str) -> None:
    with pytest.raises(OviError, match=message):
        planted().update(np.zeros((8, 4, 4, 3), np.uint8), sound, caption="0.5")


def test_real_sound_that_is_not_finite(planted: Any) -> None:
    with pytest.raises(OviError, match="NaN or infinite"):
        add(planted(), "0.5", square(0.5), np.full(RATE, np.nan, np.float32))


# --- what is heard ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3, 479_999, 480_000, 480_001, 240_000, 241_920, 576_000])
def test_ten_seconds_are_heard(samples: int) -> None:
    sound = np.random.default_rng(samples).normal(0.1, 0.1, samples)
    expected, kept = np.zeros(480_000), (sound - sound.mean())[:480_000]
    for n in range(480_000 // len(kept)):
        expected[n * len(kept) : (n + 1) * len(kept)] = kept
    assert np.abs(heard(torch.from_numpy(sound)).numpy() - expected).max() < 1e-7


@pytest.mark.parametrize("sound", [torch.zeros(0), torch.zeros(2, 9), torch.tensor([0.0, math.inf])])
def test_no_sound_to_hear(sound: Tensor) -> None:
    with pytest.raises(OviError, match="waveform"):
        heard(sound)


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLAP of a few layers with random weights, and a tokenizer of letters, as the hub would lay them out."""
    from tokenizers import pre_tokenizers
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, ClapProcessor, RobertaTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>"])}
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 80,
    }
    audio = {
        "patch_embeds_hidden_size": 8,
        "hidden_size": 64,
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2],
        "num_hidden_layers": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=16))
        for weights in model.parameters():
            if weights.ndim > 1:  # apart from each other, where its initialisation embeds all alike
                weights.data.mul_(4.0)
    path = tmp_path_factory.mktemp("hub") / "tiny-clap"
    model.save_pretrained(path)
    extractor = ClapFeatureExtractor(truncation="rand_trunc", frequency_min=50)
    ClapProcessor(extractor, RobertaTokenizer(vocab=vocabulary, merges=[])).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def backend(folder: Path) -> TransformersClap:
    return TransformersClap(path=str(folder))


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    times = np.arange(round(48_000 * seconds)) / 48_000
    return (0.3 * np.sin(2 * np.pi * rng.uniform(200, 4_000) * times**2) + rng.normal(0, 0.01, len(times))).astype("f4")


def test_cosines_are_those_of_its_own_forward_pass(folder: Path) -> None:
    from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

    model, tokenizer = ClapModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    extractor = ClapFeatureExtractor.from_pretrained(folder)
    metric = CLAPScore(FPS, 48_000, backend={"name": "transformers", "path": str(folder)})
    captions, sounds, cosines = (
        ["a dog barks", "rain", "a bell rings"],
        [sound(4.0), sound(12.0, 1), sound(10.0, 2)],
        [],
    )
    for caption, wave in zip(captions, sounds):
        add(metric, caption, wave, sounds[0])
        kept = (wave - wave.mean(dtype=np.float64))[:480_000].astype(np.float32)
        window = np.concatenate([np.tile(kept, 480_000 // len(kept)), np.zeros(480_000 % len(kept), np.float32)])
        inputs = extractor(window, sampling_rate=48_000, return_tensors="pt")
        with torch.no_grad():
            out = model(**tokenizer([caption], return_tensors="pt"), **inputs)
        cosines.append((out.logits_per_audio / model.logit_scale_a.exp()).item())
    assert np.ptp(cosines) > 0.01
    found = metric.compute()
    assert found["clap_tiny-clap"].item() == pytest.approx(np.mean(cosines), abs=1e-6)
    assert 0 < found["clap_audio_tiny-clap"] < 1


def test_the_same_sound_gives_the_same_figure(backend: TransformersClap) -> None:
    long = sound(12.0)
    assert torch.equal(backend.embed_audio(long), backend.embed_audio(long))
    zero_mean = long - long.mean(dtype=np.float64).astype(np.float32)
    later = zero_mean.copy()
    later[480_000:] = -later[480_000:].mean()
    assert (backend.embed_audio(zero_mean) - backend.embed_audio(later)).abs().max() < 1e-4
    short = zero_mean[:240_000] - zero_mean[:240_000].mean(dtype=np.float64).astype(np.float32)
    assert (backend.embed_audio(short) - backend.embed_audio(np.tile(short, 2))).abs().max() < 1e-4
    assert (backend.embed_audio(long) - backend.embed_audio(sound(12.0, 3))).abs().max() > 1e-2


def test_it_is_frozen_and_in_float32_whatever_is_around(backend: TransformersClap) -> None:
    plain, heard_plain = backend.embed_texts(["a dog", "rain falls"]), backend.embed_audio(sound(3.0))
    state = np.random.get_state()[1].copy()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(backend.embed_texts(["a dog", "rain falls"]), plain)
        assert torch.equal(backend.embed_audio(sound(3.0)), heard_plain)
    assert (np.random.get_state()[1] == state).all()
    assert plain.dtype == heard_plain.dtype == torch.float32
    assert torch.allclose(plain.norm(dim=1), torch.ones(2))
    assert not any(weights.requires_grad for weights in backend.parameters())
    assert not backend.train().training


def test_texts_do_not_depend_on_their_batch(backend: TransformersClap) -> None:
    together = backend.embed_texts(["rain", "a much longer text about rain"])
    assert (together[0] - backend.embed_texts(["rain"])[0]).abs().max() < 1e-6
    assert backend.cuts("a" * 76)
    assert not backend.cuts("a" * 75)
    assert torch.equal(*backend.embed_texts(["a" * 75 + "b", "a" * 75 + "c"]))


def test_digest_follows_the_files(folder: Path, backend: TransformersClap, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--laion--some-clap" / "snapshots" / "0123abcd"
    shutil.copytree(folder, snapshot)
    same = TransformersClap(path=str(snapshot))
    assert (same.name, same.digest) == ("some-clap", backend.digest)
    config = json.loads((snapshot / "processor_config.json").read_text())
    config["feature_extractor"]["frequency_min"] = 0
    (snapshot / "processor_config.json").write_text(json.dumps(config))
    assert TransformersClap(path=str(snapshot)).digest != backend.digest


def broken(folder: Path, to: Path, **changes: Any) -> str:
    shutil.copytree(folder, to)
    for name, change in changes.items():
        file = to / f"{name}.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
    return str(to)


def test_incomplete_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = broken(folder, tmp_path / "x")
    weights = load_file(tmp_path / "x" / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "text_projection" not in k}, tmp_path / "x" / "model.safetensors")
    with pytest.raises(OviError, match=r"has no weights for \d+ tensors of the network.*text_projection"):
        TransformersClap(path=path)


def test_a_stub_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    from transformers import RobertaTokenizer

    path = broken(folder, tmp_path / "x")
    RobertaTokenizer().save_pretrained(path)  # five entries: what transformers makes of no files
    with pytest.raises(OviError, match=r"its tokenizer tells no texts apart .* is a stub"):
        TransformersClap(path=path)


def test_a_tokenizer_of_another_network_is_refused(folder: Path, tmp_path: Path) -> None:
    from transformers import RobertaTokenizer

    path = broken(folder, tmp_path / "x")
    vocabulary = {**RobertaTokenizer.from_pretrained(folder).get_vocab(), **{f"more{n}": 300 + n for n in range(9)}}
    RobertaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(path)
    with pytest.raises(OviError, match="its tokenizer has 270 entries, its network reads 261"):
        TransformersClap(path=path)


@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_another_preprocessor_is_refused(folder: Path, tmp_path: Path) -> None:
    def at_16k(config: dict[str, Any]) -> None:
        config["feature_extractor"].update(sampling_rate=16_000)

    with pytest.raises(OviError, match=r"wants .* samples at 16000 Hz, expected 480000 at 48000"):
        TransformersClap(path=broken(folder, tmp_path / "x", processor_config=at_16k))


def test_missing_files_are_named_with_their_origin(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OviError, match=r"path is not set.*huggingface.co/laion"):
        TransformersClap()
    path = broken(folder, tmp_path / "x")
    (tmp_path / "x" / "model.safetensors").unlink()
    with pytest.raises(OviError, match=r"path=.*has no model.safetensors or .*huggingface.co/laion"):
        TransformersClap(path=path)
    with pytest.raises(OviError, match=r"has no config.json; no .*processor_config.json; no tokenizer.json"):
        TransformersClap(path="laion/clap-htsat-unfused")  # a name on the hub is no folder


def test_laion_asks_for_its_files_before_it_imports_anything(tmp_path: Path) -> None:
    published = (
        r"music_speech_audioset_epoch_15_esc_89.98.pt from https://huggingface.co/lukewys/laion_clap, 2,352,471,003"
    )
    with pytest.raises(OviError, match=f"checkpoint is not set: it needs the file {published}"):
        CLAPScore(FPS, RATE)
    (tmp_path / "any.pt").touch()
    with pytest.raises(OviError, match=r"has no vocab.json and no merges.txt.*FacebookAI/roberta-base"):
        LaionClap(checkpoint=str(tmp_path / "any.pt"), tokenizer=str(tmp_path))


# --- features --------------------------------------------------------------------------------------------------------


def test_features_are_one_row_a_clip(folder: Path, backend: TransformersClap) -> None:
    features = build_features(
        AUDIO_FEATURES, {"name": "clap", "backend": {"name": "transformers", "path": str(folder)}}
    )
    assert isinstance(features, ClapFeatures)
    assert (features.name, features.digest) == ("clap_tiny-clap", backend.digest)
    assert (features.sample_rate, features.feature_dim) == (48_000, 16)
    wave = torch.from_numpy(sound(4.0))
    assert features(wave).shape == (1, 16)
    assert torch.equal(features(wave)[0], backend.embed_audio(wave))


@pytest.mark.parametrize("name", sorted(CLAP_BACKENDS))
def test_backends_explain_their_knobs(name: str) -> None:
    text = CLAP_BACKENDS[name].__doc__ or ""
    assert all(f"{knob}:" in text for knob in CLAP_BACKENDS.knobs(name))
