"""SDXL's refiner: a lone UNet with the base's autoencoder and second text encoder, or a stock folder of its own."""

import peft
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tests.contracts.backbone import UnetContract
from tests.trainers.conftest import build_sdxl
from tests.trainers.models import build_refiner
from trainers.adapters.lora import TEXT_TARGETS, UNET_TARGETS, LoraConfig, add_lora, load_lora, save_lora
from trainers.backbone import Moments
from trainers.backbones.sdxl import SdxlConfig
from trainers.batch import Batch, Example, Geometry, Split
from trainers.denoising import Denoising
from trainers.errors import ConfigError, ModelError
from trainers.frozen import Images
from trainers.guidance import ClassifierFree, SamplingConfig
from trainers.loss import LossConfig
from trainers.prompt import Prompt, Request
from trainers.sampling import generate, noise_rng

CPU = torch.device("cpu")
PROMPTS = ["a zog", "b"]


@pytest.fixture(scope="module")
def unet_folder(sdxl_folder, tmp_path_factory):
    return build_refiner(tmp_path_factory.mktemp("models") / "refiner", sdxl_folder)


@pytest.fixture(scope="module")
def stock_folder(sdxl_folder, tmp_path_factory):
    return build_refiner(tmp_path_factory.mktemp("models") / "refiner", sdxl_folder, whole=True)


@pytest.fixture(scope="module")
def make(sdxl_folder, unet_folder):
    """The refiner, as a UNet beside the base."""

    def make(**options):
        return SdxlConfig(path=sdxl_folder, denoiser=unet_folder, **options)

    return make


@pytest.fixture(scope="module")
def loaded(make):
    return make().load(CPU, torch.float32)


def stock_pipeline(folder):
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(stock_folder):
    return stock_pipeline(stock_folder)


class TestRefiner(UnetContract):
    @pytest.fixture
    def backbone(self, loaded):
        return loaded


def test_only_the_second_text_encoder_is_loaded(make, loaded):
    assert make().stage == "refiner"
    assert list(loaded.networks) == ["unet", "text_encoder_2"]
    assert list(make().text_layers.items()) == [("text_encoder_2", 3)]
    assert len(loaded.text_encoders) == 1
    assert loaded.text_encoders[0].config.architectures == ["CLIPTextModelWithProjection"]


def test_the_unet_may_be_named_by_its_own_folder(sdxl_folder, unet_folder):
    assert SdxlConfig(path=sdxl_folder, denoiser=unet_folder / "unet").stage == "refiner"


def test_a_stock_refiners_folder_is_the_same_model(loaded, stock_folder):
    config = SdxlConfig(path=stock_folder)
    config.check()
    alone = config.load(CPU, torch.float32)
    assert not (stock_folder / "text_encoder").exists()
    for name, network in alone.networks.items():
        expected = loaded.networks[name].state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())
    for name, value in alone.encode_prompts(["a", None]).tensors().items():
        assert torch.equal(value, loaded.encode_prompts(["a", None]).tensors()[name]), name


@pytest.mark.parametrize("prompt", ["a zog on a blue field", ""])
def test_embeddings_equal_the_stock_pipelines(loaded, pipeline, prompt):
    hidden, null, pooled, null_pooled = pipeline.encode_prompt(prompt, do_classifier_free_guidance=True)
    ours = loaded.encode_prompts([prompt, None])
    assert torch.equal(ours.hidden, torch.cat([hidden, null]))
    assert torch.equal(ours.pooled, torch.cat([pooled, null_pooled]))


def test_what_is_told_about_sizes_equals_the_stock_pipelines(loaded, pipeline):
    geometry = Geometry(original=(80, 120), crop=(3, 28), target=(64, 64), aesthetic=7.5)
    options = {"dtype": torch.float32, "text_encoder_projection_dim": 32}
    trained, _ = pipeline._get_add_time_ids(
        geometry.original, geometry.crop, geometry.target, 7.5, 2.5, (1, 1), (0, 0), (1, 1), **options
    )
    ours = loaded.condition(loaded.encode_prompts(["a"]), [geometry]).sizes
    assert torch.equal(ours, trained)
    assert ours.tolist() == [[80, 120, 3, 28, 7.5]]
    drawn, unwanted = pipeline._get_add_time_ids(
        (64, 48), (0, 0), (64, 48), 6.0, 2.5, (64, 48), (0, 0), (64, 48), **options
    )
    sampled = loaded.prepare([Prompt(text="a"), None], 64, 48)
    assert torch.equal(sampled.sizes, torch.cat([drawn, unwanted]))
    assert sampled.sizes[:, -1].tolist() == [6.0, 2.5]
    assert torch.equal(loaded.prepare([None], 64, 48, negative="grey").sizes, unwanted)


