import json
import shutil

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from safetensors.torch import load_file, save_file

from tests.contracts.backbone import UnetContract
from tests.trainers.models import build_sd
from trainers.adapters.lora import TEXT_TARGETS, UNET_TARGETS, LoraConfig, add_lora, save_lora
from trainers.backbones.sd import SdConfig
from trainers.batch import Geometry
from trainers.errors import ConfigError, ModelError
from trainers.guidance import ClassifierFree, SamplingConfig
from trainers.loss import LossConfig
from trainers.prompt import Prompt, Request
from trainers.sampling import generate, noise_rng

CPU = torch.device("cpu")
STOCK = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}
REQUESTS = [Request(Prompt(text="a red star"), 0), Request(Prompt(text="b"), 3)]
STEPS = 4


def load(folder, dtype=torch.float32, **options):
    return SdConfig(path=folder, **options).load(CPU, dtype)


def stock_pipeline(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edit(file, **changes):
    kept = {key: value for key, value in {**json.loads(file.read_text()), **changes}.items() if value is not ...}
    file.write_text(json.dumps(kept))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_sd(tmp_path_factory.mktemp("models") / "sd", safety=True)


@pytest.fixture(scope="module")
def v_folder(tmp_path_factory):
    return build_sd(tmp_path_factory.mktemp("models") / "sd_v", prediction_type="v_prediction", seed=1)


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture(scope="module")
def v_loaded(v_folder):
    return load(v_folder)


@pytest.fixture(scope="module")
def pipeline(folder):
    return stock_pipeline(folder)


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "sd")


@pytest.fixture
def v_copied(v_folder, tmp_path):
    return shutil.copytree(v_folder, tmp_path / "sd_v")


class TestSd(UnetContract):
    @pytest.fixture
    def backbone(self, loaded):
        return loaded


class TestSdOfVelocity(UnetContract):
    @pytest.fixture
    def backbone(self, v_loaded):
        return v_loaded


@pytest.mark.parametrize("prompt", ["a zog on a blue field", "", "a prompt longer than the tokenizer's window " * 3])
def test_embeddings_equal_the_stock_pipelines(loaded, pipeline, prompt):
    hidden, null = pipeline.encode_prompt(prompt, CPU, 1, do_classifier_free_guidance=True)
    assert torch.equal(loaded.encode_prompts([prompt]).hidden, hidden)
    assert torch.equal(loaded.encode_prompts([None]).hidden, null)
    assert loaded.encode_prompts([prompt]).pooled is None


def draw(backbone, monkeypatch, scheduler="ddim", negative=None, scale=3.0):
    """Final latents of our sampler."""
    final = []
    monkeypatch.setattr(backbone, "decode", lambda latents: final.append(latents) or torch.zeros(len(latents), 3, 8, 8))
    config = SamplingConfig(
        resolution=64, steps=STEPS, scheduler=scheduler, negative_prompt=negative, guidance=ClassifierFree(scale=scale)
    )
    list(generate(backbone, REQUESTS, config))
    return final[0]


def stock(pipeline, scheduler="ddim", negative=None, scale=3.0, **options):
    """What the stock pipeline makes of the same initial noise."""
    ddim = {"clip_sample": False, "set_alpha_to_one": False} if scheduler == "ddim" else {}
    pipeline.scheduler = getattr(diffusers, STOCK[scheduler]).from_config(pipeline.scheduler.config, **ddim, **options)
    return pipeline(
        [request.prompt.text for request in REQUESTS],
        negative_prompt=None if negative is None else [negative] * len(REQUESTS),
        generator=[noise_rng(request) for request in REQUESTS],
        num_inference_steps=STEPS, guidance_scale=scale, height=64, width=64, output_type="latent",
    ).images  # fmt: skip


@pytest.mark.parametrize("scheduler", STOCK)
@pytest.mark.parametrize("kind", ["folder", "v_folder"])
def test_the_sampling_loop_equals_the_stock_pipeline(request, kind, monkeypatch, scheduler):
    path = request.getfixturevalue(kind)
    ours = draw(load(path), monkeypatch, scheduler)
    torch.testing.assert_close(ours, stock(stock_pipeline(path), scheduler), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("negative", "scale"), [("", 3.0), ("grey", 3.0), (None, 1.0)])
