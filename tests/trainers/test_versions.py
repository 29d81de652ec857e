"""Guidance by other versions of a model: rows of one batch equal models of their own."""

import numpy as np
import pytest
import torch

from tests.trainers.conftest import build_sdxl
from tests.trainers.models import INSTRUCTION, build_sana, build_sd
from trainers.adapters.lora import LoraConfig, add_lora, save_lora
from trainers.adapters.rows import lora_layers
from trainers.backbones.sana import SanaConfig
from trainers.backbones.sd import SdConfig
from trainers.backbones.sdxl import SdxlConfig
from trainers.errors import ModelError
from trainers.guidance import AutoGuidance, ClassifierFree, Interval, SamplingConfig, WeightInterpolated
from trainers.prompt import Prompt, Request
from trainers.sampling import generate
from trainers.version import BASE, TRAINED, WEAK, Lineage, Version

CPU = torch.device("cpu")
CONFIGS = {
    "sd": (SdConfig, build_sd, {}),
    "sdxl": (SdxlConfig, build_sdxl, {}),
    "sana": (SanaConfig, build_sana, {"instruction": INSTRUCTION, "max_sequence_length": 24}),
}
REQUESTS = [Request(Prompt(text="a zog"), 0), Request(Prompt(text="a red star"), 1)]
OMEGA = Version(scale=0.3)


@pytest.fixture(scope="module", params=CONFIGS)
def loaded(request, tmp_path_factory):
    """A model with a trained adapter, and what loads its base."""
    cls, build, options = CONFIGS[request.param]
    config = cls(path=build(tmp_path_factory.mktemp("models") / request.param), **options)
    model = adapted(config, 0)
    folder = tmp_path_factory.mktemp("adapter")
    save_lora(folder / "weak", model.pipeline, {next(iter(model.networks)): adapted(config, 1).denoiser})
    model.lineage = Lineage(folder)
    return model, config


def adapted(config, seed, **options):
    model = config.load(CPU, torch.float32)
    add_lora(model.denoiser, LoraConfig(rank=4, alpha=6.0, **options), config.lora_targets, seed)
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.denoiser.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=rng)
    model.denoiser.requires_grad_(requires_grad=False).eval()
    return model


def merged(config, seed, scale):
    """The base with scale (alpha / rank) B A added to its weights, and no adapter."""
    model, layers = config.load(CPU, torch.float32), lora_layers(adapted(config, seed).denoiser)
    weights = dict(model.denoiser.named_parameters())
    for name, layer in layers.items():
        low = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        weights[f"{name}.weight"].data += scale * 6.0 / 4 * low
    return model


@torch.no_grad()
def predict(model, count=1):
    condition = model.prepare([Prompt(text="a zog")] * count, 64, 64)
    x_t = torch.randn(1, *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    return model.denoise(x_t.expand(count, -1, -1, -1), torch.full((count,), 500), condition)


def test_rows_of_one_batch_are_models_with_merged_weights(loaded):
    model, config = loaded
    versions = [TRAINED, WEAK, BASE, OMEGA]
    apart = [merged(config, seed, scale) for seed, scale in ((0, 1.0), (1, 1.0), (0, 0.0), (0, 0.3))]
    before = predict(model)
    with model.versions(versions).acting(versions):
        together = predict(model, 4)
    expected = torch.cat([predict(one) for one in apart])
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-5)
    assert all((expected[i] - expected[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))
    assert torch.equal(predict(model), before)


def test_an_adapters_scale_is_that_row_for_row_without_a_weak_version_too(loaded):
    model, config = loaded
    with model.versions([OMEGA, TRAINED]).acting([OMEGA, TRAINED], 2):
        together = predict(model, 4)
    expected = torch.cat([predict(merged(config, 0, scale)) for scale in (0.3, 0.3, 1.0, 1.0)])
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-5)


def config(guidance, **changes):
    tree = {"resolution": 64, "steps": 4, "batch_size": 2, "scheduler": "euler", "guidance": guidance}
    return SamplingConfig.model_validate({**tree, **changes})


