"""Shards through frozen work and training."""

# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false

import pytest
import torch

from tests.trainers.data.conftest import png, sample
from trainers import packing
from trainers.cache import Cache
from trainers.data.shards import write_shard
from trainers.errors import DataError
from trainers.frozen import Frozen, encode_images, encode_texts
from trainers.loop import fit
from trainers.rundir import RunDir


@pytest.fixture
def make(make_config, shards):
    """A short trial on the shards; keywords replace keys of `data`."""

    def build(**changes):
        data = {
            "kind": "shards",
            "train": f"{shards}/train-{{00000..00001}}.tar",
            "validation": f"{shards}/val-00000.tar",
            "resolution": 64,
            **changes,
        }
        return make_config(data=data)

    return build


@pytest.fixture
def freeze(make, accelerator, tmp_path):
    """Frozen work of a trial, with or without what earlier calls left in the cache."""

    def run(config, folder="frozen"):
        backbone = config.backbone.load(accelerator.device, torch.float32)
        return Frozen(config.backbone, backbone, Cache(tmp_path / folder), accelerator)

    return run


def parameters(method):
    return [value for trained in method.trained().values() for value in trained.parameters().values()]


def test_training_on_shards_goes_on_where_it_was_interrupted(make, accelerator, tmp_path):
    mix = {"schedule": {"kind": "linear", "start": 0.0, "end": 1.0, "steps": 6}}
    config = make(mix=mix, crop={"kind": "aspect", "variants": 2})
    whole = config.build(0, None, accelerator)
    fit(whole, config, RunDir(tmp_path / "whole"), accelerator)
    half = config.build(0, None, accelerator)
    losses = half.losses

    def interrupted(batch):
        if batch.step == 3:
            raise InterruptedError
        return losses(batch)

    half.losses = interrupted
    with pytest.raises(InterruptedError):
        fit(half, config, RunDir(tmp_path / "half"), accelerator)
    resumed = config.build(0, None, accelerator)
    fit(resumed, config, RunDir(tmp_path / "half"), accelerator)
    for value, expected in zip(parameters(resumed), parameters(whole), strict=True):
        assert torch.equal(value, expected)


def test_the_loop_says_which_step_it_is_at(make, accelerator, tmp_path):
    config = make(mix={"schedule": {"kind": "linear", "start": 0.0, "end": 1.0, "steps": 4}})
    method = config.build(0, None, accelerator)
    asked = []
    pick = method.data.pick

    def recording(examples, seed, step, position, batch_size):
        asked.append((step, position))
        return pick(examples, seed, step, position, batch_size)

    object.__setattr__(method.data, "pick", recording)
    fit(method, config, RunDir(tmp_path / "run"), accelerator)
    assert asked == [(position // 4, position) for position in range(24)]


def test_a_score_is_the_same_from_the_cache(make, freeze):
    config = make(aesthetic={"field": "ae_aesthetic", "maximum": 100})
    first = encode_images(freeze(config), config.data).geometries
    again = encode_images(freeze(config), config.data).geometries
    assert [geometry.aesthetic for geometry in first] == [0, 1, 2, 3, 4]
    assert again == first


def test_what_memory_has_no_room_for_is_mapped_and_equal(make, freeze, monkeypatch, tmp_path):
    config = make(crop={"kind": "aspect", "variants": 2})
    frozen = freeze(config)
    images, texts = encode_images(frozen, config.data), encode_texts(frozen, [None, "a zog", "a wug"])
    monkeypatch.setattr(packing, "MEMORY_BYTES", 0)
    for folder in ("frozen", "anew", "anew"):
        frozen = freeze(config, folder)
        mapped, told = encode_images(frozen, config.data), encode_texts(frozen, [None, "a zog", "a wug"])
        rows, device = [9, 0, 4, 4], torch.device("cpu")
        assert torch.equal(mapped.select(rows, device).mean, images.select(rows, device).mean)
        assert torch.equal(mapped.select(rows, device).logvar, images.select(rows, device).logvar)
        assert mapped.geometries == images.geometries
        prompts = ["a wug", None, "a zog"]
        assert torch.equal(told.select(prompts).hidden, texts.select(prompts).hidden)
    assert len(list((tmp_path / "frozen").rglob("mean.bin"))) == 1


@pytest.mark.parametrize("memory", [0, packing.MEMORY_BYTES])
def test_pictures_that_cannot_be_decoded_are_counted_up_to_the_limit(make, freeze, shards, monkeypatch, memory):
    monkeypatch.setattr(packing, "MEMORY_BYTES", memory)
    write_shard(shards / "train-00001.tar", [sample(3, png=png(3)[:40]), sample(4, txt=None)])
    config = make(max_corrupt=2, crop={"kind": "aspect", "variants": 2})
    images = encode_images(freeze(config), config.data)
    assert [example.sample.id for example in images.split.train] == [f"id{i}" for i in range(3) for _ in range(2)]
    assert {path.name for path in images.split.unreadable} == {"003.png", "004.png"}
    with pytest.raises(DataError, match="2 of 7 samples cannot be used and 1 may be left out"):
        encode_images(freeze(config), make(max_corrupt=1).data)


def test_held_out_pictures_are_rows_behind_those_of_training(make, freeze):
    config = make()
    frozen = freeze(config)
    images = encode_images(frozen, config.data, held_out=True)
    assert (len(images.split.train), len(images.split.held_out), len(images.geometries)) == (5, 2, 7)
    picture = config.data.read(images.split.held_out[1])
    moments = frozen.backbone.encode_image(picture.pixels)
    assert torch.equal(images.select([6], torch.device("cpu")).mean, moments.mean)


def test_a_validation_loss_needs_validation_shards(make, make_config):
    with pytest.raises(ValueError, match=r"set data\.validation"):
        make_config(data=make(validation=None).data.model_dump(mode="json"), validation={"every": 2})


def test_the_validation_loss_is_that_of_the_held_out_shards(make, make_config, accelerator, tmp_path):
    config = make_config(data=make().data.model_dump(mode="json"), validation={"every": 3, "draws": 2})
    run = RunDir(tmp_path / "run")
    fit(config.build(0, None, accelerator), config, run, accelerator)
    assert [event["step"] for _, event in run.read_events() if event["event"] == "validation"] == [3, 6]
