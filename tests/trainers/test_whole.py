"""Guidance by other versions of a model whose every weight was trained: sets of weights that take turns."""

# pyright: basic

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainers.ip_adapters import build_config, write_pairs
from tests.trainers.test_versions import CONFIGS, CPU, Counting, assert_same, latents, pictures
from trainers import tuning
from trainers.adapters.rows import lora_layers
from trainers.errors import ModelError
from trainers.guidance import AutoGuidance, ClassifierFree, SamplingConfig, WeightInterpolated
from trainers.methods.dreambooth import DreamboothConfig
from trainers.prompt import Prompt, Request
from trainers.rundir import RunDir
from trainers.sampling import generate
from trainers.train import train
from trainers.version import BASE, TRAINED, WEAK, Version

HERE: Any = SimpleNamespace(device=CPU)
OMEGA = Version(scale=0.3)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd": ("sd", {"lora": None}),
    "sdxl and its text encoders": ("sdxl", {"lora": None, "train_text_encoders": True}),
    "sd and adapters of its text encoder": ("sd", {"lora": None, "text_encoder_lora": {"rank": 2}}),
    "text encoders of sdxl and adapters of its unet": ("sdxl", {"lora": {"rank": 4}, "train_text_encoders": True}),
    "sana": ("sana", {"lora": None}),
}


@pytest.fixture(scope="module", params=CASES)
def config(request, tmp_path_factory):
    kind, ways = CASES[request.param]
    return training(kind, ways, tmp_path_factory.mktemp("models"))


def training(kind, ways, folder):
    _, build, options = CONFIGS[kind]
    backbone = {"kind": kind, "path": build(folder / kind), **options}
    data = {"kind": "folder", "path": folder, "resolution": 64, "instance_prompt": "a"}
    tree = {"backbone": backbone, "data": data, "steps": 10, "batch_size": 1, "weak_fraction": 0.3, **ways}
    return DreamboothConfig.model_validate(tree)


def levels_apart(a, b):
    return int(np.abs(a - b).max())


def shaken(config, seed):
    """A model as if it had been trained, and what is trained of it."""
    backbone = config.backbone.load(CPU, torch.float32)
    trained = tuning.tune(backbone, config, seed)
    rng = torch.Generator().manual_seed(seed)
    for parameter in (value for one in trained.values() for value in one.parameters().values()):
        parameter.data.add_(torch.randn(parameter.shape, generator=rng), alpha=0.05)
    return backbone, trained


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    """What a training leaves behind."""
    return exported(config, tmp_path_factory.mktemp("adapter"))


def exported(config, folder):
    for seed, place in enumerate((folder, folder / "weak")):
        tuning.export(*shaken(config, seed), place)
    return folder


@pytest.fixture(scope="module")
def model(config, folder):
    return config.load_trained(folder, HERE)


def interpolated(config, seed, scale):
    """The base with its weights moved that far towards those of `shaken`, and no adapter."""
    base, (end, _) = config.backbone.load(CPU, torch.float32), shaken(config, seed)
    for name, network in base.networks.items():
        weights, layers = dict(network.named_parameters()), lora_layers(end.networks[name])
        for key, layer in layers.items():
            weights[f"{key}.weight"].data += scale * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        for key, value in end.networks[name].named_parameters() if not layers else ():
            weights[key].data += scale * (value.data - weights[key].data)
    return base