def test_negative_prompts_and_no_guidance_mean_what_they_mean_to_the_stock_pipeline(
    folder, loaded, monkeypatch, negative, scale
):
    ours = draw(loaded, monkeypatch, negative=negative, scale=scale)
    theirs = stock(stock_pipeline(folder), negative=negative, scale=scale)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_latents_are_scaled_as_the_stock_autoencoder_expects(loaded, pipeline):
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    moments = loaded.encode_image(pixels)
    latents = loaded.sample_latents(moments, torch.zeros_like(moments.mean))
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
        picture = pipeline.vae.decode(expected / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(loaded.decode(latents), picture)


def age(folder):
    """Make a folder what those of 2022 were: fewer keys, an eos token nobody has, positions among the weights."""
    edit(folder / "vae" / "config.json", scaling_factor=..., latents_mean=..., latents_std=..., force_upcast=...)
    edit(folder / "unet" / "config.json", addition_embed_type=..., class_embed_type=..., time_cond_proj_dim=...)
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type=..., timestep_spacing=...)
    edit(folder / "text_encoder" / "config.json", eos_token_id=2, bos_token_id=0, pad_token_id=1)
    weights = folder / "text_encoder" / "model.safetensors"
    prefixed = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(weights).items()}
    save_file(prefixed | {"text_model.embeddings.position_ids": torch.arange(32)[None]}, weights, {"format": "pt"})
    tokenizer = folder / "tokenizer"
    parts = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    (tokenizer / "vocab.json").write_text(json.dumps(parts["vocab"]))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    (tokenizer / "tokenizer.json").unlink()
    return folder


def test_a_stock_folder_of_2022_works_unedited(copied, loaded, monkeypatch):
    assert {"safety_checker", "feature_extractor"} <= {path.name for path in copied.iterdir()}
    shapes = SdConfig(path=copied).weight_shapes()
    old = load(age(copied))
    pipeline = stock_pipeline(copied)
    assert torch.equal(old.encode_prompts(["a zog"]).hidden, loaded.encode_prompts(["a zog"]).hidden)
    hidden, _ = pipeline.encode_prompt("a zog", CPU, 1, do_classifier_free_guidance=False)
    assert torch.equal(old.encode_prompts(["a zog"]).hidden, hidden)
    torch.testing.assert_close(draw(old, monkeypatch), stock(pipeline), atol=1e-4, rtol=1e-4)
    aged = SdConfig(path=copied).weight_shapes()
    assert sorted(aged["text_encoder"].values()) == sorted(shapes["text_encoder"].values())


@pytest.mark.parametrize("within", [True, False])
def test_unet_autoencoder_and_scheduler_may_come_from_another_folder(folder, v_folder, monkeypatch, within):
    names = {"denoiser": "unet", "vae": "vae", "scheduler": "scheduler"}
    other = stock_pipeline(v_folder)
    mixed = load(folder, **{option: v_folder if within else v_folder / name for option, name in names.items()})
    assert mixed.process.prediction == "v_prediction"
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(mixed.encode_image(pixels).mean, other.vae.encode(pixels).latent_dist.mean)
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, unet=other.unet, vae=other.vae, scheduler=other.scheduler, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(mixed, monkeypatch), stock(pipeline), atol=1e-4, rtol=1e-4)


def test_a_trained_adapter_draws_the_same_in_the_stock_pipeline(folder, monkeypatch, tmp_path):
    backbone, rng = load(folder), torch.Generator().manual_seed(0)
    for name, network in backbone.networks.items():
        add_lora(network, LoraConfig(rank=4, alpha=6.0), UNET_TARGETS if name == "unet" else TEXT_TARGETS, seed=0)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.2, generator=rng)
    save_lora(tmp_path, backbone.pipeline, backbone.networks)
    pipeline = stock_pipeline(folder)
    base = stock(pipeline)
    pipeline.load_lora_weights(tmp_path)
    ours = draw(backbone, monkeypatch)
    torch.testing.assert_close(ours, stock(pipeline), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, base, atol=1e-2)
    with backbone.adapter_scale(0.0):
        torch.testing.assert_close(draw(backbone, monkeypatch), base, atol=1e-4, rtol=1e-4)


