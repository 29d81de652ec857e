# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportOperatorIssue=false
import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import CLIPVisionModelWithProjection

from tests.trainers.conftest import draw
from tests.trainers.ip_adapters import (
    EMBED,
    FEATURES,
    LABEL,
    LABELS,
    T,
    build_config,
    build_vision,
    noise,
    predict,
    prompts,
    shake,
    stock,
    write_pairs,
)
from trainers.adapters.attention import TOKENS
from trainers.batch import Batch
from trainers.errors import ConfigError, DataError, ModelError
from trainers.guidance import ClassifierFree, SamplingConfig
from trainers.prompt import Prompt, Request
from trainers.sampling import generate, noise_rng


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs")


@pytest.fixture
def make(sdxl_folder, pairs):
    return partial(build_config, sdxl_folder, pairs)


@pytest.fixture
def folders(sdxl_folder, sd_folder):
    return {"sdxl": str(sdxl_folder), "sd": str(sd_folder)}


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory):
    return build_vision(tmp_path_factory.mktemp("models") / "image_encoder")


@torch.no_grad()
def predict_stock(pipeline, x_t, embeddings):
    """What a plain pipeline's UNet answers to the prompts a and b and pictures with these embeddings."""
    text = pipeline.encode_prompt(["a", "b"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    added = {"image_embeds": [embeddings[:, None]]}
    if hasattr(pipeline, "text_encoder_2"):
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
    pipe = stock(folders[kind], kind)
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
    if hasattr(pipeline, "text_encoder_2"):
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


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ({"label": (1.0,)}, DataError, "the label has 1 numbers; expected 3"),
        ({"box": (0, 0, 8, 8)}, ConfigError, "says box, which this adapter does not hear"),
        ({"image": "0.png"}, ConfigError, "trained on embeddings from files"),
        ({"embedding": "short.npy"}, DataError, r"has (2 numbers|shape \(2,\)); expected 6"),
    ],
)
def test_a_prompt_that_cannot_be_heard_is_refused(make, accelerator, pairs, prompt, error, message):
    np.save(pairs.parent / "short.npy", np.zeros(2, np.float32))
    model = make().build(0, None, accelerator).model
    said = {name: str(pairs.parent / value) if isinstance(value, str) else value for name, value in prompt.items()}
    asked = [Prompt.model_validate({"text": "a", **said})]
    for refuse in (lambda: model.prepare(asked, 64, 64), lambda: make().check_prompts(asked, 64)):
        with pytest.raises(error, match=message):
            refuse()


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_a_prompts_picture_that_cannot_be_read_is_found_before_training(make, pairs, vision_folder, content):
    photo = pairs.parent / "photo.png"
    if content:
        photo.write_bytes(content)
    config = make(image_encoder={"path": str(vision_folder)}, label_to_token=None)
    with pytest.raises(DataError, match=r"the prompt 'a .*photo\.png cannot be read"):
        config.check_prompts([Prompt(text="a", image=photo)], 64)
    config.check_prompts([Prompt(text="a"), Prompt(text="a", image=pairs.parent / "0.png")], 64)


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


def test_guided_pictures_are_the_stock_pipelines(make, accelerator, tmp_path, pairs, sdxl_folder):

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
