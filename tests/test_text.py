"""Text encoders: the same everywhere, different for different prompts."""

import importlib.util
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch

from ovi.codecs.base import TEXT_ENCODERS
from ovi.codecs.text import HashedText, MiniLM, clean, hashed_vector
from ovi.errors import OviError

HAS_MINILM = importlib.util.find_spec(MiniLM.PACKAGE) is not None
needs_minilm = pytest.mark.skipif(not HAS_MINILM, reason="extra 'minilm' is not installed")

SENTENCE = "A {size} {colour} ball bounces {count}. <AUDCAP>{pitch} pitched knocks<ENDAUDCAP>"
WORDS = {
    "size": ["small", "large"],
    "colour": ["red", "blue", "green"],
    "count": ["once", "twice", "three times"],
    "pitch": ["low", "high"],
}


def prompts() -> list[str]:
    base = {name: words[0] for name, words in WORDS.items()}
    return [SENTENCE.format(**{**base, name: word}) for name, words in WORDS.items() for word in words[1:]] + [
        SENTENCE.format(**base)
    ]


@pytest.fixture(scope="module", params=["hashed", pytest.param("minilm", marks=needs_minilm)])
def encoder(request):
    return TEXT_ENCODERS.build({"name": request.param})


def test_rows_are_true_length_and_never_empty(encoder):
    empty, short, long = encoder.encode(["", "a red ball", "ball " * 600])
    assert len(empty) >= 1
    assert len(short) < len(long) == encoder.text_len
    for embedding in (empty, short, long):
        assert embedding.shape[1] == encoder.text_dim
        assert embedding.dtype == torch.float32
        assert not embedding.requires_grad


def test_one_word_of_count_colour_size_or_pitch_tells_prompts_apart(encoder):
    for one, other in combinations([e.mean(0) for e in encoder.encode(prompts())], 2):
        assert (one - other).norm() > 0.05 * one.norm()


def test_a_prompt_does_not_depend_on_its_company(encoder):
    alone = encoder.encode(["a red ball bounces twice"])[0]
    assert torch.equal(alone, encoder.encode(["x", "a red ball bounces twice", "some much longer prompt " * 3])[1])


def test_word_order_matters_even_to_a_sum(encoder):
    one, other = (e.sum(0) for e in encoder.encode(["red ball, blue box", "blue ball, red box"]))
    assert (one - other).norm() > 0.05 * one.norm()


def test_hashed_is_the_same_in_another_process_with_another_hash_seed():
    code = (
        "from ovi.codecs.text import HashedText; "
        "print(HashedText().encode(['A red ball, <S>hi<E>'])[0].double().flatten()[::7].tolist())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "77"}
    ).stdout
    here = HashedText().encode(["A red ball, <S>hi<E>"])[0].double().flatten()[::7].tolist()
    assert out.strip() == str(here)


def test_hashed_vectors_never_change():
    # Written down once: shards encoded with one version must be understood by the next.
    np.testing.assert_allclose(
        hashed_vector("ball", 64)[:3], [-1.7479913293603, 1.4109559926905, 0.9258436588732], atol=1e-12
    )


def test_hashed_vectors_have_unit_variance_and_are_nearly_orthogonal():
    vectors = np.stack([hashed_vector(f"word{n}", 64) for n in range(400)])
    assert np.mean(vectors**2, axis=1) == pytest.approx(1)
    assert abs(vectors.mean()) < 0.02
    cosines = (vectors @ vectors.T / 64)[np.triu_indices(400, 1)]
    assert np.std(cosines) == pytest.approx(1 / np.sqrt(64), rel=0.05)  # as of independent vectors
    embeddings = torch.cat(HashedText(text_len=400).encode([" ".join(f"word{n}" for n in range(400))]))
    assert embeddings.var().item() == pytest.approx(1, abs=0.03)


def test_tags_and_punctuation_are_tokens_and_case_is_not():
    encode = HashedText().encode
    assert len(encode(["<S>Hi there!<E>"])[0]) == 5
    assert torch.equal(encode(["A  RED\nball"])[0], encode(["a red ball"])[0])
    assert clean("Tom &amp;amp; Ｊerry\t ok") == "tom & jerry ok"


@pytest.mark.parametrize("knobs", [{"text_dim": 0}, {"text_len": 0}, {"order": 1.5}])
def test_hashed_refuses_impossible_knobs(knobs):
    with pytest.raises(OviError, match="text_dim"):
        HashedText(**knobs)


@needs_minilm
def test_minilm_agrees_with_a_padded_batch_of_transformers():
    from transformers import AutoModel, AutoTokenizer

    folder = MiniLM._folder()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    said = ["two red balls bounce", "a much longer prompt about one blue ball that bounces three times"]
    batch = tokenizer(said, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
    for mine, theirs, mask in zip(MiniLM().encode(said), expected, batch["attention_mask"]):
        torch.testing.assert_close(mine, theirs[mask.bool()], atol=1e-4, rtol=0)


def test_minilm_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OviError, match=r"ovi\[minilm\].*hashed"):
        MiniLM()
