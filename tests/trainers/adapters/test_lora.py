import itertools

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from torch.nn import functional
from transformers import CLIPTextModelWithProjection

from trainers.adapters.lora import (
    TEXT_TARGETS,
    UNET_TARGETS,
    LoraConfig,
    add_lora,
    merge_text_lora,
    save_lora,
    set_lora_scale,
)

KINDS = [
    LoraConfig(rank=4, alpha=6.0, rank_stabilized=stable, dora=dora)
    for stable, dora in itertools.product((False, True), repeat=2)
]


@pytest.fixture
def make_unet(sdxl_folder):
    def make(config, dtype=torch.float32):
        unet = UNet2DConditionModel.from_pretrained(sdxl_folder / "unet", dtype=dtype).requires_grad_(False)
        add_lora(unet, config, UNET_TARGETS, seed=0)
        return unet

    return make


def trained(unet):
    """Adapters as if they had been trained for long."""
    rng = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        if parameter.requires_grad and parameter.ndim == 1:
            parameter.data *= 1 + 0.5 * torch.randn(parameter.shape, generator=rng)
        elif parameter.requires_grad:
            parameter.data.normal_(0, 0.3, generator=rng)
    return unet


def a_layer(unet):
    return next(layer for layer in unet.modules() if isinstance(layer, LoraLayer))


def inputs(layer):
    return torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))


def weight_of(layer, config):
    """What the papers say the adapted weight is."""
    factor = 6.0 / 2 if config.rank_stabilized else 6.0 / 4
    low = factor * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    weight = layer.base_layer.weight + low
    if config.dora:
        lengths = layer.lora_magnitude_vector["default"].weight
        weight = lengths[:, None] * weight / weight.norm(dim=1, keepdim=True)
    return weight


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_the_adapted_layer_is_what_the_papers_say(make_unet, config):
    layer = a_layer(trained(make_unet(config)))
    with torch.no_grad():
        expected = functional.linear(inputs(layer), weight_of(layer, config), layer.base_layer.bias)
        torch.testing.assert_close(layer(inputs(layer)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", KINDS, ids=str)
def test_an_untrained_adapter_changes_nothing(make_unet, config, dtype):
    layer = a_layer(make_unet(config, dtype))
    x = inputs(layer).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.7, -0.5])
@pytest.mark.parametrize("config", KINDS, ids=str)
def test_a_scale_blends_the_weights_of_base_and_adapter(make_unet, config, scale):
    unet = trained(make_unet(config))
    layer = a_layer(unet)
    x, base = inputs(layer), layer.base_layer.weight
    with torch.no_grad():
        weight = base + scale * (weight_of(layer, config) - base)
        whole = layer(x)
        set_lora_scale([unet], 0.3)
        set_lora_scale([unet], scale)
        expected = functional.linear(x, weight, layer.base_layer.bias)
        torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
        if scale == 0:
            torch.testing.assert_close(layer(x), layer.base_layer(x), atol=1e-6, rtol=0)
        set_lora_scale([unet], 1.0)
        assert torch.equal(layer(x), whole)


def test_a_scale_that_takes_a_row_out_of_the_base_altogether_is_still_exact(make_unet):
    config = LoraConfig(rank=4, alpha=6.0, dora=True)
    unet = trained(make_unet(config))
    layer = a_layer(unet)
    x, base = inputs(layer), layer.base_layer.weight
    with torch.no_grad():
        # Trained lengths are half of the actual ones, so that twice the difference leaves nothing of the base.
        magnitude = layer.lora_magnitude_vector["default"].weight
        low = 1.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        magnitude.copy_((base + low).norm(dim=1) / 2)
        weight = base + 2 * (weight_of(layer, config) - base)
        set_lora_scale([unet], 2.0)
        expected = functional.linear(x, weight, layer.base_layer.bias)
        torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_an_adapters_size_is_known_beforehand(make_unet, config):
    unet = make_unet(config)
    layers = [layer for layer in unet.modules() if isinstance(layer, LoraLayer)]
    announced = sum(config.size(tuple(layer.base_layer.weight.shape)) for layer in layers)
    assert announced == sum(value.numel() for value in unet.parameters() if value.requires_grad)


def test_a_text_encoders_dora_is_merged_exactly(sdxl_folder, tmp_path):
    def load():
        encoder = CLIPTextModelWithProjection.from_pretrained(sdxl_folder, subfolder="text_encoder_2")
        return encoder.requires_grad_(False).eval()

    adapted, merged, tokens = load(), load(), torch.arange(7)[None]
    add_lora(adapted, LoraConfig(rank=2, alpha=3.0, dora=True), TEXT_TARGETS, seed=0)
    save_lora(tmp_path, StableDiffusionXLPipeline, {"text_encoder_2": trained(adapted)})
    merge_text_lora(merged, tmp_path, StableDiffusionXLPipeline, "text_encoder_2")
    with torch.no_grad():
        expected = adapted(tokens).text_embeds
        torch.testing.assert_close(merged(tokens).text_embeds, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(load()(tokens).text_embeds, expected, atol=1e-2)
