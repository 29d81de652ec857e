"""The released 1.6B model: its sizes, on the meta device, without its weights."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model

from tests.trainers.models import build_sana
from trainers.backbones.sana import SanaConfig
from trainers.batch import Geometry


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """The released 1.6B model's configurations, with weight files that end after their headers."""
    path = build_sana(tmp_path_factory.mktemp("models") / "full")
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    with torch.device("meta"):
        networks = {
            "transformer": SanaTransformer2DModel(),
            "vae": AutoencoderDC(
                encoder_block_types=blocks,
                decoder_block_types=blocks,
                downsample_block_type="conv",
                upsample_block_type="interpolate",
                scaling_factor=0.41407,
            ),
            "text_encoder": Gemma2Model(Gemma2Config()),
        }
    for name, network in networks.items():
        network.config.save_pretrained(path / name) if name == "text_encoder" else network.save_config(path / name)
        (weights,) = (path / name).glob("*.safetensors")
        header = {
            key: {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [0, 0]}
            for key, value in network.state_dict().items()
        }
        text = json.dumps(header).encode()
        weights.write_bytes(len(text).to_bytes(8, "little") + text)
    return path, networks


def test_the_released_models_sizes_fit_without_its_weights(full_size, monkeypatch):
    path, networks = full_size
    classes = {type(network): network for network in networks.values()}
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which the meta device does not have
    monkeypatch.setattr(SanaConfig, "load_network", lambda _, cls, *where: classes[cls].eval())
    config = SanaConfig(path=path).model_copy(update={"text_encoder_device": "meta"})
    config.check()
    assert (config.downscale, config.shift) == (32, 3.0)
    parameters = sum(math.prod(shape) for shape in config.weight_shapes()["transformer"].values())
    assert round(parameters / 1e6) == 1604  # as its authors count
    backbone = config.load(torch.device("meta"), torch.float32)
    assert backbone.latent_shape(1024, 768) == (32, 32, 24)
    moments = backbone.encode_image(torch.zeros(1, 3, 1024, 1024))
    assert moments.mean.shape == (1, *backbone.latent_shape(1024, 1024))
    condition = backbone.condition(backbone.encode_prompts(["a", None]), [Geometry.whole(1024, 1024)] * 2)
    assert condition.text.hidden.shape == (2, 300, 2304)
    x_t = torch.zeros(2, *backbone.latent_shape(1024, 1024), device="meta")
    assert backbone.denoise(x_t, torch.zeros(2, device="meta"), condition).shape == x_t.shape
    assert backbone.decode(x_t[:1]).shape == (1, 3, 1024, 1024)
