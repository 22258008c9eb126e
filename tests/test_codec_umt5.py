"""The umT5 text encoder through the registry, on a tiny model and a tokenizer made here."""

import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ovi.codecs import TEXT_ENCODERS
from ovi.errors import OviError

pytest.importorskip("ftfy")
from ovi.codecs.umt5 import published_clean

WORDS = [
    "a",
    "the",
    "red",
    "blue",
    "ball",
    "box",
    "dog",
    "cat",
    "bounces",
    "barks",
    "two",
    "dogs",
    "at",
    "night",
    "sound",
    "of",
    "hello",
    "world",
]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,<>/:&;!?'"
PROMPTS = ["a red ball", "", "two dogs bark at night <AUDCAP>a dog barks<ENDAUDCAP>", "the box"]


def save_tokenizer(folder: Path, words=WORDS, letters=LETTERS, end=True) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in words] + [(letter, -6.0) for letter in letters]
    inner = Tokenizer(models.Unigram(pieces, unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    if end:
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    outer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    outer.save_pretrained(folder / "tokenizer")


def save_encoder(folder: Path, seed: int = 0, vocab_size: int = 128):
    from transformers import UMT5Config, UMT5EncoderModel
    from transformers.utils import logging as shown

    shown.disable_progress_bar()
    config = UMT5Config(vocab_size=vocab_size, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = UMT5EncoderModel(config)
    model.save_pretrained(folder / "text_encoder")
    shown.enable_progress_bar()
    return model.eval().requires_grad_(False)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of a tiny model, and the library's own model of the same weights."""
    folder = tmp_path_factory.mktemp("umt5")
    save_tokenizer(folder)
    return folder, save_encoder(folder)


@pytest.fixture
def copied(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


def build(folder, **knobs):
    return TEXT_ENCODERS.build({"name": "umt5", "knobs": {"path": str(folder), "dtype": "float32", **knobs}})


# --- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_embeddings_are_those_of_the_padded_pipeline_trimmed(made, prompt):
    """As published: padded to 512 with a mask, then rows past the prompt dropped."""
    folder, model = made
    encoder = build(folder)
    given = encoder.tokenizer(prompt, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    hidden = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state[0]
    expected = hidden[: int(given["attention_mask"].sum())]
    embedding = encoder.encode([prompt])[0]
    assert embedding.shape == expected.shape
    torch.testing.assert_close(embedding, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_prompts_embedding_does_not_depend_on_its_company(made, batch_size):
    encoder = build(made[0], batch_size=batch_size)
    together = encoder.encode(PROMPTS)
    for prompt, embedding in zip(PROMPTS, together):
        alone = build(made[0]).encode([prompt])[0]
        assert embedding.shape == alone.shape
        torch.testing.assert_close(embedding, alone, atol=5e-6, rtol=0)
    assert encoder.encode([]) == []


def test_the_empty_prompt_is_its_end_mark(made):
    folder, model = made
    end = model(input_ids=torch.tensor([[1]])).last_hidden_state[0]
    embedding = build(folder).encode([""])[0]
    assert embedding.shape == (1, 32)
    torch.testing.assert_close(embedding, end, atol=2e-6, rtol=0)


def test_long_prompts_are_cut_and_keep_their_end_mark(made):
    encoder = build(made[0])
    assert encoder.encode(["dog " * 600])[0].shape == (512, 32)
    short = build(made[0], text_len=4)
    kept = short.encode(["a red ball bounces at night"])[0]
    torch.testing.assert_close(kept, encoder.encode(["a red ball"])[0], atol=5e-6, rtol=0)


def test_word_order_and_case_matter(made):
    one, two, three = build(made[0]).encode(["red dog", "dog red", "Red dog"])
    assert (one - two).abs().max() > 1e-2
    assert three.shape != one.shape or (one - three).abs().max() > 1e-2


def test_bfloat16_differs_by_its_rounding(made):
    exact, coarse = build(made[0]).encode(PROMPTS[2:3])[0], build(made[0], dtype="bfloat16").encode(PROMPTS[2:3])[0]
    assert coarse.dtype == torch.float32
    assert 1e-4 < ((exact - coarse).norm() / exact.norm()).item() < 0.05


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a  red\n\tball ", "a red ball"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("Case STAYS", "Case STAYS"),
        ("schÃ¶n", "schön"),  # UTF-8 read as Latin-1
        ("“quoted”", '"quoted"'),
        ("<S>hi<E> <AUDCAP>a dog<ENDAUDCAP>", "<S>hi<E> <AUDCAP>a dog<ENDAUDCAP>"),
    ],
)
def test_prompts_are_cleaned_as_published(prompt, cleaned):
    assert published_clean(prompt) == cleaned


# --- identity --------------------------------------------------------------------------------------------------------


def test_other_weights_and_other_tokenizers_are_refused(made, copied):
    state = json.loads(json.dumps(build(made[0]).state()))
    build(copied).load_state(state)
    save_encoder(copied, seed=1)
    with pytest.raises(OviError, match="encoded with weights of sha256"):
        build(copied).load_state(state)
    shutil.copytree(made[0] / "text_encoder", copied / "text_encoder", dirs_exist_ok=True)
    build(copied).load_state(state)
    save_tokenizer(copied, words=WORDS[::-1])
    with pytest.raises(OviError, match="encoded with weights of sha256"):
        build(copied).load_state(state)


def test_it_can_be_pickled(made):
    encoder = build(made[0])
    again = pickle.loads(pickle.dumps(encoder))
    assert torch.equal(again.encode(["a red ball"])[0], encoder.encode(["a red ball"])[0])


# --- bad input -------------------------------------------------------------------------------------------------------


def test_missing_files_are_named(copied, tmp_path):
    with pytest.raises(OviError, match=r"path=.*nowhere is no folder") as error:
        build(tmp_path / "nowhere")
    assert "Wan-AI/Wan2.2-TI2V-5B-Diffusers" in str(error.value)
    assert "text_encoder/config.json" in str(error.value)
    with pytest.raises(OviError, match=r"lacks config\.json, model\.safetensors"):
        build(copied, subfolder="vae")
    with pytest.raises(OviError, match=r"has neither tokenizer\.json nor spiece\.model"):
        build(copied, tokenizer="nothing")


def test_a_tokenizer_that_tells_nothing_apart_is_refused(copied):
    save_tokenizer(copied, words=[], letters="")
    with pytest.raises(OviError, match="does not tell prompts apart"):
        build(copied)


def test_a_tokenizer_without_an_end_mark_is_refused(copied):
    save_tokenizer(copied, end=False)
    with pytest.raises(OviError, match="no end mark"):
        build(copied)


def test_a_tokenizer_of_another_model_is_refused(copied):
    save_encoder(copied, vocab_size=32)
    with pytest.raises(OviError, match="the encoder knows 32"):
        build(copied)


def test_a_damaged_tokenizer_is_refused(copied):
    (copied / "tokenizer/tokenizer.json").write_text("{")
    with pytest.raises(OviError, match="no tokenizer can be made"):
        build(copied)


def test_weights_that_are_not_whole_are_refused(copied, caplog):
    caplog.set_level(logging.CRITICAL)
    file = copied / "text_encoder/model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(OviError, match="does not hold the encoder whole"):
        build(copied)
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(OviError, match="cannot be loaded"):
        build(copied)


def test_other_models_are_refused(copied):
    config = json.loads((copied / "text_encoder/config.json").read_text())
    (copied / "text_encoder/config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(OviError, match="a model of type t5, expected umt5"):
        build(copied)


@pytest.mark.parametrize("knobs", [{"text_len": 1}, {"batch_size": 0}, {"dtype": "int4"}])
def test_knobs_out_of_range_are_refused(made, knobs):
    with pytest.raises(OviError, match=next(iter(knobs))):
        build(made[0], **knobs)


def test_without_ftfy_it_says_what_to_install(made, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(OviError, match="pip install ftfy"):
        build(made[0])


def test_a_set_keeps_which_weights_embedded_its_prompts(made, copied):
    from ovi.codecs import Codecs

    specs = {"video": {"name": "dct"}, "audio": {"name": "logmel"}}
    stored = Codecs.build({**specs, "text": {"name": "umt5", "knobs": {"path": str(made[0])}}}, fps=8).to_dict()
    stored = json.loads(json.dumps(stored))
    assert Codecs.from_dict(stored).to_dict() == stored
    save_encoder(copied, seed=1)
    stored["text"]["knobs"]["path"] = str(copied)
    with pytest.raises(OviError, match="UMT5"):
        Codecs.from_dict(stored)
    del stored["state"]["text"]  # as sets of earlier versions are
    assert Codecs.from_dict(stored).text.text_len == 512
