import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from tests.contracts.backbone import UnetContract
from trainers.backbones.sdxl import SdxlConfig
from trainers.batch import Geometry
from trainers.errors import ModelError

CPU = torch.device("cpu")


def load(folder, dtype=torch.float32):
    return SdxlConfig(path=folder).load(CPU, dtype)


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture(scope="module")
def loaded(sdxl_folder):
    return load(sdxl_folder)


@pytest.fixture(scope="module")
def pipeline(sdxl_folder):
    return StableDiffusionXLPipeline.from_pretrained(sdxl_folder, local_files_only=True)


@pytest.fixture
def copied(sdxl_folder, tmp_path):
    return shutil.copytree(sdxl_folder, tmp_path / "sdxl")


class TestSdxl(UnetContract):
    @pytest.fixture
    def backbone(self, loaded):
        return loaded


@pytest.mark.parametrize("prompt", ["a zog on a blue field", "", "a prompt longer than the tokenizer's window " * 3])
def test_embeddings_equal_the_stock_pipelines(loaded, pipeline, prompt):
    hidden, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    ours = loaded.encode_prompts([prompt])
    assert torch.equal(ours.hidden, hidden)
    assert torch.equal(ours.pooled, pooled)


def test_no_prompt_equals_the_stock_pipelines_missing_negative_prompt(loaded, pipeline):
    _, hidden, _, pooled = pipeline.encode_prompt("a", do_classifier_free_guidance=True)
    assert torch.equal(loaded.encode_prompts([None]).hidden, hidden)
    assert torch.equal(loaded.encode_prompts([None]).pooled, pooled)


def test_no_prompt_is_the_empty_prompt_where_the_folder_says_so(copied):
    index = copied / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": False}))
    backbone = load(copied)
    assert torch.equal(backbone.encode_prompts([None]).hidden, backbone.encode_prompts([""]).hidden)


def test_time_ids_equal_the_stock_pipelines(loaded, pipeline):
    geometry = Geometry(original=(80, 120), crop=(3, 28), target=(64, 64))
    expected = pipeline._get_add_time_ids(
        geometry.original, geometry.crop, geometry.target, torch.float32, text_encoder_projection_dim=32
    )
    ours = loaded.condition(loaded.encode_prompts(["a"]), [geometry]).sizes
    assert torch.equal(ours, expected)
    assert ours.tolist() == [[80, 120, 3, 28, 64, 64]]


def test_latents_are_scaled_as_the_stock_autoencoder_expects(loaded, pipeline):
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    moments = loaded.encode_image(pixels)
    latents = loaded.sample_latents(moments, torch.zeros_like(moments.mean))
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
        picture = pipeline.vae.decode(expected / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(loaded.decode(latents), picture)


def test_per_channel_latent_statistics_are_undone_by_decoding(copied):
    config = copied / "vae" / "config.json"
    statistics = {"latents_mean": [0.1 * i for i in range(12)], "latents_std": [1.0 + i for i in range(12)]}
    config.write_text(json.dumps({**json.loads(config.read_text()), **statistics}))
    backbone = load(copied)
    moments = backbone.encode_image(torch.rand(1, 3, 64, 64) * 2 - 1)
    latents = backbone.sample_latents(moments, torch.zeros_like(moments.mean))
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics.values())
    torch.testing.assert_close(latents, (moments.mean - mean) / std * backbone.vae.config.scaling_factor)
    with torch.no_grad():
        torch.testing.assert_close(backbone.decode(latents), backbone.vae.decode(moments.mean).sample)


def test_a_folder_of_fp16_files_only_is_accepted(copied):
    plain = load(copied)
    for file in list(copied.rglob("*.safetensors")):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    variant = load(copied)
    for name, value in plain.denoiser.state_dict().items():
        assert torch.equal(variant.denoiser.state_dict()[name], value)


def test_lower_precision_applies_to_all_but_the_autoencoder(sdxl_folder):
    backbone = load(sdxl_folder, torch.bfloat16)
    assert backbone.denoiser.dtype == backbone.text_encoders[0].dtype == torch.bfloat16
    assert backbone.vae.dtype == torch.float32
    assert backbone.encode_image(torch.zeros(1, 3, 64, 64)).mean.dtype == torch.float32


@pytest.mark.parametrize(
    "missing",
    [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "tokenizer_2/tokenizer.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_missing_component_is_named(copied, missing):
    (copied / missing).unlink()
    with pytest.raises(ModelError, match=missing.split("/")[0]):
        SdxlConfig(path=copied).check()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match="absent: no such folder"):
        SdxlConfig(path=tmp_path / "absent").check()


def test_a_missing_shard_is_an_incomplete_download(copied):
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (copied / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    weights.rename(copied / "unet" / "part-1.safetensors")
    with pytest.raises(ModelError, match="unet"):
        SdxlConfig(path=copied).check()


def test_a_unet_that_is_told_neither_six_numbers_nor_five_is_refused(copied):
    edit(copied / "unet" / "config.json", projection_class_embeddings_input_dim=4 * 8 + 32)
    with pytest.raises(ModelError, match=r"input_dim is 64; expected 80 \(the base.* or 72 \(the refiner"):
        SdxlConfig(path=copied).check()


def test_another_kind_of_unet_is_refused(copied):
    edit(copied / "unet" / "config.json", addition_embed_type=None)
    with pytest.raises(ModelError, match=r"text_time.*set kind: sd"):
        SdxlConfig(path=copied).check()


def test_a_broken_config_is_named(copied):
    (copied / "vae" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"vae/config\.json: not valid JSON"):
        SdxlConfig(path=copied).check()
