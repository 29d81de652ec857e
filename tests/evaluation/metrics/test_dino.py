import json

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.dino_folder import read_dino_folder
from evaluation.encoders import ClipEncoders
from evaluation.metrics.dino import Dino
from tests.contracts.metric import MetricContract
from tests.evaluation.conftest import noise
from trainers.cache import Cache
from trainers.errors import ModelError
from trainers.prompt import Prompt, Sample

SMALL = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 3, "num_hidden_layers": 2}
PIXELS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3, "rescale_factor": 1 / 255}
PIXELS |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def build(folder, form):
    """A random transformer in a folder of one of the forms, for 32-px pictures."""
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    torch.manual_seed(0)
    if form == "timm":
        import timm
        from safetensors.torch import save_file

        folder.mkdir()
        name, size = "vit_small_patch16_224", {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}
        model = timm.create_model(name, num_classes=0, **size)
        config = {
            "architecture": name,
            "num_classes": 0,
            "num_features": 24,
            "global_pool": "token",
            "model_args": size,
        }
        config["pretrained_cfg"] = {"tag": "dino", "input_size": [3, 32, 32], "num_classes": 0, "crop_pct": 1.0}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(model.state_dict(), folder / "model.safetensors")
        return folder
    if form == "dinov2":
        Dinov2Model(Dinov2Config(**SMALL, image_size=28, patch_size=14)).save_pretrained(folder)
        kind = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 32}, "do_center_crop": True}
        kind |= {"crop_size": {"height": 28, "width": 28}}
    else:
        ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=16), add_pooling_layer=False).save_pretrained(folder)
        kind = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS | kind))
    return folder


@pytest.fixture(scope="module", params=["vit", "dinov2", "timm"])
def folder(request, tmp_path_factory):
    return build(tmp_path_factory.mktemp("dino") / request.param, request.param)


@pytest.fixture
def encoders(tmp_path):
    return ClipEncoders(torch.device("cpu"), Cache(tmp_path / "cache"))


@pytest.fixture
def references(tmp_path):
    paths = [tmp_path / f"reference{seed}.png" for seed in range(3)]
    for seed, path in enumerate(paths):
        noise(100 + seed).save(path)
    return paths


class TestDino(MetricContract):
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

    folder, picture = build(tmp_path / "vit", "vit"), noise(3, (80, 60))
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
    folder = build(tmp_path / "vit", "vit")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors or pytorch_model\.bin is missing"):
        read_dino_folder(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ModelError, match="model_type is 'clip'"):
        read_dino_folder(folder)


def test_tensors_that_are_missing_are_not_replaced_by_random_ones(tmp_path, encoders):
    from safetensors.torch import load_file, save_file

    folder = build(tmp_path / "vit", "vit")
    state = load_file(folder / "model.safetensors")
    del state["embeddings.cls_token"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors are missing, the first is embeddings\.cls_token"):
        encoders.dino(folder)
