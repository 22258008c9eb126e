"""Word errors against counts by hand and by jiwer, Whisper against a greedy loop of our own, DNSMOS on real speech."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from ovi.errors import OviError
from ovi.metrics.clip_metric import METRICS
from ovi.metrics.dnsmos import DNSMOS, dnsmos
from ovi.metrics.recognisers import RECOGNISERS, Recogniser
from ovi.metrics.sound import resampled
from ovi.metrics.word_error import WordErrorRate, word_errors
from ovi.registry import UnknownNameError

FPS, RATE = 8.0, 16000


class Planted(Recogniser):
    """Hears what the level of the clip stands for.

    Args:
        hears: by level.
    """

    def __init__(self, *, hears: dict[float, str]) -> None:
        super().__init__()
        self.name, self.digest, self.hears, self.asked = "planted", "0", hears, 0

    def forward(self, waveform: torch.Tensor) -> str:
        self.asked += 1
        return self.hears[round(float(waveform.abs().max()), 2)]


def clip(level: float, seconds: float = 1.0, rate: int = RATE) -> tuple[np.ndarray, np.ndarray]:
    frames = np.zeros((round(seconds * FPS), 8, 8, 3), np.uint8)
    return frames, np.full(round(seconds * rate), level, np.float32)


@pytest.fixture
def planted():
    with RECOGNISERS.temporary("planted", Planted):
        yield


def wer_of(hears: dict[float, str], clips: dict[float, str], **knobs) -> WordErrorRate:
    metric = WordErrorRate(FPS, RATE, recogniser={"name": "planted", "hears": hears}, **knobs)
    for level, caption in clips.items():
        metric.update(*clip(level), caption=caption)
    return metric


# --- word error rate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heard", "said", "errors"),
    [
        ("a b c", "a b c", 0),
        ("a x c", "a b c", 1),  # exchanged
        ("a c", "a b c", 1),  # left out
        ("a b b c", "a b c", 1),  # put in
        ("", "a b c", 3),
        ("x y z w v", "a", 5),  # more errors than words
        ("c a b", "a b c", 2),
    ],
)
def test_errors_by_hand(heard, said, errors):
    assert word_errors(heard, said) == (errors, len(said.split()))
    assert word_errors("a b", "") == (2, 0)


def test_errors_agree_with_jiwer():
    jiwer = pytest.importorskip("jiwer")
    rng = np.random.default_rng(0)
    for _ in range(60):
        said, heard = (" ".join(rng.choice(list("abcdef"), rng.integers(1, 40))) for _ in range(2))
        counted = jiwer.process_words(said, heard)
        expected = counted.substitutions + counted.deletions + counted.insertions
        assert word_errors(heard, said) == (expected, len(said.split()))


def test_the_rate_is_of_the_whole_set_not_a_mean_of_rates(planted):
    """No error in 2 words and 4 in 8: 0.4, where the mean of both rates is 0.25."""
    hears = {0.1: "Hello, there!", 0.2: "A small step for a man, I"}
    clips = {
        0.1: "A man waves. <S>Hello there<E> He leaves.",
        0.2: "<S>Some small steps<E> and then <S>for a man: a giant<E>",
        0.3: "Rain on a roof.",
    }
    figures = wer_of(hears, clips).compute()
    # "some small steps for a man a giant" against "a small step for a man i": three exchanged, one left out.
    assert float(figures["wer_planted"]) == pytest.approx((0 + 4) / (2 + 8))
    assert float(figures["wer_planted_n"]) == 10
    assert float(figures["wer_planted_coverage"]) == pytest.approx(2 / 3)


def test_spelling_and_case_do_not_count_but_words_do(planted):
    for heard, said, knob, rate in (
        ("DON'T stop; it's 25!", "do not stop, it is twenty-five", "english", 0.0),
        ("C'est l'été.", "c'est l’été", "basic", 0.0),
        ("it's 25", "it's twenty five", "basic", 2 / 4),  # it s twenty five
        ("colour", "color", "english", 1.0),
    ):
        figures = wer_of({0.1: heard}, {0.1: f"<S>{said}<E>"}, normaliser=knob).compute()
        assert float(figures["wer_planted"]) == pytest.approx(rate), (heard, said)


def test_spellings_of_the_recogniser_are_counted_by(planted):
    metric = wer_of({0.1: "colour"}, {})
    metric.recogniser.spellings = {"colour": "color"}
    metric.update(*clip(0.1), caption="<S>Color<E>")
    assert float(metric.compute()["wer_planted"]) == 0


def test_silence_misses_every_word_and_is_not_asked_about(planted):
    metric = wer_of({}, {0.0: "<S>one two three<E>"})
    assert metric.recogniser.asked == 0
    assert float(metric.compute()["wer_planted"]) == 1
    assert float(metric.compute()["wer_planted_coverage"]) == 1


def test_no_speech_at_all_is_no_figure(planted):
    figures = wer_of({}, {0.1: "rain", 0.2: "<S>...<E>"}).compute()
    assert np.isnan(float(figures["wer_planted"]))
    assert (float(figures["wer_planted_n"]), float(figures["wer_planted_coverage"])) == (0, 0)


def test_processes_add_up(planted):
    hears, captions = {0.1: "a b", 0.2: "a", 0.3: "x"}, {0.1: "<S>a b c<E>", 0.2: "<S>a<E>", 0.3: "<S>y z<E>"}
    whole, idle = wer_of(hears, captions), wer_of(hears, {})
    parts = [wer_of(hears, {0.1: captions[0.1]}), wer_of(hears, {k: captions[k] for k in (0.2, 0.3)}), idle]
    for name in ("clips", *WordErrorRate.SUMS):
        assert float(getattr(whole, name)) == sum(float(getattr(part, name)) for part in parts)


def test_bad_words_are_named(planted, tmp_path):
    with pytest.raises(OviError, match="normaliser=greek: expected english, basic"):
        wer_of({}, {}, normaliser="greek")
    with pytest.raises(UnknownNameError, match="no recogniser is called 'wisper'"):
        WordErrorRate(FPS, RATE, recogniser="wisper")
    with pytest.raises(OviError, match=r"recogniser\.path is not set: it needs .*config\.json"):
        WordErrorRate(FPS, RATE)
    with pytest.raises(OviError, match=r"recogniser\.path=.*nowhere: there is no such folder.*config\.json"):
        RECOGNISERS["whisper"](path=str(tmp_path / "nowhere"))
    with pytest.raises(OviError, match=r"has no config\.json"):
        RECOGNISERS["whisper"](path=str(tmp_path))
    frames, wave = clip(0.1)
    with pytest.raises(OviError, match="NaN"):
        wer_of({}, {}).update(frames, wave * np.nan, caption="<S>a<E>")
    with pytest.raises(OviError, match="rates wrong"):
        wer_of({}, {}).update(frames, wave[::3], caption="<S>a<E>")


# --- Whisper ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory) -> Path:
    """A Whisper of random weights with windows of 1 s, as transformers stores one."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )

    folder = tmp_path_factory.mktemp("models") / "Tiny-Random.v1"
    vocab = {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}
    specials = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|fr|>", "<|translate|>", "<|transcribe|>"]
    specials += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    tokenizer = WhisperTokenizer(vocab={**vocab, specials[0]: len(vocab)}, merges=[])
    stamps = [f"<|{0.02 * i:.2f}|>" for i in range(51)]
    tokenizer.add_special_tokens({"additional_special_tokens": specials[1:]})
    tokenizer.add_tokens(stamps)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in specials}
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
    end = ids["<|endoftext|>"]
    config = WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=16, max_source_positions=50, max_target_positions=24, **sizes,
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=ids["<|startoftranscript|>"],
        init_std=0.6, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    # As a trained one, it does not write marks and time stamps of its own accord.
    model.model.decoder.embed_tokens.weight.data[len(vocab) :] *= 0.05
    generation = {
        "is_multilingual": True, "max_length": 24, "eos_token_id": end, "pad_token_id": end, "bos_token_id": end,
        "decoder_start_token_id": ids["<|startoftranscript|>"], "no_timestamps_token_id": ids["<|notimestamps|>"],
        "lang_to_id": {name: ids[name] for name in ("<|en|>", "<|fr|>")}, "prev_sot_token_id": ids["<|startofprev|>"],
        "task_to_id": {name: ids[f"<|{name}|>"] for name in ("translate", "transcribe")},
        "max_initial_timestamp_index": 10,
    }  # fmt: skip
    model.generation_config = GenerationConfig(**generation)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder)
    return folder


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