@pytest.mark.parametrize("negative", [None, "grey"])
def test_the_sampling_loop_equals_the_stock_pipeline(loaded, stock_folder, monkeypatch, negative):
    final = []
    monkeypatch.setattr(loaded, "decode", lambda latents: final.append(latents) or torch.zeros(len(latents), 3, 8, 8))
    requests = [Request(Prompt(text=prompt), 7) for prompt in PROMPTS]
    options = {"resolution": 64, "steps": 4, "scheduler": "euler", "negative_prompt": negative}
    list(generate(loaded, requests, SamplingConfig(**options, guidance=ClassifierFree(scale=3.0))))

    pipeline = stock_pipeline(stock_folder)
    noise = torch.stack([torch.randn(loaded.latent_shape(64, 64), generator=noise_rng(one)) for one in requests])
    # Nothing of a picture: refined from pure noise.
    monkeypatch.setattr(pipeline, "prepare_latents", lambda *_, **__: noise * pipeline.scheduler.init_noise_sigma)
    theirs = pipeline(
        PROMPTS, negative_prompt=None if negative is None else [negative] * 2, image=torch.zeros(2, 3, 64, 64),
        strength=1.0, num_inference_steps=4, guidance_scale=3.0, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(final[0], theirs, atol=1e-4, rtol=1e-4)


def test_timesteps_stay_in_the_band_and_fill_it(loaded):
    moments = Moments(torch.zeros(1, *loaded.latent_shape(64, 64)), torch.zeros(1, *loaded.latent_shape(64, 64)))
    split = Split((Example("key", "picture", "a"),), ())
    images = Images(split, moments, (Geometry.whole(64, 64),))
    denoising = Denoising(loaded, images, LossConfig(timesteps=(0, 199)), 0)
    places = tuple(range(1500))
    drawn = denoising.noised(Batch(0, places, (0,) * len(places))).t
    # 1,500 draws miss a given one of 200 with probability 5e-4.
    assert drawn.min() < 3
    assert 196 < drawn.max() <= 199


def adapted(sdxl_folder, names=("text_encoder", "text_encoder_2")):
    """A base whose adapters of `names` have been trained."""
    base, rng = SdxlConfig(path=sdxl_folder).load(CPU, torch.float32), torch.Generator().manual_seed(0)
    for name in names:
        targets = UNET_TARGETS if name == "unet" else TEXT_TARGETS
        add_lora(base.networks[name], LoraConfig(rank=2, alpha=3.0), targets, seed=0)
        for parameter in base.networks[name].parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.2, generator=rng)
    return base


def save_as_peft(base, folder):
    """The second text encoder's adapter, in PEFT's own layout."""
    encoder = base.networks["text_encoder_2"]
    state = peft.get_peft_model_state_dict(encoder, save_embedding_layers=False)
    folder.mkdir()
    state = {f"base_model.model.{name}": value for name, value in state.items()}
    save_file(state, folder / "adapter_model.safetensors")
    encoder.peft_config["default"].save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks transformers
