# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportOperatorIssue=false
import diffusers
import pytest
import torch
import transformers
from diffusers import UNet2DConditionModel

from trainers import tuning
from trainers.adapters.lora import LORA_FILE
from trainers.batch import Geometry
from trainers.errors import ModelError
from trainers.methods.dreambooth import DreamboothConfig

PIPELINES = {"sd": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}
TEXT = {"rank": 2, "alpha": 3.0}
WAYS = {
    "adapter": {},
    "adapter with DoRA": {"lora": {"rank": 3, "dora": True}},
    "adapters": {"text_encoder_lora": TEXT},
    "adapter and text encoders": {"train_text_encoders": True},
    "unet": {"lora": None},
    "unet and adapters": {"lora": None, "text_encoder_lora": TEXT},
    "everything": {"lora": None, "train_text_encoders": True},
}


@pytest.fixture
def make(sd_folder, sdxl_folder, refiner_folder, tmp_path):
    """What is trained, of which model."""

    def make(model, way):
        backbone = {
            "sd": {"kind": "sd", "path": sd_folder},
            "sdxl": {"kind": "sdxl", "path": sdxl_folder},
            "refiner": {"kind": "sdxl", "path": sdxl_folder, "denoiser": refiner_folder},
        }[model]
        data = {"kind": "folder", "path": tmp_path, "resolution": 64, "instance_prompt": "a"}
        tree = {"backbone": backbone, "data": data, "lora": {"rank": 4}, "steps": 1, "batch_size": 1}
        return DreamboothConfig.model_validate({"kind": "dreambooth", **tree, **WAYS[way]})

    return make


def build(config, *, shaken=False):
    """A model with what is trained of it, if wanted as if it had been trained."""
    backbone = config.backbone.load(torch.device("cpu"), torch.float32)
    trained = tuning.tune(backbone, config, seed=0)
    rng = torch.Generator().manual_seed(1)
    for parameter in (value for one in trained.values() for value in one.parameters().values()):
        if shaken:
            parameter.data.add_(torch.randn(parameter.shape, generator=rng), alpha=0.05)
    return backbone, trained


def predict(backbone, together=False):
    x_t = torch.randn(2, *backbone.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    text = backbone.encode_prompts(["a zog", "b"], together=together)
    return backbone.denoise(x_t, torch.tensor([7, 700]), backbone.condition(text, [Geometry.whole(64, 64)] * 2))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ["sd", "sdxl", "refiner"])
def test_what_is_announced_is_what_is_trained_and_every_weight_of_it_gets_a_gradient(make, model, way):
    config = make(model, way)
    backbone, trained = build(config, shaken=True)
    parameters = {f"{name}.{key}": value for name, one in trained.items() for key, value in one.parameters().items()}
    assert config.num_trainable() == sum(value.numel() for value in parameters.values())
    assert {value.dtype for value in parameters.values()} == {torch.float32}
    predict(backbone, together=True).square().sum().backward()
    for name, value in parameters.items():
        assert value.grad is not None, name
        # Softmax does not see what all keys have in common: only rounding is left of this gradient.
        assert name.endswith("k_proj.bias") or value.grad.abs().sum() > 0, name
    everything = [value for network in backbone.networks.values() for value in network.parameters()]
    assert sum(value.grad is not None for value in everything) == len(parameters)


@pytest.mark.parametrize(("model", "expected"), [("sd", [3]), ("sdxl", [2, 3]), ("refiner", [3])])
def test_adapters_of_text_encoders_are_in_the_layers_whose_work_is_seen(make, model, expected):
    _, trained = build(make(model, "adapters"))
    layers = [
        {int(key.split("layers.")[1].split(".")[0]) for key in one.parameters()}
        for name, one in trained.items()
        if name != "unet"
    ]
    assert layers == [set(range(count)) for count in expected]


