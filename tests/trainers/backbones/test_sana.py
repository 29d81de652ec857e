import inspect
import json
import shutil

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaPipeline
from pydantic import ValidationError

from tests.contracts.backbone import BackboneContract
from tests.trainers.models import INSTRUCTION, build_sana
from trainers.adapters.lora import LoraConfig, add_lora, load_lora, save_lora
from trainers.backbone import TextEmbeddings
from trainers.backbones.sana import INSTRUCTION as STOCK_INSTRUCTION
from trainers.backbones.sana import SanaConfig
from trainers.batch import Geometry
from trainers.errors import ConfigError, ModelError
from trainers.guidance import ClassifierFree, SamplingConfig
from trainers.prompt import Prompt, Request
from trainers.sampling import generate, noise_rng

CPU = torch.device("cpu")
STOCK_CALL = {
    name: parameter.default for name, parameter in inspect.signature(SanaPipeline.__call__).parameters.items()
}
PROMPTS = ["A Zog on a blue field ", "b"]


def load(folder, dtype=torch.float32, **options):
    return SanaConfig(path=folder, **{"instruction": INSTRUCTION, "max_sequence_length": 24} | options).load(CPU, dtype)


def stock_pipeline(folder):
    pipeline = SanaPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_sana(tmp_path_factory.mktemp("models") / "sana")


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture(scope="module")
def pipeline(folder):
    return stock_pipeline(folder)


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "sana")


def rows(backbone, prompts):
    return backbone.condition(backbone.encode_prompts(prompts), [Geometry.whole(64, 64)] * len(prompts))


def noise(backbone, count=2):
    return torch.randn(count, *backbone.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))


class TestSana(BackboneContract):
    @pytest.fixture
    def backbone(self, loaded):
        return loaded


@pytest.mark.parametrize("instruction", [INSTRUCTION, ""])
@pytest.mark.parametrize("prompt", [" A Zog on a blue field", "", "longer than is looked at " * 3])
def test_embeddings_and_their_mask_equal_the_stock_pipelines(folder, pipeline, prompt, instruction):
    hidden, mask, _, _ = pipeline.encode_prompt(
        prompt,
        False,
        max_sequence_length=24,
        complex_human_instruction=instruction.split("\n") if instruction else None,
    )
    ours = load(folder, instruction=instruction).encode_prompts([prompt])
    assert torch.equal(ours.hidden, hidden)
    assert torch.equal(ours.mask, mask)


@pytest.mark.parametrize("negative", [None, "", "Grey"])
def test_no_prompt_and_a_negative_one_equal_the_stock_pipelines_which_has_no_instruction_there(
    loaded, pipeline, negative
):
    _, _, hidden, mask = pipeline.encode_prompt(
        "b",
        negative_prompt=negative or "",
        max_sequence_length=24,
        complex_human_instruction=INSTRUCTION.split("\n"),
    )
    ours = loaded.prepare([Prompt(text="b"), None], 64, 64, negative=negative).text
    tokens = ours.hidden.shape[1]
    assert torch.equal(ours.hidden[1:], hidden[:, :tokens])
    assert torch.equal(ours.mask[1:], mask[:, :tokens])
    assert not mask[:, tokens:].any()
    assert torch.equal(ours.hidden[:1], loaded.encode_prompts(["b"]).hidden[:, :tokens])
    assert not torch.equal(loaded.encode_prompts([""]).hidden, loaded.encode_prompts([None]).hidden)


def test_the_stock_instruction_and_length_are_the_defaults(folder):
    config = SanaConfig(path=folder)
    assert config.instruction_text == STOCK_INSTRUCTION == "\n".join(STOCK_CALL["complex_human_instruction"])
    assert config.max_sequence_length == STOCK_CALL["max_sequence_length"]


def test_a_folders_own_instruction_takes_the_place_of_the_stock_one(copied):
    (copied / "instruction.txt").write_text("draw: ", encoding="utf-8")
    config = SanaConfig(path=copied, max_sequence_length=24)
    ours = config.load(CPU, torch.float32).encode_prompts(["b"])
    assert torch.equal(ours.hidden, load(copied, instruction="draw: ").encode_prompts(["b"]).hidden)
    assert SanaConfig(path=copied, instruction="").instruction_text == ""


def test_a_token_of_several_latents_wants_larger_steps_of_size(copied):
    edit(copied / "transformer" / "config.json", patch_size=2)
    assert SanaConfig(path=copied).downscale == 16


def draw(backbone, monkeypatch, scheduler="dpmpp_2m", negative=None, scale=4.5):
    """Final latents of our sampler for `PROMPTS`, and the initial ones."""
    final = []
    monkeypatch.setattr(backbone, "decode", lambda latents: final.append(latents) or torch.zeros(len(latents), 3, 8, 8))
    config = SamplingConfig(
        resolution=64, steps=4, scheduler=scheduler, negative_prompt=negative, guidance=ClassifierFree(scale=scale)
    )
    requests = [Request(Prompt(text=prompt), 7) for prompt in PROMPTS]
    list(generate(backbone, requests, config))
    shape = backbone.latent_shape(64, 64)
    return final[0], torch.stack([torch.randn(shape, generator=noise_rng(request)) for request in requests])