def test_another_prediction_type_is_trained_and_sampled_with(folder, monkeypatch):
    backbone = load(folder, prediction_type="v_prediction")
    assert backbone.process.prediction == SdConfig(path=folder, prediction_type="v_prediction").prediction
    theirs = stock(stock_pipeline(folder), prediction_type="v_prediction")
    torch.testing.assert_close(draw(backbone, monkeypatch), theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(theirs, stock(stock_pipeline(folder)), atol=1e-2)


def test_zero_terminal_snr_rescales_the_betas_of_training(v_folder):
    plain, zero = load(v_folder).process, load(v_folder, zero_terminal_snr=True).process
    steps = plain.alphas_cumprod / torch.cat([torch.ones(1), plain.alphas_cumprod[:-1]])
    expected = (1 - rescale_zero_terminal_snr(1 - steps)).cumprod(0)
    torch.testing.assert_close(zero.alphas_cumprod, expected, atol=1e-5, rtol=1e-4)
    assert plain.alphas_cumprod[-1] > 0 == zero.alphas_cumprod[-1]


@pytest.mark.parametrize("scheduler", STOCK)
def test_zero_terminal_snr_samples_as_the_stock_scheduler_with_trailing_steps(v_folder, monkeypatch, scheduler):
    ours = draw(load(v_folder, zero_terminal_snr=True), monkeypatch, scheduler)
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    theirs = stock(stock_pipeline(v_folder), scheduler, **options)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert load(v_folder, zero_terminal_snr=True).sampling_scheduler(scheduler).config.timestep_spacing == "trailing"


@pytest.mark.parametrize("where", ["here", "in the folder"])
def test_zero_terminal_snr_is_refused_where_noise_is_predicted(copied, where):
    if where == "in the folder":
        edit(copied / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    with pytest.raises(ConfigError, match="zero terminal SNR"):
        SdConfig(path=copied, zero_terminal_snr=where == "here").check()
    SdConfig(path=copied, zero_terminal_snr=where == "here", prediction_type="v_prediction").check()


def test_weights_of_losses_follow_the_prediction_type(folder):
    loss = LossConfig.model_validate({"weighting": {"kind": "min_snr", "gamma": 2.0}})
    for prediction, shift in (("epsilon", 0), ("v_prediction", 1)):
        process = load(folder, prediction_type=prediction).process
        snr = process.snr(torch.tensor([10, 500]))
        expected = snr.clamp(max=2.0) / (snr + shift)
        torch.testing.assert_close(loss.weighting.weights(snr, process.prediction), expected)


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("unet", {"addition_embed_type": "text_time"}, "kind: sdxl is SDXL"),
        ("unet", {"in_channels": 9}, "in_channels is 9, expected 4 .*inpaint"),
        ("unet", {"cross_attention_dim": 24}, "cross_attention_dim is 24, expected 16 .*text_encoder"),
        ("unet", {"class_embed_type": "projection"}, "class_embed_type is projection, expected None"),
        ("unet", {"time_cond_proj_dim": 256}, "told its guidance"),
        ("unet", {"_class_name": "SD3Transformer2DModel"}, "_class_name is 'SD3Transformer2DModel', expected 'UNet2D"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "vae/config.json: _class_name is 'AutoencoderTiny'"),
        ("vae", {"latent_channels": ...}, "no latent_channels; expected the vae of a pipeline"),
        ("text_encoder", {"hidden_size": ...}, "no hidden_size; expected the text_encoder of a pipeline"),
        ("text_encoder", {"use_attention_mask": True}, "use_attention_mask is true"),
        ("scheduler", {"prediction_type": "sample"}, "prediction_type 'sample'.*epsilon, v_prediction"),
        ("scheduler", {"beta_start": ..., "trained_betas": ...}, "no betas"),
    ],
)
def test_a_component_of_another_kind_of_model_is_named(copied, component, changes, message):
    file = "scheduler_config.json" if component == "scheduler" else "config.json"
    edit(copied / component / file, **changes)
    with pytest.raises(ModelError, match=message):
        SdConfig(path=copied).check()


def condition(backbone):
    return backbone.condition(backbone.encode_prompts(["a", None]), [Geometry.whole(64, 64)] * 2)


@pytest.mark.parametrize(
    ("precision", "options", "expected"),
    [
        ("bfloat16", {}, ("bfloat16", "float32", "bfloat16")),
        ("bfloat16", {"text_encoder_dtype": "float32"}, ("bfloat16", "float32", "float32")),
        ("float32", {"text_encoder_dtype": "bfloat16", "vae_dtype": "bfloat16"}, ("float32", "bfloat16", "bfloat16")),
        ("float32", {"text_encoder_dtype": "float16"}, ("float32", "float32", "float16")),
    ],
)
def test_every_component_has_the_precision_that_is_asked_for_and_they_work_together(
    folder, loaded, precision, options, expected
):
    backbone = load(folder, getattr(torch, precision), **options)
    networks = (backbone.denoiser, backbone.vae, *backbone.text_encoders)
    assert tuple(str(network.dtype).removeprefix("torch.") for network in networks) == expected
    x_t = torch.randn(2, *backbone.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answers = [one.denoise(x_t, torch.tensor([9, 900]), condition(one)).float() for one in (backbone, loaded)]
    # A few of bfloat16's eight bits, of numbers about 1.
    torch.testing.assert_close(*answers, atol=0.1, rtol=0.1)
    pixels = torch.rand(1, 3, 64, 64)
    assert backbone.encode_image(pixels).mean.dtype == backbone.decode(x_t).dtype == torch.float32
    torch.testing.assert_close(backbone.encode_image(pixels).mean, loaded.encode_image(pixels).mean, atol=0.1, rtol=0.1)


def test_components_lie_where_they_are_asked_to_and_answer_where_training_happens(folder):
    # There is no second real device here; tensors on this one are without numbers, so nothing can come from it.
    nowhere = torch.device("meta")
    backbone = SdConfig(path=folder, vae_device="cpu", text_encoder_device="cpu").load(nowhere, torch.float32)
    assert backbone.denoiser.device == nowhere
    assert backbone.vae.device == backbone.text_encoders[0].device == CPU
    assert backbone.encode_prompts(["a"]).hidden.device == nowhere
    assert backbone.encode_image(torch.zeros(1, 3, 64, 64)).mean.device == nowhere
    elsewhere = SdConfig(path=folder).load(nowhere, torch.float32)
    assert elsewhere.vae.device == elsewhere.text_encoders[0].device == nowhere