def pictures(model, guidance, **changes):
    drawn = generate(model, REQUESTS, config(guidance, **changes))
    return np.stack([np.asarray(sample.image, dtype=int) for sample in drawn])


class Counting:
    """A model that keeps what it was called with."""

    def __init__(self, model):
        self._model, self.rows = model, []

    def __getattr__(self, name):
        return getattr(self._model, name)

    def denoise(self, x_t, t, condition):
        self.rows.append(len(x_t))
        return self._model.denoise(x_t, t, condition)


@pytest.mark.parametrize(
    ("guidance", "rows"),
    [
        (WeightInterpolated(scale=3.0, omega=0.3), [4] * 4),
        (WeightInterpolated(scale=3.0), [4] * 4),
        (AutoGuidance(), [8] * 4),
        (AutoGuidance(cfg_scale=1.0, weak="base"), [4] * 4),
        (AutoGuidance(scale=0.0, cfg_scale=1.0), [2] * 4),
        (WeightInterpolated(scale=3.0, interval=Interval(start=0.9)), [2, 2, 2, 4]),
        (AutoGuidance(interval=Interval(start=0.9)), [2, 2, 2, 8]),
    ],
)
def test_a_step_is_one_call_of_the_rows_that_count(loaded, guidance, rows):
    counting = Counting(loaded[0])
    pictures(counting, guidance)
    assert counting.rows == rows


def levels_apart(a, b):
    return int(np.abs(a - b).max())


def test_limits_of_guidance_are_one_another(loaded):
    model, _ = loaded
    plain = pictures(model, ClassifierFree(scale=1.0))
    assert levels_apart(pictures(model, WeightInterpolated(scale=1.0, omega=0.4)), plain) <= 1
    assert levels_apart(pictures(model, AutoGuidance(scale=1.0, cfg_scale=1.0)), plain) <= 1
    guided = pictures(model, ClassifierFree(scale=4.0))
    assert levels_apart(pictures(model, WeightInterpolated(scale=4.0, omega=1.0)), guided) <= 1
    assert levels_apart(pictures(model, AutoGuidance(scale=1.0, cfg_scale=4.0)), guided) <= 1


@pytest.mark.parametrize("guidance", [WeightInterpolated(omega=0.3), AutoGuidance()], ids=lambda one: one.kind)
def test_one_prompt_and_seed_give_one_picture_at_any_batch_size(loaded, guidance):
    together, alone = (pictures(loaded[0], guidance, batch_size=size) for size in (2, 1))
    assert levels_apart(together, alone) <= 1


def test_versions_of_a_model_that_was_not_trained_are_one(loaded):
    base = loaded[1].load(CPU, torch.float32)
    base.lineage = Lineage(None)
    expected = pictures(base, ClassifierFree(scale=4.0))
    assert levels_apart(pictures(base, AutoGuidance(scale=3.0, cfg_scale=4.0)), expected) <= 1
    assert levels_apart(pictures(base, WeightInterpolated(scale=4.0)), expected) <= 1


def test_a_missing_weak_version_is_known_before_anything_is_drawn(loaded, tmp_path):
    model = adapted(loaded[1], 0)
    model.lineage = Lineage(tmp_path)
    counting = Counting(model)
    with pytest.raises(ModelError, match="no such folder; expected the weak version"):
        pictures(counting, AutoGuidance())
    assert not counting.rows


def test_doras_versions_take_turns(loaded):
    dora = adapted(loaded[1], 0, dora=True)
    counting = Counting(dora)
    guided = pictures(counting, WeightInterpolated(scale=3.0, omega=1.0))
    assert levels_apart(guided, pictures(dora, ClassifierFree(scale=3.0))) <= 1
    pictures(counting := Counting(dora), WeightInterpolated(scale=3.0, omega=0.5))
    assert counting.rows == [2, 2] * 4


def test_weights_of_the_base_itself_have_no_way_back(loaded):
    whole = loaded[1].load(CPU, torch.float32)
    whole.lineage = Lineage(loaded[0].lineage.folder, whole=True)
    with pytest.raises(ModelError, match="weights of the base itself were trained"):
        pictures(whole, WeightInterpolated())