@pytest.mark.parametrize("layout", ["a trial's export", "PEFT's"])
def test_an_adapter_of_the_bases_second_text_encoder_is_merged_exactly(make, sdxl_folder, tmp_path, layout):
    base, folder = adapted(sdxl_folder), tmp_path / "adapter"
    if layout == "PEFT's":
        save_as_peft(base, folder)
    else:
        save_lora(folder, base.pipeline, {name: base.networks[name] for name in ("text_encoder", "text_encoder_2")})
    refiner = make(text_encoder_2_adapter=folder).load(CPU, torch.float32)
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, local_files_only=True)
    if layout == "PEFT's":
        oracle = peft.PeftModel.from_pretrained(pipeline.text_encoder_2, folder)
    else:
        pipeline.load_lora_weights(folder)
        oracle = pipeline.text_encoder_2
    tokens = pipeline.tokenizer_2("a zog", padding="max_length", max_length=32, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = oracle(tokens, output_hidden_states=True)
    ours = refiner.encode_prompts(["a zog"])
    torch.testing.assert_close(ours.hidden, expected.hidden_states[-2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.pooled, expected.text_embeds, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours.pooled, make().load(CPU, torch.float32).encode_prompts(["a zog"]).pooled, atol=1e-2)
    encoder = refiner.networks["text_encoder_2"]
    assert not any("lora" in name for name, _ in encoder.named_parameters())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_embeddings_are_cached_apart_for_every_merged_adapter(make, sdxl_folder, tmp_path):
    folder = save_as_peft(adapted(sdxl_folder), tmp_path / "adapter")
    assert folder / "adapter_model.safetensors" in make(text_encoder_2_adapter=folder).text_files()


def test_an_encoder_with_a_merged_adapter_can_be_trained_on(make, sdxl_folder, tmp_path):
    folder = save_as_peft(adapted(sdxl_folder), tmp_path / "adapter")
    refiner = make(text_encoder_2_adapter=folder).load(CPU, torch.float32)
    merged = refiner.encode_prompts(["a"]).pooled
    add_lora(refiner.networks["text_encoder_2"], LoraConfig(rank=2), TEXT_TARGETS, seed=0)
    assert torch.equal(refiner.encode_prompts(["a"]).pooled, merged)


def test_an_adapter_without_the_second_text_encoder_is_refused(make, sdxl_folder, tmp_path):
    base = adapted(sdxl_folder, ["unet"])
    save_lora(tmp_path, base.pipeline, {"unet": base.networks["unet"]})
    with pytest.raises(ModelError, match="there is none; expected an adapter that was trained with text encoders"):
        make(text_encoder_2_adapter=tmp_path).load(CPU, torch.float32)


@pytest.mark.parametrize("difference", ["width", "layers"])
def test_an_adapter_of_another_model_is_refused(make, sdxl_folder, tmp_path, difference):
    folder = save_as_peft(adapted(sdxl_folder), tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    state = load_file(weights)
    if difference == "width":
        state = {key: torch.cat([value, value], dim=-1) if "lora_A" in key else value for key, value in state.items()}
    else:
        state |= {key.replace("layers.0", "layers.7"): value.clone() for key, value in state.items()}
    save_file(state, weights)
    with pytest.raises(ModelError, match="text_encoder_2"):
        make(text_encoder_2_adapter=folder).load(CPU, torch.float32)


def test_a_folder_without_an_adapter_is_found_before_anything_is_loaded(make, tmp_path):
    with pytest.raises(ModelError, match=r"neither adapter_model\.safetensors nor pytorch_lora_weights"):
        make(text_encoder_2_adapter=tmp_path).check()


def test_the_base_takes_no_adapter_of_a_text_encoder(sdxl_folder, tmp_path):
    with pytest.raises(ConfigError, match="expected it with the refiner alone"):
        SdxlConfig(path=sdxl_folder, text_encoder_2_adapter=tmp_path).check()


def test_a_refiner_that_does_not_fit_the_bases_text_encoder_is_refused(sdxl_folder, unet_folder, tmp_path):
    config = UNet2DConditionModel.load_config(unet_folder / "unet")
    UNet2DConditionModel.from_config({**config, "cross_attention_dim": 16}).save_pretrained(tmp_path / "unet")
    with pytest.raises(ModelError, match=r"cross_attention_dim is 16, expected 32 \(the width of text_encoder_2\)"):
        SdxlConfig(path=sdxl_folder, denoiser=tmp_path).check()


def test_a_refiners_folder_with_the_bases_unet_misses_the_first_text_encoder(stock_folder, tmp_path):
    base = build_sdxl(tmp_path / "base")
    with pytest.raises(ModelError, match=r"text_encoder/config\.json: no such file"):
        SdxlConfig(path=stock_folder, denoiser=base).check()


def test_a_trained_refiner_loads_in_the_stock_pipeline_and_in_ours(make, stock_folder, tmp_path):
    backbone, rng = make().load(CPU, torch.float32), torch.Generator().manual_seed(0)
    for name, targets in (("unet", UNET_TARGETS), ("text_encoder_2", TEXT_TARGETS)):
        add_lora(backbone.networks[name], LoraConfig(rank=2, alpha=3.0), targets, seed=0)
        for parameter in backbone.networks[name].parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.2, generator=rng)
    save_lora(tmp_path, backbone.pipeline, backbone.networks)
    fresh = make().load(CPU, torch.float32)
    load_lora(tmp_path, fresh.pipeline, fresh.networks)
    pipeline = stock_pipeline(stock_folder)
    pipeline.load_lora_weights(tmp_path)

    hidden, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    x_t, t = torch.randn(2, *backbone.latent_shape(64, 64)), torch.tensor([7, 150])
    sizes = torch.tensor([[64.0, 64, 0, 0, 6]] * 2)
    with torch.no_grad():
        added = {"text_embeds": pooled, "time_ids": sizes}
        theirs = pipeline.unet(x_t, t, hidden, added_cond_kwargs=added).sample
        for one in (backbone, fresh):
            told = one.condition(one.encode_prompts(PROMPTS), [Geometry.whole(64, 64)] * 2)
            torch.testing.assert_close(one.denoise(x_t, t, told), theirs, atol=1e-5, rtol=0)