def greedy(folder: Path, wave: np.ndarray, language: str) -> str:
    """What the network of a folder writes, by a plain loop of arg max over its scores."""
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

    tokenizer = WhisperTokenizer.from_pretrained(folder)
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    found = WhisperFeatureExtractor.from_pretrained(folder)(wave, sampling_rate=RATE, return_tensors="pt")
    start = ["<|startoftranscript|>", f"<|{language}|>", "<|transcribe|>", "<|notimestamps|>"]
    ids = [tokenizer.convert_tokens_to_ids(name) for name in start]
    with torch.no_grad():
        while len(ids) < 24:
            scores = model(input_features=found.input_features, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(scores.argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    assert sum(i < 256 for i in ids) > 5  # it does write
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_whisper_writes_what_a_plain_greedy_loop_does(whisper_folder):
    written = {}
    for language in ("en", "fr"):
        recogniser = RECOGNISERS["whisper"](path=str(whisper_folder), language=language)
        for seed in range(3):
            wave = noise(0.8, seed)
            with torch.autocast("cpu", torch.bfloat16):
                written[language, seed] = recogniser(torch.from_numpy(wave))
            assert written[language, seed] == greedy(whisper_folder, wave, language)
    assert len(set(written.values())) > 3
    assert recogniser.name == "whisper_tiny_random_v1"
    assert not any(p.requires_grad for p in recogniser.parameters())


def test_whisper_runs_in_the_metric_and_repeats_itself(whisper_folder):
    def figures(seconds: float, language: str | None) -> tuple[dict[str, float], str]:
        node = {"name": "whisper", "path": str(whisper_folder), "language": language, "label": "tiny"}
        metric = WordErrorRate(FPS, 44100, recogniser=node)
        torch.manual_seed(round(seconds) + 1)
        frames = np.zeros((round(seconds * FPS), 8, 8, 3), np.uint8)
        metric.update(frames, resampled(noise(seconds), RATE, 44100), caption="<S>rain over there<E>")
        return {tag: float(value) for tag, value in metric.compute().items()}, str(metric.identity())

    for seconds in (1, 3):  # a clip of several windows too
        first = figures(seconds, "en")
        assert first == figures(seconds, "en")
        assert first[0]["wer_whisper_tiny_n"] == 3
        assert first[0]["wer_whisper_tiny"] * 3 == pytest.approx(round(first[0]["wer_whisper_tiny"] * 3))
    assert first[1] != figures(1, None)[1]


def test_whisper_without_its_tokenizer_is_refused(whisper_folder, tmp_path):
    """transformers hands out an empty tokenizer then, without a word."""
    for file in whisper_folder.iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(OviError, match=r"its tokenizer .* entries"):
        RECOGNISERS["whisper"](path=str(tmp_path))


def test_whisper_with_half_its_weights_is_refused(whisper_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in whisper_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: w for name, w in weights.items() if "encoder.layers" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OviError, match=r"its weights lack model\.encoder\.layers"):
        RECOGNISERS["whisper"](path=str(tmp_path))


def test_other_weights_are_another_identity(whisper_folder, tmp_path):
    first = RECOGNISERS["whisper"](path=str(whisper_folder)).digest
    for file in whisper_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert RECOGNISERS["whisper"](path=str(tmp_path)).digest == first
    with open(tmp_path / "generation_config.json", "a") as file:
        file.write("\n")
    assert RECOGNISERS["whisper"](path=str(tmp_path)).digest != first


# --- DNSMOS -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speech() -> list[tuple[np.ndarray, int]]:
    """Sentences spoken in two languages, out of the package pytest-audioeval (never imported)."""
    pytest.importorskip("speechmos")
    pytest.importorskip("librosa")
    soundfile = pytest.importorskip("soundfile")
    found = importlib.util.find_spec("pytest_audioeval")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("pytest-audioeval, whose speech is used, is not installed")
    folder = Path(found.submodule_search_locations[0]) / "samples" / "audio"
    files = [folder / name for name in ("en/quick_brown_fox.wav", "fr/pangrama.wav")]
    return [soundfile.read(file, dtype="float32") for file in files]


def test_ratings_are_the_librarys(speech):
    from speechmos import dnsmos as library

    for wave, rate in speech:
        ours = dnsmos(wave, rate)
        expected = library.run(np.clip(resampled(wave, rate, 16000), -1, 1), sr=16000)
        assert {name: ours[name.removesuffix("_mos")] for name in expected} == pytest.approx(expected)


def test_noise_lowers_the_ratings_step_by_step(speech):
    rng, rows = np.random.default_rng(0), []
    for level_db in (None, -15, 0):
        metric = DNSMOS(FPS, 16000)
        for wave, rate in speech:
            wave = resampled(wave, rate, 16000)
            if level_db is not None:
                power = float(np.sqrt(np.mean(wave**2))) * 10 ** (level_db / 20)
                wave = np.clip(wave + rng.normal(0, power, wave.shape), -1, 1).astype(np.float32)
            metric.update(np.zeros((round(len(wave) / 16000 * FPS), 4, 4, 3), np.uint8), wave)
        rows.append({tag: float(value) for tag, value in metric.compute().items()})
    for scale in ("ovrl", "sig", "bak", "p808"):
        column = [row[f"dnsmos_{scale}"] for row in rows]
        assert column == sorted(column, reverse=True), (scale, column)
    assert rows[0]["dnsmos_ovrl"] - rows[-1]["dnsmos_ovrl"] > 1
    assert all(row["dnsmos_n"] == len(speech) and row["dnsmos_coverage"] == 1 for row in rows)


def test_the_mean_is_over_the_clips_that_can_be_rated(speech):
    metric = DNSMOS(FPS, speech[0][1])
    (wave, rate), (other, _) = speech[:2]
    waves = [wave, np.zeros(rate, np.float32), other, 0.9 * wave[: rate // 4]]  # silence, a quarter of a second
    for one in waves:
        metric.update(np.zeros((max(1, round(len(one) / rate * FPS)), 4, 4, 3), np.uint8), one)
    figures = metric.compute()
    expected = np.mean([dnsmos(w, rate)["ovrl"] for w in (wave, other)])
    assert float(figures["dnsmos_ovrl"]) == pytest.approx(expected)
    assert (float(figures["dnsmos_n"]), float(figures["dnsmos_coverage"])) == (2, 0.5)
    assert dnsmos(np.zeros(rate), rate) is None
    assert dnsmos(np.zeros(0), rate) is None
    metric = DNSMOS(FPS, rate)
    metric.update(*clip(0.0, rate=rate))
    assert np.isnan(float(metric.compute()["dnsmos_sig"]))


def test_too_loud_is_as_a_player_plays_it(speech):
    wave, rate = speech[0]
    assert rate == 16000
    assert dnsmos(40 * wave, rate) == dnsmos(np.clip(40 * wave, -1, 1), rate)
    with pytest.raises(OviError, match="NaN"):
        dnsmos(wave * np.nan, rate)
    with pytest.raises(OviError, match="mono"):
        dnsmos(np.stack([wave, wave]), rate)


def test_a_missing_library_is_named(monkeypatch):
    import sys

    from ovi.metrics import dnsmos as module

    module._network.cache_clear()
    monkeypatch.setitem(sys.modules, "speechmos", None)
    with pytest.raises(OviError, match=r"needs the package speechmos.*pip install speechmos"):
        METRICS["dnsmos"](FPS, RATE)
