import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import trainers.methods  # noqa: F401, registers the kinds
from tests.contracts.method import MethodContract, weights
from tests.trainers.conftest import draw
from trainers.adapters.attention import TOKENS
from trainers.batch import Batch, Geometry
from trainers.errors import ConfigError, DataError, ModelError
from trainers.loop import fit
from trainers.method import MethodConfig
from trainers.prompt import Prompt
from trainers.rundir import RunDir

FEATURES, LABELS = 6, 3
EMBED = {"in_features": FEATURES}
LABEL = {"in_features": LABELS, "layer_norm": True}
FOUR = Batch(0, (0, 1, 2, 3), (0, 1, 2, 3))
T = torch.tensor([7, 700])
PIPELINES = {"sdxl": StableDiffusionXLPipeline, "sd": StableDiffusionPipeline}


@pytest.fixture
def pairs(tmp_path):
    """Six pictures with captions, labels and embeddings; the table is as a user would write it."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = ["image,caption,label,embedding"]
    for number in range(6):
        draw(number).save(folder / f"{number}.png")
        np.save(folder / f"{number}.npy", rng.normal(size=FEATURES).astype(np.float32))
        label = " ".join(f"{value:.2f}" for value in rng.normal(size=LABELS))
        rows.append(f"{number}.png,a zog number {number},{label},{number}.npy")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "pairs.csv"


@pytest.fixture
def make(sdxl_folder, pairs):
    """A short trial of the tiny model; keywords replace top-level keys, and null removes them."""

    def build(**changes):
        tree = {
            "kind": "ip_adapter",
            "backbone": {"kind": "sdxl", "path": str(sdxl_folder)},
            "data": {"kind": "pairs", "path": str(pairs), "resolution": 64},
            "embed_to_token": EMBED,
            "label_to_token": LABEL,
            "optimizer": {"kind": "adamw", "lr": 1e-2},
            "steps": 6,
            "batch_size": 4,
            "checkpoint_every": 2,
            "log_every": 2,
        }
        tree = {name: value for name, value in (tree | changes).items() if value is not None}
        return MethodConfig.model_validate(tree)

    return build


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory, sdxl_folder):
    """A random Stable Diffusion model around the first text encoder and the autoencoder of the tiny SDXL."""
    torch.manual_seed(0)
    xl = stock(sdxl_folder)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, norm_num_groups=8, in_channels=12,
        out_channels=12, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(2, 4),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "sd"
    StableDiffusionPipeline(
        vae=xl.vae, unet=unet, scheduler=xl.scheduler, tokenizer=xl.tokenizer, text_encoder=xl.text_encoder,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def folders(sdxl_folder, sd_folder):
    return {"sdxl": str(sdxl_folder), "sd": str(sd_folder)}


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=FEATURES,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "image_encoder"
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


class TestBothStreams(MethodContract):
    @pytest.fixture
    def config(self, make):
        return make()

    def test_export_writes_no_frozen_weight(self, method, tmp_path):
        shake(method)
        method.export(tmp_path / "adapter")
        exported = [t for file in (tmp_path / "adapter").iterdir() for t in load_file(file).values()]
        # diffusers' projector has biases, which are zero here.
        told = [t.shape for t in exported if t.any()]
        assert sorted(told) == sorted(t.shape for t in weights(method).values())


class TestSharedWithLora(MethodContract):
    @pytest.fixture
    def config(self, make):
        adapters = {"share_ip_kv": True, "zero_init": "values", "layers": [{"match": "mid*", "image_scale": 0}]}
        lora = {"train_unet": True, "lora": {"rank": 2}, "text_encoder_lora": {"rank": 2}}
        return make(
            label_to_token={**LABEL, "hidden": 5},
            embed_to_token={**EMBED, "layer_norm": False},
            adapters=adapters,
            **lora,
        )


class TestSd(MethodContract):
    @pytest.fixture
    def config(self, make, sd_folder):
        return make(backbone={"kind": "sd", "path": str(sd_folder)}, embed_to_token=None)


def shake(method):
    """Give everything that is trained other weights, as if it had been."""
    rng = torch.Generator().manual_seed(5)
    for trained in method.trained().values():
        for parameter in trained.parameters().values():
            parameter.data = torch.randn(parameter.shape, generator=rng) * 0.3


def noise(backbone, rows=2):
    return torch.randn(rows, *backbone.latent_shape(64, 64), generator=torch.Generator().manual_seed(1))


def prompts(pairs):
    return [
        Prompt(text="a", embedding=pairs.parent / "0.npy", label=(0.5, -1, 2)),
        Prompt(text="b", embedding=pairs.parent / "1.npy", label=(1, 1, 0)),
    ]


@torch.no_grad()
def predict(model, said, **options):
    return model.denoise(noise(model), T[: len(said)], model.prepare(said, 64, 64, **options))


def stock(folder, kind=StableDiffusionXLPipeline):
    return kind.from_pretrained(
        folder, local_files_only=True, **({} if "XL" in kind.__name__ else {"safety_checker": None})
    )


@torch.no_grad()
def predict_stock(pipeline, x_t, embeddings):
    """What a plain pipeline's UNet answers to the prompts a and b and pictures with these embeddings."""
    text = pipeline.encode_prompt(["a", "b"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    added = {"image_embeds": [embeddings[:, None]]}
    if isinstance(pipeline, StableDiffusionXLPipeline):
        added |= {"text_embeds": text[2], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    return pipeline.unet(x_t, T, text[0], added_cond_kwargs=added).sample


@pytest.mark.parametrize("zero_init", ["tokens", "values"])
@pytest.mark.parametrize("kind", ["sdxl", "sd"])
def test_before_training_it_is_the_base_bit_for_bit(make, accelerator, pairs, folders, zero_init, kind):
    config = make(backbone={"kind": kind, "path": folders[kind]}, adapters={"zero_init": zero_init})
    expected = predict(config.backbone.load(torch.device("cpu"), torch.float32), [Prompt(text="a"), Prompt(text="b")])
    for model in (config.build(0, None, accelerator).model, config.load_trained(None, accelerator)):
        assert torch.equal(predict(model, prompts(pairs)), expected)


@pytest.fixture(
    params=[
        ({}, {}),
        (
            {"hidden": 2 * FEATURES, "num_tokens": 3},
            {"image_scale": 0.5, "layers": [{"match": "mid*", "image_scale": 2}]},
        ),
        ({}, {"layers": [{"match": "up*", "image_scale": 0}]}),
    ],
)
def make_pictures_only(request, make, accelerator, folders):
    """A method with an image stream alone, by kind of backbone."""
    embed, adapters = request.param

    def build(kind):
        backbone = {"kind": kind, "path": folders[kind]}
        config = make(backbone=backbone, embed_to_token=EMBED | embed, label_to_token=None, adapters=adapters)
        return config.build(0, None, accelerator)

    return build


@pytest.mark.parametrize("kind", ["sdxl", "sd"])
def test_the_image_stream_loads_in_the_stock_pipeline(make_pictures_only, tmp_path, pairs, folders, kind):
    method = make_pictures_only(kind)
    shake(method)
    method.export(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["ip_adapter.safetensors"]
    pipe = stock(folders[kind], PIPELINES[kind])
    base = predict_base(pipe, noise(method.model))
    pipe.load_ip_adapter(tmp_path, subfolder=None, weight_name="ip_adapter.safetensors", image_encoder_folder=None)
    said = [replace_label(prompt) for prompt in prompts(pairs)]
    embeddings = torch.stack([torch.from_numpy(np.load(prompt.embedding)) for prompt in said])
    theirs = predict_stock(pipe, noise(method.model), embeddings)
    torch.testing.assert_close(predict(method.model, said), theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(theirs, base, atol=1e-3)
    nothing = predict_stock(pipe, noise(method.model), torch.zeros_like(embeddings))
    torch.testing.assert_close(nothing, base, atol=1e-6, rtol=1e-6)


def replace_label(prompt):
    return Prompt(text=prompt.text, embedding=prompt.embedding)


@torch.no_grad()
def predict_base(pipeline, x_t):
    text = pipeline.encode_prompt(["a", "b"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    added = {}
    if isinstance(pipeline, StableDiffusionXLPipeline):
        added = {"text_embeds": text[2], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    return pipeline.unet(x_t, T, text[0], added_cond_kwargs=added).sample


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("tuned", [{}, {"train_unet": True, "lora": {"rank": 2}}, {"train_unet": True}])
def test_everything_that_was_trained_is_loaded_back(make, accelerator, tmp_path, pairs, share, tuned):
    rules = [{"match": "mid*", "label_scale": 0.5}, {"match": "down*", "image_scale": 0.3}]
    config = make(adapters={"share_ip_kv": share, "layers": rules}, **tuned)
    method = config.build(0, None, accelerator)
    shake(method)
    method.export(tmp_path)
    fresh = config.load_trained(tmp_path, accelerator)
    torch.testing.assert_close(
        predict(fresh, prompts(pairs)), predict(method.model, prompts(pairs)), atol=1e-5, rtol=1e-5
    )
    networks = [*fresh.backbone.networks.values(), fresh.adapter]
    assert not any(parameter.requires_grad for network in networks for parameter in network.parameters())


def test_an_image_stream_that_diffusers_cannot_express_is_kept_with_the_labels(make, accelerator, tmp_path, pairs):
    config = make(embed_to_token={**EMBED, "num_tokens": 2})
    method = config.build(0, None, accelerator)
    shake(method)
    method.export(tmp_path / "adapter")
    assert [file.name for file in (tmp_path / "adapter").iterdir()] == ["token_streams.safetensors"]
    fresh = config.load_trained(tmp_path / "adapter", accelerator)
    torch.testing.assert_close(
        predict(fresh, prompts(pairs)), predict(method.model, prompts(pairs)), atol=1e-6, rtol=1e-6
    )


def test_an_adapter_of_other_streams_is_refused(make, accelerator, tmp_path):
    make().build(0, None, accelerator).export(tmp_path)
    for other in ({"label_to_token": {**LABEL, "num_tokens": 3}}, {"adapters": {"label_scale": 0.5}}):
        with pytest.raises(ModelError, match="made for other streams"):
            make(**other).load_trained(tmp_path, accelerator)


def test_a_folder_without_an_adapter_is_refused(make, accelerator, tmp_path):
    with pytest.raises(ModelError, match="expected the adapter of a finished trial"):
        make().load_trained(tmp_path, accelerator)


def test_files_name_no_path_of_this_machine(make, accelerator, tmp_path, sdxl_folder):
    make().build(0, None, accelerator).export(tmp_path / "adapter")
    for path in (tmp_path / "adapter").iterdir():
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["streams"])["tokens"]["label"]["in_features"] == LABELS
            assert str(sdxl_folder.parent) not in str(file.metadata())


FLAGS = {
    "unet": {"train_unet": True, "lora": {"rank": 2}},
    "text_encoder": {"text_encoder_lora": {"rank": 2}},
    "adapters": {"adapters": {"trainable": True}},
    "embed_to_token": {"embed_to_token": {**EMBED, "trainable": True}},
    "label_to_token": {"label_to_token": {**LABEL, "trainable": True}},
}


@pytest.mark.parametrize(
    ("zero_init", "on"),
    [
        ("tokens", {"embed_to_token", "label_to_token"}),
        ("tokens", {"adapters", "embed_to_token", "label_to_token"}),
        ("values", {"adapters"}),
        ("values", {"adapters", "embed_to_token"}),
        ("values", {"adapters", "label_to_token", "unet"}),
        ("tokens", {"embed_to_token", "label_to_token", "unet", "text_encoder"}),
        ("values", {"adapters", "text_encoder"}),
    ],
)
def test_flags_decide_what_is_trained_changed_and_nothing_else(make, accelerator, tmp_path, zero_init, on):
    changes = {
        "adapters": {"trainable": "adapters" in on, "zero_init": zero_init},
        "embed_to_token": {**EMBED, "trainable": "embed_to_token" in on},
        "label_to_token": {**LABEL, "trainable": "label_to_token" in on},
    }
    changes |= FLAGS["unet"] if "unet" in on else {}
    changes |= FLAGS["text_encoder"] if "text_encoder" in on else {}
    config = make(**changes, steps=3)
    method = config.build(0, None, accelerator)
    names = {"text_encoder": ["text_encoder", "text_encoder_2"]}
    assert set(method.trained()) == {part for name in on for part in names.get(name, [name])}
    before = {name: value.clone() for name, value in everything(method).items()}
    trained = {id(parameter) for part in method.trained().values() for parameter in part.parameters().values()}
    fit(method, config, RunDir(tmp_path / "run"), accelerator)
    for name, value in everything(method).items():
        assert torch.equal(value, before[name]) == (id(value) not in trained), name
    counted = sum(value.numel() for value in weights(method).values())
    assert counted <= config.num_trainable() <= counted * 1.3


def everything(method):
    networks = {**method.backbone.networks, "vae": method.backbone.vae, **method.model.adapter.networks()}
    return {f"{name}.{key}": value for name, network in networks.items() for key, value in network.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_to_token": None, "label_to_token": None}, "nothing to hear"),
        ({"image_encoder": {"path": "/nowhere"}, "embed_to_token": None}, "without an image stream"),
        ({"lora": {"rank": 2}}, "which is frozen"),
        ({"adapters": {"trainable": False, "zero_init": "values"}}, "nothing would ever be heard"),
        ({"label_to_token": {**LABEL, "trainable": False}}, "label stream begins with zero tokens"),
        ({"adapters": {"embed_to_token": True}}, "Extra inputs are not permitted"),
        ({"image_to_token": {}}, "Extra inputs are not permitted"),
        ({"label_to_token": {**LABEL, "num_tokens": 1}}, "greater than or equal to 2"),
        ({"data": {"kind": "folder", "path": "/nowhere", "resolution": 64}}, "pairs"),
    ],
)
def test_what_does_not_fit_together_is_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1.npy", "", r"pairs\.csv, line 3: no embedding"),
        (
            "1.png,a zog number 1,",
            "1.png,a zog number 1,7 ",
            r"pairs\.csv, line 3: the label has 4 numbers; expected 3",
        ),
    ],
)
def test_rows_that_lack_something_are_named_before_anything_is_loaded(make, accelerator, pairs, old, new, message):
    pairs.write_text(pairs.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        make().check()
    with pytest.raises(DataError, match=message):
        make().build(0, None, accelerator)


def test_rules_about_layers_are_checked_before_anything_is_loaded(make):
    make(adapters={"layers": [{"match": "mid_block.*", "image_scale": 0.5}]}).check()
    with pytest.raises(ConfigError, match="'middle' is no layer's name"):
        make(adapters={"layers": [{"match": "middle", "image_scale": 0.5}]}).check()


def test_rows_without_streams_are_the_base_among_others(make, accelerator, pairs):
    method = make().build(0, None, accelerator)
    shake(method)
    base = make().backbone.load(torch.device("cpu"), torch.float32)
    mixed = predict(method.model, [prompts(pairs)[0], Prompt(text="b")])
    expected = predict(base, [Prompt(text="a"), Prompt(text="b")])
    torch.testing.assert_close(mixed[1], expected[1], atol=0, rtol=0)
    assert not torch.allclose(mixed[0], expected[0], atol=1e-3)


def test_no_prompt_says_nothing_in_any_stream(make, accelerator, pairs):
    model = make().build(0, None, accelerator).model
    shake_model = make().build(0, None, accelerator)
    shake(shake_model)
    for adapted in (model, shake_model.model):
        told = adapted.prepare([None, prompts(pairs)[0]], 64, 64)
        assert (told.extra[TOKENS][0] == 0).all()
        assert torch.equal(told.text.hidden[:1], adapted.backbone.encode_prompts([None]).hidden)


def test_adapter_scale_weighs_the_streams_and_is_undone(make, accelerator, pairs):
    method = make().build(0, None, accelerator)
    shake(method)
    model, said = method.model, prompts(pairs)
    whole, base = predict(model, said), predict(model, [Prompt(text="a"), Prompt(text="b")])
    with model.adapter_scale(0.0):
        assert torch.equal(predict(model, said), base)
    with model.adapter_scale(0.5):
        half = predict(model, said)
    assert torch.equal(predict(model, said), whole)
    for layer in model.adapter.streams.layers:
        for owned in layer.own.values():
            owned.to_v.weight.data *= 0.5
    torch.testing.assert_close(predict(model, said), half, atol=1e-6, rtol=1e-5)


def test_streams_and_captions_are_dropped_apart_and_together_at_their_rates(make, accelerator):
    rates = {"caption": 0.1, "image": 0.2, "label": 0.3, "everything": 0.25}
    method = make(dropout=rates).build(3, None, accelerator)
    batches = [method.shown(Batch(step, tuple(range(8)), (0,) * 8)) for step in range(400)]
    lost = {name: torch.cat([~batch[name] for batch in batches]).float() for name in ("caption", "image", "label")}
    for name, column in lost.items():
        expected = 1 - (1 - rates[name]) * (1 - rates["everything"])
        # Five standard errors of 3,200 draws.
        assert column.mean().item() == pytest.approx(expected, abs=5 * 0.5 / 3200**0.5)
    together = torch.stack(list(lost.values())).prod(0).mean().item()
    assert together == pytest.approx(0.25 + 0.75 * 0.1 * 0.2 * 0.3, abs=5 * 0.5 / 3200**0.5)
    assert lost["image"].view(400, 8).mean(0).sub(1 - 0.8 * 0.75).abs().max() < 0.13


def test_a_dropped_stream_is_zero_tokens_and_a_dropped_caption_no_prompt(make, accelerator):
    method = make(dropout={"everything": 1.0}).build(0, None, accelerator)
    shake(method)
    told = method.condition(FOUR)
    assert (told.extra[TOKENS] == 0).all()
    assert torch.equal(told.text.hidden[:1], method.backbone.encode_prompts([None]).hidden)
    kept = make(dropout={"caption": 0, "image": 0, "label": 0, "everything": 0}).build(0, None, accelerator)
    shake(kept)
    assert (kept.condition(FOUR).extra[TOKENS] != 0).any(-1).all()


def test_training_hears_what_sampling_is_told(make, accelerator, pairs):
    rates = {"caption": 0, "image": 0, "label": 0, "everything": 0}
    method = make(dropout=rates).build(0, None, accelerator)
    shake(method)
    example = method.examples[2]
    told = method.condition(Batch(0, (0,), (2,)))
    said = Prompt(text=example.prompt, label=example.label, embedding=example.embedding)
    asked = method.model.prepare([said], 64, 64)
    torch.testing.assert_close(told.extra[TOKENS], asked.extra[TOKENS])
    assert torch.equal(told.text.hidden, asked.text.hidden)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ({"label": (1.0,)}, DataError, "the label has 1 numbers; expected 3"),
        ({"box": (0, 0, 8, 8)}, ConfigError, "says box, which this adapter does not hear"),
        ({"image": "0.png"}, ConfigError, "trained on embeddings from files"),
        ({"embedding": "short.npy"}, DataError, "has 2 numbers; expected 6"),
    ],
)
def test_a_prompt_that_cannot_be_heard_is_refused(make, accelerator, pairs, prompt, error, message):
    np.save(pairs.parent / "short.npy", np.zeros(2, np.float32))
    model = make().build(0, None, accelerator).model
    said = {name: str(pairs.parent / value) if isinstance(value, str) else value for name, value in prompt.items()}
    with pytest.raises(error, match=message):
        model.prepare([Prompt.model_validate({"text": "a", **said})], 64, 64)


def test_a_label_is_refused_where_only_pictures_are_heard(make, accelerator):
    model = make(label_to_token=None).build(0, None, accelerator).model
    with pytest.raises(ConfigError, match="says label"):
        model.prepare([Prompt(text="a", label=(1.0, 2.0, 3.0))], 64, 64)


def test_pictures_are_shown_as_the_stock_pipeline_shows_them(
    make, accelerator, pairs, vision_folder, tmp_path, sdxl_folder
):
    config = make(image_encoder={"path": str(vision_folder)}, label_to_token=None)
    config.check()
    method = config.build(0, None, accelerator)
    shake(method)
    method.export(tmp_path / "adapter")
    pipeline = stock(sdxl_folder)
    pipeline.image_encoder = CLIPVisionModelWithProjection.from_pretrained(vision_folder)
    pipeline.load_ip_adapter(tmp_path / "adapter", subfolder=None, weight_name="ip_adapter.safetensors")
    images = [draw(0), draw(1)]
    embeddings = torch.cat([pipeline.encode_image(image, "cpu", 1)[0] for image in images])
    theirs = predict_stock(pipeline, noise(method.model), embeddings)
    said = [Prompt(text=text, image=pairs.parent / f"{i}.png") for i, text in enumerate("ab")]
    torch.testing.assert_close(predict(method.model, said), theirs, atol=1e-5, rtol=1e-5)
    told = method.condition(Batch(5, (0, 1), (0, 1)))
    asked = method.model.prepare(said, 64, 64)
    shown = method.shown(Batch(5, (0, 1), (0, 1)))["image"]
    torch.testing.assert_close(told.extra[TOKENS][shown], asked.extra[TOKENS][shown])


def test_pictures_are_shown_to_the_encoder_once(make, accelerator, vision_folder, tmp_path, monkeypatch):
    config = make(image_encoder={"path": str(vision_folder)})
    first = config.build(0, tmp_path / "cache", accelerator).condition(FOUR)
    monkeypatch.setattr("trainers.vision.ImageEncoderConfig.load", None)
    again = config.build(0, tmp_path / "cache", accelerator).condition(FOUR)
    assert torch.equal(first.extra[TOKENS], again.extra[TOKENS])


def test_an_encoder_of_another_width_is_refused(make, vision_folder):
    config = make(image_encoder={"path": str(vision_folder)}, embed_to_token={"in_features": 5})
    with pytest.raises(ConfigError, match="in_features is 5; image_encoder makes 6"):
        config.check()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_encoder_is_refused(make, tmp_path, missing):
    files = {"config.json": json.dumps({"model_type": "clip_vision_model"}), "model.safetensors": ""}
    for name, content in files.items():
        if name != missing:
            (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=missing):
        make(image_encoder={"path": str(tmp_path)}).check()


def test_another_kind_of_encoder_is_refused(make, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}), encoding="utf-8")
    with pytest.raises(ModelError, match="'dinov2'"):
        make(image_encoder={"path": str(tmp_path)}).check()


def test_held_out_pairs_have_vectors_too(make, accelerator, pairs):
    method = make(data={"kind": "pairs", "path": str(pairs), "resolution": 64, "holdout": 2}).build(
        0, None, accelerator
    )
    assert len(method.held_out) == 2
    for x in method._inputs.vectors.values():
        assert len(x) == 6
    label = torch.tensor(method.held_out[1].label)
    assert torch.equal(method._inputs.vectors["label"][5], label)


def test_guided_pictures_are_the_stock_pipelines(make, accelerator, tmp_path, pairs, sdxl_folder):
    from trainers.guidance import ClassifierFree, SamplingConfig
    from trainers.prompt import Request
    from trainers.sampling import generate, noise_rng

    method = make(label_to_token=None).build(0, None, accelerator)
    shake(method)
    method.export(tmp_path)
    said = Prompt(text="a zog", embedding=pairs.parent / "0.npy")
    settings = SamplingConfig(resolution=64, steps=3, scheduler="ddim", guidance=ClassifierFree(scale=3.0))
    ours = next(iter(generate(method.model, [Request(said, 0)], settings))).image
    pipeline = stock(sdxl_folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = method.model.sampling_scheduler("ddim")
    pipeline.load_ip_adapter(tmp_path, subfolder=None, weight_name="ip_adapter.safetensors", image_encoder_folder=None)
    embedding = torch.from_numpy(np.load(said.embedding))[None, None]
    theirs = pipeline(
        "a zog", height=64, width=64, num_inference_steps=3, guidance_scale=3.0, generator=noise_rng(Request(said, 0)),
        ip_adapter_image_embeds=[torch.cat([torch.zeros_like(embedding), embedding])],
    ).images[0]  # fmt: skip
    difference = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
    assert difference.max() <= 1


def test_geometry_reaches_the_denoiser_as_in_other_methods(make, accelerator):
    method = make().build(0, None, accelerator)
    found = method.condition(FOUR).sizes[0].tolist()
    assert found == [64, 80, 0, 8, 64, 64]
    assert Geometry((64, 80), (0, 8), (64, 64)).crop == (0, 8)