def stock(pipeline, latents, **options):
    """What the stock pipeline makes of the same initial latents."""
    return pipeline(
        PROMPTS,
        num_inference_steps=4,
        latents=latents,
        height=64,
        width=64,
        use_resolution_binning=False,
        output_type="latent",
        max_sequence_length=24,
        complex_human_instruction=INSTRUCTION.split("\n"),
        **options,
    ).images


@pytest.mark.parametrize("scheduler", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize(("scale", "negative"), [(4.5, None), (4.5, "grey"), (1.0, None)])
def test_the_sampling_loop_equals_the_stock_pipeline(loaded, folder, monkeypatch, scheduler, scale, negative):
    pipeline = stock_pipeline(folder)
    if scheduler == "euler":
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours, latents = draw(loaded, monkeypatch, scheduler, negative, scale)
    expected = stock(pipeline, latents, guidance_scale=scale, negative_prompt=negative or "")
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_timesteps_are_scaled_as_the_folder_says(copied, monkeypatch):
    edit(copied / "transformer" / "config.json", timestep_scale=0.25)
    ours, latents = draw(load(copied), monkeypatch)
    torch.testing.assert_close(ours, stock(stock_pipeline(copied), latents), atol=1e-5, rtol=1e-5)


def test_latents_are_scaled_as_the_stock_autoencoder_expects_and_nothing_is_drawn(loaded, pipeline):
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    moments = loaded.encode_image(pixels)
    latents = loaded.sample_latents(moments, torch.randn_like(moments.mean))
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels).latent * pipeline.vae.config.scaling_factor
        picture = pipeline.vae.decode(expected / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(loaded.decode(latents), picture)


@pytest.mark.parametrize("euler", [True, False])
def test_training_follows_the_folders_shift_whatever_sampler_it_ships(tmp_path, euler):
    process = load(build_sana(tmp_path / "sana", euler=euler)).process
    table = FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps
    drawn = torch.stack([process.draw_t(torch.Generator().manual_seed(seed)) for seed in range(50)])
    assert torch.isclose(drawn[:, None], table[None]).any(dim=1).all()


def test_the_solver_that_a_folder_ships_is_used_with_its_own_settings(copied, loaded):
    edit(copied / "scheduler" / "scheduler_config.json", lower_order_final=False, flow_shift=5.0)
    changed = load(copied).sampling_scheduler("dpmpp_2m")
    assert isinstance(changed, DPMSolverMultistepScheduler)
    assert (changed.config.lower_order_final, changed.config.flow_shift) == (False, 5.0)
    assert loaded.sampling_scheduler("dpmpp_2m").config.lower_order_final


def test_ddim_is_refused_before_anything_is_loaded(loaded):
    with pytest.raises(ModelError, match=r"scheduler is ddim.*expected one of euler, dpmpp_2m"):
        SamplingConfig(resolution=64, scheduler="ddim").check_model(loaded.config)
    with pytest.raises(ConfigError, match="euler or dpmpp_2m"):
        loaded.sampling_scheduler("ddim")


def test_a_resolution_between_latents_is_refused_before_anything_is_loaded(copied):
    vae = copied / "vae" / "config.json"
    edit(vae, encoder_block_out_channels=[8] * 6)
    with pytest.raises(ModelError, match="resolution is 72; expected a multiple of 32"):
        SamplingConfig(resolution=72, scheduler="euler").check_model(SanaConfig(path=copied))
    SamplingConfig(resolution=64, scheduler="euler").check_model(SanaConfig(path=copied))


def test_predictions_do_not_depend_on_how_much_padding_there_is(folder, loaded):
    x_t, t = noise(loaded), torch.tensor([900.0, 30.0])
    longer = load(folder, max_sequence_length=60)
    assert rows(longer, ["b", None]).text.hidden.shape[1] == 60
    torch.testing.assert_close(
        loaded.denoise(x_t, t, rows(loaded, ["b", None])), longer.denoise(x_t, t, rows(longer, ["b", None]))
    )


def test_what_stands_in_padding_is_never_seen(loaded):
    x_t, t = noise(loaded), torch.tensor([900.0, 30.0])
    condition = rows(loaded, ["b", None])
    text = condition.text
    other = text.hidden + 100 * (1 - text.mask)[:, :, None]
    changed = type(condition)(TextEmbeddings(other, mask=text.mask))
    assert torch.equal(loaded.denoise(x_t, t, condition), loaded.denoise(x_t, t, changed))
    unmasked = type(condition)(TextEmbeddings(other, mask=torch.ones_like(text.mask)))
    assert not torch.allclose(loaded.denoise(x_t, t, condition), loaded.denoise(x_t, t, unmasked))


@pytest.mark.parametrize(("dtype", "text"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16)])
def test_half_precision_leaves_gemma_in_bfloat16_and_the_autoencoder_in_float32(folder, dtype, text):
    backbone = load(folder, dtype)
    assert (backbone.denoiser.dtype, backbone.text_encoders[0].dtype, backbone.vae.dtype) == (
        dtype,
        text,
        torch.float32,
    )
    assert backbone.encode_prompts(["a"]).hidden.dtype == text
    assert backbone.encode_image(torch.zeros(1, 3, 64, 64)).mean.dtype == torch.float32
    assert backbone.denoise(noise(backbone, 1), torch.tensor([500.0]), rows(backbone, ["a"])).dtype == dtype


