"""CLAP by laion_clap without a hub: its own API, called directly, is the reference. Runs where laion_clap is installed.

Weights are random and the vocabulary is made here, of RoBERTa's size and with its tokens for two words: nothing of the
published files is at hand, everything of their layout is.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ovi.errors import OviError
from ovi.metrics.clap.laion import LaionClap

if find_spec("laion_clap") is None:  # importing it would ask the hub
    pytest.skip("laion_clap is not installed", allow_module_level=True)

pytestmark = pytest.mark.slow

PROMPTS = ["A dog barks twice.", "Rain falls on a tin roof while thunder rolls far away."]
KEPT = "music_speech_audioset_epoch_15_esc_89.98.pt"


@pytest.fixture(scope="module", autouse=True)
def asked() -> Iterator[list[Any]]:
    """Nobody may so much as ask for an address, from the first import on; who did is kept, as libraries go on."""
    calls: list[Any] = []

    def refuse(*args: Any, **_: Any) -> None:
        calls.append(args)
        raise OSError(f"network access in a test: {args}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket.socket, "connect_ex", refuse)
        yield calls


@pytest.fixture(autouse=True)
def _nobody_asks(asked: list[Any]) -> Iterator[None]:
    yield
    assert not asked


def write_vocabulary(folder: Path, size: int = 50_265, greeting: tuple[int, int] = (31_414, 232)) -> Path:
    """A byte-level vocabulary in RoBERTa's layout, with "Hello" and " world" at the places given."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("H", "e"), ("He", "l"), ("Hel", "l"), ("Hell", "o")]
    merges += [("Ġ", "w"), ("Ġw", "o"), ("Ġwo", "r"), ("Ġwor", "l"), ("Ġworl", "d")]
    placed = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": size - 1, "Hello": greeting[0]}
    placed["Ġworld"] = greeting[1]
    words = iter(
        [*letters, *("".join(m) for m in merges if "".join(m) not in placed), *map(str, range(10**6, 10**6 + size))]
    )
    taken = {place: word for word, place in placed.items()}
    vocabulary = {taken.get(n) or next(words): n for n in range(size)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """vocab.json, merges.txt and tiny.pt, a checkpoint as published: position_ids, `module.`, figures by numpy."""
    folder = write_vocabulary(tmp_path_factory.mktemp("laion"))
    network = unloaded_network(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in network.parameters():
            if parameter.ndim > 1:  # apart from each other, where its initialisation embeds all alike
                parameter.data.mul_(2.0)
    state = {f"module.{k}": v for k, v in network.state_dict().items()}
    state["module.text_branch.embeddings.position_ids"] = torch.arange(514)[None]
    torch.save({"epoch": 15, "name": "x", "loss": np.float64(0.5), "state_dict": state}, folder / "tiny.pt")
    yield folder
    shutil.rmtree(folder)  # half a gigabyte


def unloaded_network(folder: Path) -> torch.nn.Module:
    from ovi.metrics.clap.laion import _network, _roberta_tokenizer

    return _network("HTSAT-tiny", _roberta_tokenizer(folder)).model


@pytest.fixture(scope="module")
def backend(files: Path) -> LaionClap:
    return LaionClap(checkpoint=str(files / "tiny.pt"), tokenizer=str(files), amodel="HTSAT-tiny")


@pytest.fixture(scope="module")
def direct(files: Path) -> Any:
    """laion_clap's own module with its own ``load_ckpt``."""
    import laion_clap
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    tokenizer = RobertaTokenizer(str(files / "vocab.json"), str(files / "merges.txt"))
    config = RobertaConfig(
        vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, hidden_size=768
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RobertaTokenizer, "from_pretrained", lambda name: tokenizer)
        patch.setattr(RobertaModel, "from_pretrained", lambda name: RobertaModel(config))
        module = laion_clap.CLAP_Module(enable_fusion=False, device="cpu", amodel="HTSAT-tiny")
    module.load_ckpt(str(files / "tiny.pt"), verbose=False)
    return module


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    sound = np.random.default_rng(seed).normal(0.0, 0.1, round(48_000 * seconds)).astype(np.float32)
    return sound - sound.mean(dtype=np.float64).astype(np.float32)


def test_the_block_bites(asked: list[Any]) -> None:
    with pytest.raises(OSError, match="network access in a test"):
        socket.create_connection(("huggingface.co", 443))
    assert asked
    asked.clear()


def test_texts_embed_as_by_its_own_api(backend: LaionClap, direct: Any) -> None:
    ours, theirs = backend.embed_texts(PROMPTS), direct.get_text_embedding(PROMPTS, use_tensor=True)
    assert (ours - theirs).abs().max() < 1e-6
    assert torch.allclose(ours.norm(dim=1), torch.ones(2))
    assert ours.shape == (2, backend.embed_dim)
    assert (ours[0] - ours[1]).abs().max() > 1e-3


@pytest.mark.parametrize("seconds", [0.7, 4.0, 5.04, 10.0])
def test_sounds_embed_as_by_its_own_api(backend: LaionClap, direct: Any, seconds: float) -> None:
    sound = noise(seconds)
    with torch.no_grad():
        theirs = direct.get_audio_embedding_from_data(torch.from_numpy(sound)[None], use_tensor=True)[0]
    assert (backend.embed_audio(sound) - theirs).abs().max() < 1e-6


def test_beyond_ten_seconds_it_cuts_at_random_and_we_do_not(backend: LaionClap, direct: Any) -> None:
    sound = np.concatenate([noise(8.0), 0.2 * np.sin(np.arange(8 * 48_000) * 0.05).astype(np.float32)])
    ours = backend.embed_audio(sound)
    assert torch.equal(ours, backend.embed_audio(sound))
    first = sound[:480_000] - sound.mean()
    with torch.no_grad():
        theirs = direct.get_audio_embedding_from_data(torch.from_numpy(first)[None], use_tensor=True)[0]
        chance = torch.stack(
            [direct.get_audio_embedding_from_data(torch.from_numpy(sound)[None], use_tensor=True)[0] for _ in range(3)]
        )
    assert (ours - theirs).abs().max() < 1e-5
    assert chance.std(0).max() > 1e-4


def test_nothing_stays_changed(backend: LaionClap, files: Path) -> None:
    from transformers import BartTokenizer, BertTokenizer, RobertaModel, RobertaTokenizer

    kinds = (BartTokenizer, BertTokenizer, RobertaModel, RobertaTokenizer)
    assert not any("from_pretrained" in vars(kind) for kind in kinds)
    assert not any(Path(entry).name == "laion_clap" for entry in sys.path)
    before = torch.random.get_rng_state()
    unloaded_network(files)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not any(parameter.requires_grad for parameter in backend.parameters())
    assert not backend.train().training


def test_restores_after_a_failure(files: Path) -> None:
    from transformers import RobertaModel, RobertaTokenizer

    with pytest.raises(OviError, match=r"amodel=HTSAT-huge: laion_clap knows .*HTSAT-base"):
        LaionClap(checkpoint=str(files / "tiny.pt"), tokenizer=str(files), amodel="HTSAT-huge")
    assert not any("from_pretrained" in vars(kind) for kind in (RobertaModel, RobertaTokenizer))


def test_checkpoints_saved_anew(backend: LaionClap, files: Path) -> None:
    state = backend.clap.model.state_dict()
    assert not any("position_ids" in key for key in state)
    (files / "anew").mkdir()
    torch.save(state, files / "anew" / KEPT)  # plain, under the published file's name
    again = LaionClap(checkpoint=str(files / "anew"), tokenizer=str(files), amodel="HTSAT-tiny")
    assert torch.equal(again.embed_texts(PROMPTS), backend.embed_texts(PROMPTS))
    assert again.name.startswith("music_speech_audioset_epoch_15_esc_89.98_")
    assert backend.name == "tiny"
    assert again.digest != backend.digest
    with pytest.raises(OviError, match=r"is not of a CLAP with amodel=HTSAT-base .* set amodel"):
        LaionClap(checkpoint=str(files / "anew"), tokenizer=str(files))


@pytest.mark.parametrize("content", ["code", "list", "torn"])
def test_files_of_anything_else_are_refused(files: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.pt"
    torch.save({"state_dict": {"a": Path("x")}} if content == "code" else [torch.ones(1)], path)
    if content == "torn":
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OviError, match=r"other.pt: (cannot be read as tensors|holds list)"):
        LaionClap(checkpoint=str(path), tokenizer=str(files), amodel="HTSAT-tiny")


def test_long_texts_are_known_to_be_cut(backend: LaionClap) -> None:
    assert not backend.cuts("a" * 75)
    assert backend.cuts("a" * 76)
    same = backend.embed_texts(["a" * 75 + "b", "a" * 75 + "c"])
    assert torch.equal(same[0], same[1])


def test_autocast_changes_nothing(backend: LaionClap) -> None:
    sound, plain = noise(3.0), backend.embed_texts(PROMPTS)
    heard = backend.embed_audio(sound)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(backend.embed_texts(PROMPTS), plain)
        assert torch.equal(backend.embed_audio(sound), heard)


def test_takes_no_tokenizer_but_robertas(files: Path, tmp_path: Path) -> None:
    cases = {
        "has 5000 entries, where roberta-base has 50265": write_vocabulary(tmp_path / "small", 5_000, (4_000, 232)),
        "is not RoBERTa's vocabulary": write_vocabulary(tmp_path / "other", greeting=(31_415, 232)),
        "has no vocab.json and no merges.txt.*FacebookAI/roberta-base": tmp_path / "empty",
    }
    (tmp_path / "empty").mkdir()
    for message, folder in cases.items():
        with pytest.raises(OviError, match=message):
            LaionClap(checkpoint=str(files / "tiny.pt"), tokenizer=str(folder), amodel="HTSAT-tiny")


def test_refuses_the_stub_that_transformers_hands_out(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import RobertaTokenizer

    monkeypatch.setattr(RobertaTokenizer, "from_pretrained", lambda *_, **__: RobertaTokenizer())
    with pytest.raises(OviError, match="has 5 entries, where roberta-base has 50265"):
        LaionClap(checkpoint=str(files / "tiny.pt"), tokenizer=str(files), amodel="HTSAT-tiny")


def test_missing_checkpoint_is_asked_for(files: Path) -> None:
    wanted = r"music_speech_audioset_epoch_15_esc_89.98.pt from https://huggingface.co/lukewys/laion_clap.*51c68f12"
    (files / "empty").mkdir()
    for given in (None, "nowhere.pt", str(files / "empty")):
        with pytest.raises(OviError, match=f"checkpoint.*{wanted}"):
            LaionClap(checkpoint=given, tokenizer=str(files))
    with pytest.raises(OviError, match=r"tokenizer is not set.*roberta-base"):
        LaionClap(checkpoint=str(files / "tiny.pt"))
