"""SDXL's refiner, finishing what the base began."""

# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportOperatorIssue=false

import diffusers
import pytest
import torch

from tests.trainers.models import build_refiner
from trainers.adapters.lora import LORA_FILE, UNET_TARGETS, LoraConfig, add_lora, save_lora
from trainers.backbones.sdxl import SdxlConfig
from trainers.errors import ConfigError, ModelError
from trainers.guidance import ClassifierFree, SamplingConfig
from trainers.prompt import Prompt, Request
from trainers.sampling import generate, noise_rng

CPU = torch.device("cpu")
PROMPTS = ["a zog", "b"]
OPTIONS = {"clip_sample": False, "set_alpha_to_one": False}


@pytest.fixture(scope="module")
def unet_folder(sdxl_folder, tmp_path_factory):
    return build_refiner(tmp_path_factory.mktemp("models") / "refiner", sdxl_folder)


@pytest.fixture(scope="module")
def stock_folder(sdxl_folder, tmp_path_factory):
    return build_refiner(tmp_path_factory.mktemp("models") / "refiner", sdxl_folder, whole=True)


@pytest.fixture
def make(sdxl_folder, unet_folder):
    def make(**options):
        return SdxlConfig(path=sdxl_folder, denoiser=unet_folder, **{"after_base": True, **options})

    return make


def final_latents(model, monkeypatch):
    """Latents before they are decoded, ten steps from the noise of two prompts."""
    final = []
    monkeypatch.setattr(model, "decode", lambda latents: final.append(latents) or torch.zeros(len(latents), 3, 8, 8))
    requests = [Request(Prompt(text=prompt), 7) for prompt in PROMPTS]
    config = SamplingConfig(resolution=64, steps=10, scheduler="ddim", guidance=ClassifierFree(scale=3.0))
    list(generate(model, requests, config))
    noise = torch.stack([torch.randn(model.latent_shape(64, 64), generator=noise_rng(one)) for one in requests])
    return final[0], noise


def stock(cls, folder):
    pipeline = cls.from_pretrained(folder, local_files_only=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, **OPTIONS)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_pictures_equal_those_of_the_stock_pipelines_in_turn(make, sdxl_folder, stock_folder, monkeypatch):
    ours, noise = final_latents(make().load(CPU, torch.float32), monkeypatch)
    base = stock(diffusers.StableDiffusionXLPipeline, sdxl_folder)
    refiner = stock(diffusers.StableDiffusionXLImg2ImgPipeline, stock_folder)
    shared = {"num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "latent"}
    begun = base(PROMPTS, latents=noise, height=64, width=64, denoising_end=0.8, **shared).images
    # diffusers takes latents for a picture unless they have four channels.
    monkeypatch.setattr(refiner, "prepare_latents", lambda *_, **__: begun)
    blank = torch.zeros(2, 3, 64, 64)
    theirs = refiner(PROMPTS, image=blank, denoising_start=0.8, original_size=(64, 64), target_size=(64, 64), **shared)
    torch.testing.assert_close(ours, theirs.images, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, begun, atol=1e-2)


def test_the_base_is_not_loaded_before_pictures_are_drawn(make):
    model = make().load(CPU, torch.float32)
    model.condition(model.encode_prompts(["a"]), [])
    assert "base" not in vars(model)


def test_the_base_is_freed_between_pictures(make):
    model, told = make().load(CPU, torch.float32), [Prompt(text="a zog")]
    x_t, t = torch.randn(1, *model.latent_shape(64, 64)), torch.tensor([500])
    expected = model.denoise(x_t, t, model.prepare(told, 64, 64))
    model.rest([])
    assert "base" not in vars(model)
    assert torch.equal(model.denoise(x_t, t, model.prepare(told, 64, 64)), expected)


def test_what_both_have_is_loaded_once(make):
    model = make().load(CPU, torch.float32)
    assert model.base.vae is model.vae
    assert model.base.text_encoders[1] is model.text_encoders[0]


def test_an_adapter_of_the_refiner_leaves_the_base_as_it_is(make, sdxl_folder):
    model = make().load(CPU, torch.float32)
    add_lora(model.denoiser, LoraConfig(rank=2), UNET_TARGETS, seed=0)
    for parameter in model.denoiser.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    plain = SdxlConfig(path=sdxl_folder).load(CPU, torch.float32)
    alone = make(after_base=False).load(CPU, torch.float32)
    x_t, told = torch.randn(1, *model.latent_shape(64, 64)), [Prompt(text="a zog")]
    for t, other, equal in ((torch.tensor([200]), plain, True), (torch.tensor([199]), alone, False)):
        mine = model.denoise(x_t, t, model.prepare(told, 64, 64))
        theirs = other.denoise(x_t, t, other.prepare(told, 64, 64))
        assert torch.equal(mine, theirs) is equal, t


def test_training_hears_nothing_of_the_base(make):
    model, alone = make().load(CPU, torch.float32), make(after_base=False).load(CPU, torch.float32)
    x_t, t = torch.randn(1, *model.latent_shape(64, 64)), torch.tensor([900])
    condition = alone.prepare([Prompt(text="a zog")], 64, 64)
    assert torch.equal(model.denoise(x_t, t, condition), alone.denoise(x_t, t, condition))


def test_the_base_may_draw_with_an_adapter(make, sdxl_folder, tmp_path):
    base = SdxlConfig(path=sdxl_folder).load(CPU, torch.float32)
    add_lora(base.denoiser, LoraConfig(rank=2), UNET_TARGETS, seed=0)
    for parameter in base.denoiser.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    save_lora(tmp_path, base.pipeline, {"unet": base.denoiser})
    model = make(base_adapter=tmp_path).load(CPU, torch.float32)
    x_t, t, told = torch.randn(1, *model.latent_shape(64, 64)), torch.tensor([500]), [Prompt(text="a zog")]
    mine, expected = (m.denoise(x_t, t, m.prepare(told, 64, 64)) for m in (model, base))
    torch.testing.assert_close(mine, expected)
    untouched = make().load(CPU, torch.float32)
    assert not torch.allclose(mine, untouched.denoise(x_t, t, untouched.prepare(told, 64, 64)))


def test_options_of_the_refiner_are_refused_where_they_do_nothing(make, sdxl_folder, tmp_path):
    with pytest.raises(ConfigError, match="after_base with SDXL's base"):
        SdxlConfig(path=sdxl_folder, after_base=True).check()
    (tmp_path / LORA_FILE).write_bytes(b"")
    with pytest.raises(ConfigError, match="base_adapter without after_base"):
        make(after_base=False, base_adapter=tmp_path).check()


def test_a_folder_without_the_base_is_refused(stock_folder, unet_folder):
    with pytest.raises(ModelError, match="the refiner's; after_base expects the base there"):
        SdxlConfig(path=stock_folder, denoiser=unet_folder, after_base=True).check()


def test_an_adapter_that_is_not_there_is_refused(make, tmp_path):
    with pytest.raises(ModelError, match="expected the adapter of a finished trial"):
        make(base_adapter=tmp_path).check()