@torch.no_grad()
def predict(model):
    condition = model.prepare([Prompt(text="a zog")], 64, 64)
    x_t = torch.randn(1, *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    return model.denoise(x_t, torch.tensor([500]), condition)


def test_every_version_is_a_model_with_weights_of_its_own(config, model):
    check_versions(config, model)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_versions_of_adapted_text_encoders_are_models_too(kind, tmp_path):
    config = training(kind, {"text_encoder_lora": {"rank": 2}}, tmp_path)
    check_versions(config, config.load_trained(exported(config, tmp_path / "adapter"), HERE))


def check_versions(config, model):
    before, found = predict(model), []
    versions = model.versions([TRAINED, WEAK, BASE, OMEGA])
    for version in (TRAINED, WEAK, BASE, OMEGA):
        with versions.acting([version]):
            found.append(predict(model))
    apart = [interpolated(config, seed, scale) for seed, scale in ((0, 1.0), (1, 1.0), (0, 0.0), (0, 0.3))]
    expected = torch.cat([predict(one) for one in apart])
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-5, rtol=1e-5)
    assert all((expected[i] - expected[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))
    assert torch.equal(predict(model), before)


def test_limits_of_guidance_are_one_another(model):
    guided = latents(model, ClassifierFree(scale=4.0))
    assert_same(latents(model, WeightInterpolated(scale=4.0, omega=1.0)), guided)
    assert_same(latents(model, AutoGuidance(scale=1.0, cfg_scale=4.0)), guided)
    assert_same(latents(model, WeightInterpolated(scale=1.0, omega=0.4)), latents(model, ClassifierFree(scale=1.0)))


def test_a_step_is_one_call_for_each_set_of_weights(model):
    for guidance, rows in (
        (WeightInterpolated(scale=3.0, omega=0.3), [2, 2]),
        (AutoGuidance(weak="base"), [4, 4]),
        (AutoGuidance(scale=0.0, cfg_scale=1.0), [2]),
    ):
        counting = Counting(model)
        pictures(counting, guidance)
        assert counting.rows == rows * 4


def test_how_much_memory_other_weights_take_is_said(config, model, caplog):
    with caplog.at_level(logging.INFO, "trainers.whole"):
        model.versions([BASE, TRAINED])
    whole = config.whole_networks()
    size = sum(value.nbytes for name in whole for value in model.networks[name].parameters()) / 2**20
    assert caplog.messages == [f"guidance keeps {size:.0f} MiB more: other weights of {', '.join(whole)}"]


def test_a_missing_weak_version_is_known_before_anything_is_drawn(config, tmp_path):
    tuning.export(*shaken(config, 0), tmp_path)
    counting = Counting(config.load_trained(tmp_path, HERE))
    with pytest.raises(ModelError, match="no such folder; expected the weak version"):
        pictures(counting, AutoGuidance())
    assert not counting.rows


def test_pictures_of_a_model_in_training_are_led_away_from_its_base(make_config, accelerator, tmp_path):
    guidance = {"kind": "wig", "scale": 8.0, "omega": 0.3}
    samples = {"every": 2, "prompts": ["a zog"], "resolution": 64, "steps": 4, "guidance": guidance}
    config = make_config(kind="dreambooth", lora=None, steps=2, batch_size=2, samples=samples)
    run = RunDir(tmp_path / "run")
    train(config, run, 0, None, accelerator)
    drawn = np.asarray(Image.open(run.samples / "step-0000002" / "00_0.png"), dtype=int)

    def after(**changes):
        wanted = {key: value for key, value in samples.items() if key in SamplingConfig.model_fields}
        sampling = SamplingConfig.model_validate({**wanted, **changes})
        loaded = config.load_trained(run.adapter, accelerator)
        (sample,) = generate(loaded, [Request(Prompt(text="a zog"), 0)], sampling)
        return np.asarray(sample.image, dtype=int)

    assert levels_apart(drawn, after()) <= 1
    assert levels_apart(drawn, after(guidance={"kind": "cfg", "scale": 8.0})) > 1


@pytest.mark.parametrize("place", ["lora", "text_encoder_lora"])
def test_a_weak_checkpoint_with_dora_is_refused_when_a_study_is_read(make_config, place):
    config = make_config(**{place: {"rank": 2, "dora": True}}, weak_fraction=0.5)
    with pytest.raises(ValueError, match=r"guidance\.weak is checkpoint with DoRA, .* set guidance\.weak: base"):
        config.check_guidance(AutoGuidance())
    config.check_guidance(AutoGuidance(weak="base"))


def test_a_weak_ip_adapter_and_the_base_of_its_whole_unet_are_refused_when_a_study_is_read(sdxl_folder, tmp_path):
    pairs = write_pairs(tmp_path / "pairs")
    config = build_config(sdxl_folder, pairs, weak_fraction=0.5)
    with pytest.raises(ValueError, match=r"guidance\.weak is checkpoint with an IP-Adapter"):
        config.check_guidance(AutoGuidance())
    config.check_guidance(WeightInterpolated())
    with pytest.raises(ValueError, match="weights of the base itself are trained"):
        build_config(sdxl_folder, pairs, train_unet=True).check_guidance(WeightInterpolated())
