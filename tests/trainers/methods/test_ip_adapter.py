# pyright: basic
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from tests.contracts.method import MethodContract, weights
from tests.trainers.ip_adapters import (
    EMBED,
    LABEL,
    build_config,
    build_vision,
    dropout,
    shake,
    write_pairs,
)
from tests.trainers.ip_adapters import prompts as heard
from trainers.adapters.attention import TOKENS
from trainers.batch import Batch
from trainers.errors import ConfigError, DataError
from trainers.loop import fit
from trainers.prompt import Prompt
from trainers.rundir import RunDir

FOUR = Batch(0, (0, 1, 2, 3), (0, 1, 2, 3))


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs")


@pytest.fixture
def make(sdxl_folder, pairs):
    return partial(build_config, sdxl_folder, pairs)


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory):
    return build_vision(tmp_path_factory.mktemp("models") / "image_encoder")


@pytest.fixture
def prompts(pairs):
    return [*heard(pairs), None]


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

    @pytest.fixture
    def prompts(self, pairs):
        return [Prompt(text=prompt.text, label=prompt.label) for prompt in heard(pairs)]


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


def test_streams_and_captions_are_dropped_apart_and_together_at_their_rates(make, accelerator):
    rates = {"caption": 0.1, "image": 0.2, "label": 0.3}
    method = make(**dropout(**rates, joint=0.25)).build(3, None, accelerator)
    batches = [method.shown(Batch(step, tuple(range(8)), (0,) * 8)) for step in range(400)]
    lost = {name: torch.cat([~batch[name] for batch in batches]).float() for name in rates}
    for name, column in lost.items():
        # Five standard errors of 3,200 draws.
        assert column.mean().item() == pytest.approx(1 - (1 - rates[name]) * (1 - 0.25), abs=5 * 0.5 / 3200**0.5)
    together = torch.stack(list(lost.values())).prod(0).mean().item()
    assert together == pytest.approx(0.25 + 0.75 * 0.1 * 0.2 * 0.3, abs=5 * 0.5 / 3200**0.5)
    assert lost["image"].view(400, 8).mean(0).sub(1 - 0.8 * 0.75).abs().max() < 0.13


def test_a_dropped_stream_is_zero_tokens_and_a_dropped_caption_no_prompt(make, accelerator):
    method = make(**dropout(joint=1.0)).build(0, None, accelerator)
    shake(method)
    told = method.condition(FOUR)
    assert (told.extra[TOKENS] == 0).all()
    assert torch.equal(told.text.hidden[:1], method.backbone.encode_prompts([None]).hidden)
    kept = make(**dropout()).build(0, None, accelerator)
    shake(kept)
    assert (kept.condition(FOUR).extra[TOKENS] != 0).any(-1).all()


def test_training_hears_what_sampling_is_told(make, accelerator, pairs):
    method = make(**dropout()).build(0, None, accelerator)
    shake(method)
    example = method.examples[2]
    told = method.condition(Batch(0, (0,), (2,)))
    said = Prompt(text=example.prompt, label=example.label, embedding=example.embedding)
    asked = method.model.prepare([said], 64, 64)
    torch.testing.assert_close(told.extra[TOKENS], asked.extra[TOKENS])
    assert torch.equal(told.text.hidden, asked.text.hidden)


def test_pictures_are_shown_to_the_encoder_once(make, accelerator, vision_folder, tmp_path, monkeypatch):
    config = make(image_encoder={"path": str(vision_folder)})
    first = config.build(0, tmp_path / "cache", accelerator).condition(FOUR)
    monkeypatch.setattr("trainers.ip_adapter.vision.ImageEncoderConfig.load", None)
    again = config.build(0, tmp_path / "cache", accelerator).condition(FOUR)
    assert torch.equal(first.extra[TOKENS], again.extra[TOKENS])


def test_an_encoder_of_another_width_is_refused(make, vision_folder):
    config = make(image_encoder={"path": str(vision_folder)}, embed_to_token={"in_features": 5})
    with pytest.raises(ConfigError, match="in_features is 5; image_encoder makes 6"):
        config.check()


def test_held_out_pairs_have_vectors_too(make, accelerator, pairs):
    method = make(data={"kind": "pairs", "path": str(pairs), "resolution": 64, "holdout": 2}).build(
        0, None, accelerator
    )
    assert len(method.held_out) == 2
    for x in method._inputs.vectors.values():
        assert len(x) == 6
    label = torch.tensor(method.held_out[1].label)
    assert torch.equal(method._inputs.vectors["label"][5], label)


def test_geometry_reaches_the_denoiser_as_in_other_methods(make, accelerator):
    method = make().build(0, None, accelerator)
    found = method.condition(FOUR).sizes[0].tolist()
    assert found == [64, 80, 0, 8, 64, 64]
