"""Stages that need weights, on tiny models built on the spot; and what they say when weights are missing or wrong."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ovi.data.media import Clip
from ovi.data.stages.aesthetic import Aesthetic, load_head
from ovi.data.stages.base import Candidate, Rejected
from ovi.data.stages.captioner import Captioner, TransformersCaptioner, WriteCaptions
from ovi.errors import OviError


def clip(seed: int = 0) -> Clip:
    frames = np.random.default_rng(seed).integers(0, 256, (12, 40, 56, 3), dtype=np.uint8)
    return Clip(frames, np.zeros(16000, np.float32), 12, 16000)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory) -> Path:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=12,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    size = {"shortest_edge": 32}
    CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def mlp_head(path: Path, sizes=(12, 8, 5, 1)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A head in LAION's layout: linear layers at places 0, 2, 4 of a Sequential, dropout between."""
    torch.manual_seed(1)
    layers = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
    torch.save({f"layers.{2 * n}.{k}": v for n, m in enumerate(layers) for k, v in m.state_dict().items()}, path)
    return [(m.weight.detach(), m.bias.detach()) for m in layers]


def test_aesthetic_is_the_heads_score_of_clips_embedding(tiny_clip, tmp_path):
    """Against the embedding taken by hand: resized, cut, normalised, brought to length 1, then the layers."""
    from transformers import CLIPVisionModelWithProjection

    layers = mlp_head(tmp_path / "head.pth")
    stage = Aesthetic(clip=str(tiny_clip), head=str(tmp_path / "head.pth"), min_score=None, num_pictures=2)
    made = clip()
    network = CLIPVisionModelWithProjection.from_pretrained(tiny_clip).eval()
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    scores = []
    for n in (3, 9):
        picture = Image.fromarray(made.frames[n]).resize((44, 32), Image.Resampling.BICUBIC)
        pixels = (np.asarray(picture)[:, 6:38] / 255 - mean) / std
        embedding = network(torch.from_numpy(pixels).float().permute(2, 0, 1)[None]).image_embeds[0].double()
        value = embedding / embedding.norm()
        for weight, bias in layers:
            value = weight.double() @ value + bias.double()
        scores.append(value.item())
    measured = stage.measure(made)["aesthetic"]
    assert measured == pytest.approx(np.mean(scores), abs=3e-3)
    assert abs(measured - stage.measure(clip(1))["aesthetic"]) > 1e-5
    rejected: list[Rejected] = []
    strict = Aesthetic(clip=str(tiny_clip), head=str(tmp_path / "head.pth"), min_score=measured + 1)
    assert not list(strict([Candidate(Path("a"), "a", clip=made)], rejected.append))
    assert (rejected[0].reason, rejected[0].threshold) == ("unaesthetic", measured + 1)


def test_a_single_layer_in_safetensors_is_a_head_too(tmp_path):
    save_file({"weight": torch.ones(1, 12), "bias": torch.zeros(1)}, tmp_path / "linear.safetensors")
    ((weight, bias),) = load_head(tmp_path / "linear.safetensors")
    assert weight.tolist() == [[1.0] * 12]
    assert bias.tolist() == [0.0]


def test_weights_that_do_not_fit_are_named(tiny_clip, tmp_path):
    head = tmp_path / "head.pth"
    with pytest.raises(OviError, match=r"aesthetic\.head=.*there is no such file"):
        Aesthetic(clip=str(tiny_clip), head=str(head))
    mlp_head(head, (768, 16, 1))
    with pytest.raises(OviError, match=r"takes embeddings of 768, but the CLIP .* gives 12.*ViT-L/14"):
        Aesthetic(clip=str(tiny_clip), head=str(head))
    mlp_head(head, (12, 4))
    with pytest.raises(OviError, match="expected linear layers that end in one output"):
        load_head(head)
    torch.save({"conv.weight": torch.ones(1, 3, 3, 3), "conv.bias": torch.ones(1)}, head)
    with pytest.raises(OviError, match="no linear layer"):
        load_head(head)
    head.write_text("not weights")
    with pytest.raises(OviError, match="cannot be read as weights"):
        load_head(head)
    mlp_head(head)
    with pytest.raises(OviError, match=r"aesthetic\.clip=.*config\.json is missing"):
        Aesthetic(clip=str(tmp_path), head=str(head))


def test_a_clip_with_missing_weights_is_refused_not_filled_at_random(tiny_clip, tmp_path):
    from safetensors.torch import load_file

    for file in tiny_clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    mlp_head(tmp_path / "head.pth")
    with pytest.raises(OviError, match=r"1 weights are missing, the first visual_projection\.weight"):
        Aesthetic(clip=str(tmp_path), head=str(tmp_path / "head.pth"))


class Planted(Captioner):
    def __init__(self, text: str) -> None:
        self.text = text

    def caption(self, clip: Clip) -> str:
        return self.text


def test_missing_captions_are_written_and_checked():
    def one(text: str, had: str = "", **knobs):
        rejected: list[Rejected] = []
        stage = WriteCaptions(Planted(text), **knobs)
        kept = list(stage([Candidate(Path("a"), "a", caption=had, clip=clip())], rejected.append))
        return (kept + rejected)[0]

    assert one("A dog barks. Audio: A bark.").caption == "A dog barks. Audio: A bark."
    assert one("A dog.", had="A cat.").caption == "A cat."
    assert one("A dog.", had="A cat.", replace_existing=True).caption == "A dog."
    assert one("A dog says <S>").reason == "caption_unbalanced"
    assert one("  ").reason == "no_caption"
    assert (one("A dog.").figures, one("A dog.", had="A cat.").figures) == ({"captioned": 1}, {"captioned": 0})


@pytest.fixture(scope="module")
def tiny_blip(tmp_path_factory) -> Path:
    """A captioner of one picture, and of words: BLIP, with random weights."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "ball", "bounces", "describe", "red", "blue"]
    (folder / "vocab.txt").write_text("\n".join(words))
    text = {
        "vocab_size": len(words), "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32, "bos_token_id": 5,
        "eos_token_id": 3, "pad_token_id": 0, "sep_token_id": 3,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    network = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=16))
    network.save_pretrained(folder)
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def test_a_transformers_model_from_a_folder_writes_what_generating_by_hand_writes(tiny_blip):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    captioner = TransformersCaptioner(path=str(tiny_blip), prompt="a red", num_pictures=1, max_new_tokens=6)
    made = clip()
    network = AutoModelForImageTextToText.from_pretrained(tiny_blip).eval()
    processor = AutoProcessor.from_pretrained(tiny_blip)
    inputs = processor(images=Image.fromarray(made.frames[6]), text="a red", return_tensors="pt")
    tokens = network.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    written = captioner.caption(made)
    assert written
    assert expected.endswith(written)
    assert captioner.caption(made) == written
    sent = pickle.dumps(captioner)
    assert len(sent) < 2000  # to another process goes where the weights are
    assert pickle.loads(sent).caption(made) == written


def test_a_captioner_that_is_not_there_or_not_whole_is_named(tiny_blip, tmp_path):
    with pytest.raises(OviError, match=r"captioner\.path=.*config\.json is missing"):
        TransformersCaptioner(path=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(OviError, match="cannot be loaded as an image-text-to-text model"):
        TransformersCaptioner(path=str(tmp_path))
    with pytest.raises(OviError, match=r"captioner\.dtype must be one of"):
        TransformersCaptioner(path=str(tiny_blip), dtype="int8")