def test_a_folder_of_bf16_files_only_is_accepted(copied, loaded):
    for file in list(copied.rglob("*.safetensors")):
        file.rename(file.with_name(file.name.replace(".safetensors", ".bf16.safetensors")))
    variant = load(copied)
    for name, value in loaded.denoiser.state_dict().items():
        assert torch.equal(variant.denoiser.state_dict()[name], value)


def test_every_component_has_the_precision_that_is_asked_for(folder):
    backbone = load(folder, text_encoder_dtype="bfloat16", vae_dtype="bfloat16")
    assert (backbone.text_encoders[0].dtype, backbone.vae.dtype) == (torch.bfloat16, torch.bfloat16)
    assert backbone.denoiser.dtype == torch.float32


@pytest.mark.parametrize("field", ["text_encoder_dtype", "vae_dtype"])
def test_float16_is_refused_where_it_overflows(folder, field):
    with pytest.raises(ValidationError, match=f"{field} is float16"):
        SanaConfig(path=folder, **{field: "float16"})


@pytest.mark.parametrize(("option", "component"), [("denoiser", "transformer"), ("vae", "vae")])
def test_a_component_may_come_from_another_folder(folder, tmp_path, option, component):
    other = build_sana(tmp_path / "other", seed=1)
    expected = load(other)
    for place in (other, other / component):
        mixed = load(folder, **{option: place})
        for name, value in getattr(expected, option).state_dict().items():
            assert torch.equal(getattr(mixed, option).state_dict()[name], value)


@pytest.mark.parametrize(
    "missing",
    [
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_missing_component_is_named(copied, missing):
    (copied / missing).unlink()
    with pytest.raises(ModelError, match=missing.split("/")[0]):
        SanaConfig(path=copied).check()


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("transformer", {"_class_name": "PixArtTransformer2DModel"}, "expected 'SanaTransformer2DModel'"),
        ("transformer", {"guidance_embeds": True}, "Sprint"),
        ("transformer", {"caption_channels": 32}, "caption_channels is 32, expected 16"),
        ("vae", {"latent_channels": 32}, "in_channels is 4, expected 32"),
    ],
)
def test_components_that_do_not_fit_each_other_are_refused(copied, component, changes, message):
    edit(copied / component / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        SanaConfig(path=copied).check()


def test_a_sampler_of_diffusion_is_refused(copied):
    edit(copied / "scheduler" / "scheduler_config.json", prediction_type="epsilon", use_flow_sigmas=False)
    with pytest.raises(ModelError, match="DPMSolverMultistepScheduler is not a sampler of flows"):
        SanaConfig(path=copied).check()


def test_a_saved_adapter_predicts_the_same_in_the_stock_pipeline_and_in_a_fresh_backbone(folder, tmp_path):
    trained, fresh, pipeline = load(folder), load(folder), stock_pipeline(folder)
    x_t, t, condition = noise(trained), torch.tensor([900.0, 30.0]), rows(trained, ["b", None])
    base = trained.denoise(x_t, t, condition)
    add_lora(trained.denoiser, LoraConfig(rank=3, alpha=5), SanaConfig.lora_targets, seed=0)
    assert torch.equal(trained.denoise(x_t, t, condition), base)
    for name, parameter in trained.denoiser.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    expected = trained.denoise(x_t, t, condition)
    assert not torch.allclose(expected, base)
    save_lora(tmp_path, trained.pipeline, trained.networks)
    load_lora(tmp_path, fresh.pipeline, fresh.networks)
    torch.testing.assert_close(fresh.denoise(x_t, t, condition), expected)
    with fresh.adapter_scale(0.0):
        torch.testing.assert_close(fresh.denoise(x_t, t, condition), base)
    pipeline.load_lora_weights(tmp_path)
    text = condition.text
    stock = pipeline.transformer(x_t, text.hidden, t, encoder_attention_mask=text.mask, return_dict=False)[0]
    torch.testing.assert_close(stock, expected)
