"""Guidance by other versions of a model: rows of one batch equal models of their own."""

# pyright: basic

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
from trainers.sampling import generate, noise_rng
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
    for seed, place in enumerate((folder, folder / "weak")):
        save_lora(place, model.pipeline, {next(iter(model.networks)): adapted(config, seed).denoiser})
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
        self._model, self.rows, self.latents = model, [], []

    def __getattr__(self, name):
        return getattr(self._model, name)

    def denoise(self, x_t, t, condition):
        self.rows.append(len(x_t))
        return self._model.denoise(x_t, t, condition)

    def decode(self, latents):
        self.latents.append(latents)
        return self._model.decode(latents)


def latents(model, guidance, **changes):
    """What is decoded in the end."""
    pictures(counting := Counting(model), guidance, **changes)
    return torch.cat(counting.latents)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


STOCK = {
    "sd": {"safety_checker": None, "requires_safety_checker": False},
    "sdxl": {"add_watermarker": False},
    "sana": {},
}
CALLED = {
    "sd": {},
    "sdxl": {},
    "sana": {
        "complex_human_instruction": INSTRUCTION.split("\n"),
        "max_sequence_length": 24,
        "use_resolution_binning": False,
    },
}


def test_classifier_free_guidance_of_an_adapter_is_the_stock_pipelines(loaded):
    model, config = loaded
    kind = config.kind
    pipeline = model.pipeline.from_pretrained(config.path, local_files_only=True, **STOCK[kind])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(model.lineage.folder)
    pipeline.scheduler = model.sampling_scheduler("euler")
    shape = model.latent_shape(64, 64)
    theirs = pipeline(
        [str(request.prompt) for request in REQUESTS], num_inference_steps=4, guidance_scale=4.0, height=64, width=64,
        latents=torch.stack([torch.randn(shape, generator=noise_rng(request)) for request in REQUESTS]),
        output_type="latent", **CALLED[kind],
    ).images  # fmt: skip
    assert_same(latents(model, ClassifierFree(scale=4.0)), theirs)


def wig(call, scale):
    return call("between", None) + scale * (call("trained", "prompt") - call("between", None))


def cfg(call, scale, version="trained"):
    return call(version, None) + scale * (call(version, "prompt") - call(version, None))


BY_HAND = {
    "cfg below zero": (ClassifierFree(scale=-2.0), lambda call, _: cfg(call, -2.0)),
    "wig": (WeightInterpolated(scale=3.0, omega=0.3), lambda call, _: wig(call, 3.0)),
    "wig at zero": (WeightInterpolated(scale=0.0, omega=0.3), lambda call, _: call("between", None)),
    "wig below zero": (WeightInterpolated(scale=-2.0, omega=0.3), lambda call, _: wig(call, -2.0)),
    "wig within an interval": (
        WeightInterpolated(scale=3.0, omega=0.3, interval=Interval(start=0.2, end=0.6)),
        lambda call, left: wig(call, 3.0) if 0.2 <= 1 - left < 0.6 else call("trained", "prompt"),
    ),
    "autoguidance": (
        AutoGuidance(scale=1.5, cfg_scale=3.0),
        lambda call, _: cfg(call, 3.0, "weak") + 1.5 * (cfg(call, 3.0) - cfg(call, 3.0, "weak")),
    ),
    "autoguidance at zero": (AutoGuidance(scale=0.0, cfg_scale=3.0), lambda call, _: cfg(call, 3.0, "weak")),
    "autoguidance below zero, from the base": (
        AutoGuidance(scale=-1.0, cfg_scale=3.0, weak="base"),
        lambda call, _: 2 * cfg(call, 3.0, "base") - cfg(call, 3.0),
    ),
}


@pytest.fixture(scope="module")
def apart(loaded):
    """A model of its own for every version, without adapters."""
    versions = {"trained": (0, 1.0), "weak": (1, 1.0), "base": (0, 0.0), "between": (0, 0.3)}
    return {name: merged(loaded[1], *version) for name, version in versions.items()}


@torch.no_grad()
def drawn_by_hand(models, combine):
    """One picture at a time, one prediction a call; `combine` is told what share of the timesteps is left."""
    found, model = [], models["trained"]
    for request in REQUESTS:
        told = {None: None, "prompt": request.prompt}
        conditions = {key: model.prepare([prompt], 64, 64) for key, prompt in told.items()}
        scheduler = model.sampling_scheduler("euler")
        scheduler.set_timesteps(4)
        x = torch.randn(1, *model.latent_shape(64, 64), generator=noise_rng(request)) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x_t = scheduler.scale_model_input(x, t)

            def call(version, key, x_t=x_t, t=t, conditions=conditions):
                return models[version].denoise(x_t, t[None], conditions[key])

            x = scheduler.step(combine(call, (float(t) + 1) / 1000), t, x, return_dict=False)[0]
        found.append(x)
    return torch.cat(found)


@pytest.mark.parametrize("case", BY_HAND)
def test_a_batch_is_what_separate_calls_of_separate_models_draw_by_the_formula(loaded, apart, case):
    guidance, combine = BY_HAND[case]
    assert_same(latents(loaded[0], guidance), drawn_by_hand(apart, combine))


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


def test_limits_of_guidance_are_one_another(loaded):
    model, _ = loaded
    plain = latents(model, ClassifierFree(scale=1.0))
    assert_same(latents(model, WeightInterpolated(scale=1.0, omega=0.4)), plain)
    assert_same(latents(model, AutoGuidance(scale=1.0, cfg_scale=1.0)), plain)
    guided = latents(model, ClassifierFree(scale=4.0))
    assert_same(latents(model, WeightInterpolated(scale=4.0, omega=1.0)), guided)
    assert_same(latents(model, AutoGuidance(scale=1.0, cfg_scale=4.0)), guided)


@pytest.mark.parametrize("guidance", [WeightInterpolated(omega=0.3), AutoGuidance()], ids=lambda one: one.kind)
def test_one_prompt_and_seed_give_one_picture_at_any_batch_size(loaded, guidance):
    together, alone = (latents(loaded[0], guidance, batch_size=size) for size in (2, 1))
    assert_same(together, alone)


def test_versions_of_a_model_that_was_not_trained_are_one(loaded):
    base = loaded[1].load(CPU, torch.float32)
    base.lineage = Lineage(None)
    expected = latents(base, ClassifierFree(scale=4.0))
    assert_same(latents(base, AutoGuidance(scale=3.0, cfg_scale=4.0)), expected)
    assert_same(latents(base, WeightInterpolated(scale=4.0)), expected)


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
    guided = latents(counting, WeightInterpolated(scale=3.0, omega=1.0))
    assert_same(guided, latents(dora, ClassifierFree(scale=3.0)))
    pictures(counting := Counting(dora), WeightInterpolated(scale=3.0, omega=0.5))
    assert counting.rows == [2, 2] * 4
