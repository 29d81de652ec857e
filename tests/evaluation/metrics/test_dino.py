# pyright: basic

import json

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.dino_folder import read_dino_folder
from evaluation.encoders import ClipEncoders
from evaluation.metrics.dino import Dino
from tests.contracts.metric import PictureMetricContract
from tests.evaluation.conftest import build_dino, noise
from trainers.cache import Cache
from trainers.errors import ModelError
from trainers.prompt import Prompt, Sample


@pytest.fixture(scope="module", params=["vit", "dinov2", "timm"])
def folder(request, tmp_path_factory):
    return build_dino(tmp_path_factory.mktemp("dino") / request.param, request.param)


@pytest.fixture
def encoders(tmp_path):
    return ClipEncoders(torch.device("cpu"), Cache(tmp_path / "cache"))


@pytest.fixture
def references(tmp_path):
    paths = [tmp_path / f"reference{seed}.png" for seed in range(3)]
    for seed, path in enumerate(paths):
        noise(100 + seed).save(path)
    return paths


class TestDino(PictureMetricContract):
    @pytest.fixture
    def metric(self, folder):
        return Dino(model=folder)

    @pytest.fixture
    def broken(self, tmp_path):
        return Dino(model=tmp_path / "nowhere")

    def test_it_is_the_mean_over_all_references(self, metric, folder, encoders, references, samples):
        encoder = encoders.dino(folder)
        pairs = encoder.embed_images([sample.image for sample in samples]) @ encoder.embed_references(references).T
        assert pairs.max(axis=1) != pytest.approx(pairs.mean(axis=1))
        np.testing.assert_allclose(metric.open(encoders, references).values(samples), pairs.mean(axis=1), atol=1e-6)

    def test_a_picture_is_as_near_as_can_be_to_itself(self, metric, encoders, references):
        scorer = metric.open(encoders, references[:1])
        assert scorer.values([Sample(Prompt(text="anything"), 0, noise(100))]) == [pytest.approx(1, abs=1e-5)]


@torch.no_grad()
def test_it_takes_the_class_token_of_the_stock_model_after_the_stock_preprocessing(tmp_path, encoders):
    from transformers import ViTImageProcessor, ViTModel

    folder, picture = build_dino(tmp_path / "vit", "vit"), noise(3, (80, 60))
    stock = ViTModel.from_pretrained(folder, add_pooling_layer=False)
    small = picture.resize((32, 32), Image.Resampling.BICUBIC)
    processor = ViTImageProcessor.from_pretrained(folder)
    pixels = processor(small, return_tensors="pt").pixel_values
    token = torch.nn.functional.normalize(stock(pixels).last_hidden_state[:, 0], dim=-1)
    np.testing.assert_allclose(encoders.dino(folder).embed_images([picture]), token.numpy(), atol=2e-5)


def test_the_name_says_which_transformer_it_is(folder, encoders):
    wanted = {
        "vit": "vit (ViT 24/16)",
        "dinov2": "dinov2 (DINOv2 24/14)",
        "timm": "timm (timm vit_small_patch16_224.dino)",
    }
    assert encoders.dino(folder).model.partition("@")[0] == wanted[folder.name]


def test_missing_weights_and_foreign_folders_are_refused_with_their_names(tmp_path, open_clip_folder):
    folder = build_dino(tmp_path / "vit", "vit")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors or pytorch_model\.bin is missing"):
        read_dino_folder(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ModelError, match="model_type is 'clip'"):
        read_dino_folder(folder)


def test_tensors_that_are_missing_are_not_replaced_by_random_ones(tmp_path, encoders):
    from safetensors.torch import load_file, save_file

    folder = build_dino(tmp_path / "vit", "vit")
    state = load_file(folder / "model.safetensors")
    del state["embeddings.cls_token"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors are missing, the first is embeddings\.cls_token"):
        encoders.dino(folder)