@pytest.mark.parametrize("way", ["adapters", "adapter and text encoders"])
def test_nothing_is_changed_by_making_it_trainable(make, way):
    config = make("sdxl", way)
    base = config.backbone.load(torch.device("cpu"), torch.float32)
    with torch.no_grad():
        assert torch.equal(predict(build(config)[0]), predict(base))


def stock(folder, exported, model):
    """The stock pipeline with what was exported."""
    parts = {}
    for name in ("unet", "text_encoder", "text_encoder_2"):
        if (exported / name).is_dir():
            kinds = {"unet": UNet2DConditionModel, "text_encoder": transformers.CLIPTextModel}
            cls = kinds.get(name, transformers.CLIPTextModelWithProjection)
            parts[name] = cls.from_pretrained(exported / name, local_files_only=True)
    extra = {"safety_checker": None} if model == "sd" else {}
    pipeline = PIPELINES[model].from_pretrained(folder, local_files_only=True, **parts, **extra)
    if (exported / LORA_FILE).is_file():
        pipeline.load_lora_weights(exported)
    return pipeline


def predict_stock(pipeline, x_t):
    t = torch.tensor([7, 700])
    with torch.no_grad():
        if isinstance(pipeline, diffusers.StableDiffusionPipeline):
            hidden, _ = pipeline.encode_prompt(["a zog", "b"], "cpu", 1, do_classifier_free_guidance=False)
            return pipeline.unet(x_t, t, hidden).sample
        hidden, _, pooled, _ = pipeline.encode_prompt(["a zog", "b"], do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
        return pipeline.unet(x_t, t, hidden, added_cond_kwargs=added).sample


@pytest.mark.parametrize("way", [way for way in WAYS if way not in {"adapter", "adapter with DoRA"}])
@pytest.mark.parametrize("model", PIPELINES)
def test_what_is_exported_predicts_the_same_in_the_stock_pipeline_and_in_ours(
    make, sd_folder, sdxl_folder, tmp_path, model, way
):
    config, exported = make(model, way), tmp_path / "exported"
    backbone, trained = build(config, shaken=True)
    tuning.export(backbone, trained, exported)
    fresh = config.backbone.load(torch.device("cpu"), torch.float32)
    with torch.no_grad():
        ours, base = predict(backbone), predict(fresh)
        tuning.load(fresh, exported)
        torch.testing.assert_close(predict(fresh), ours, atol=1e-6, rtol=0)
    x_t = torch.randn(2, *backbone.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    theirs = predict_stock(stock(sd_folder if model == "sd" else sdxl_folder, exported, model), x_t)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    assert not torch.allclose(ours, base, atol=1e-3)
    assert not any(value.requires_grad for network in fresh.networks.values() for value in network.parameters())


def test_a_model_that_is_trained_whole_is_trained_in_float32_whatever_it_was_loaded_in(make):
    config = make("sd", "everything")
    backbone = config.backbone.load(torch.device("cpu"), torch.bfloat16)
    tuning.tune(backbone, config, seed=0)
    assert predict(backbone).dtype == torch.float32


def test_weights_of_another_model_are_refused(make, tmp_path):
    backbone, trained = build(make("sd", "unet"))
    tuning.export(backbone, trained, tmp_path / "exported")
    other = make("sdxl", "unet").backbone.load(torch.device("cpu"), torch.float32)
    with pytest.raises(ModelError, match="unet: not the weights of this model's UNet2DConditionModel"):
        tuning.load(other, tmp_path / "exported")


def test_a_folder_without_weights_is_refused(make, tmp_path):
    backbone = make("sd", "unet").backbone.load(torch.device("cpu"), torch.float32)
    with pytest.raises(ModelError, match="expected the adapter of a finished trial"):
        tuning.load(backbone, tmp_path)


def test_a_text_encoder_is_trained_in_one_way(make):
    tree = make("sd", "adapters").model_dump()
    with pytest.raises(ValueError, match="exclude each other"):
        DreamboothConfig.model_validate({**tree, "train_text_encoders": True})
