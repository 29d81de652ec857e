# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false
import hashlib
import subprocess
import sys
from collections import Counter

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from tests.trainers.data.conftest import png, sample
from trainers.data.crops import AspectCrop
from trainers.data.folder import FolderConfig
from trainers.data.shards import ShardsConfig, write_shard
from trainers.data.transforms import open_picture
from trainers.errors import DataError


@pytest.fixture
def config(shards):
    def make(**changes):
        tree = {"train": f"{shards}/train-{{00000..00001}}.tar", "validation": f"{shards}/val-00000.tar"}
        return ShardsConfig.model_validate({**tree, "resolution": 64, **changes})

    return make


def rewrite(shards, *samples):
    """Replace the second training shard."""
    write_shard(shards / "train-00001.tar", samples)


def test_braces_name_several_shards_and_the_order_is_theirs(config):
    split = config().split()
    assert [example.sample.id for example in split.train] == [f"id{number}" for number in range(5)]
    assert [example.prompt for example in split.train] == [f"picture {number}" for number in range(5)]
    assert [example.sample.id for example in split.held_out] == ["id5", "id6"]


def test_without_validation_shards_nothing_is_held_out(config):
    assert config(validation=None).split().held_out == ()


def test_a_missing_shard_is_named(config, shards):
    with pytest.raises(DataError, match=r"train-00002\.tar: no such file; 1 of the 3 shards"):
        config(train=f"{shards}/train-{{00000..00002}}.tar").check()


def test_unbalanced_braces_are_an_error(config, shards):
    with pytest.raises(DataError, match="Unbalanced braces"):
        config(train=f"{shards}/train-{{00000..00002.tar").check()


def test_shards_without_samples_are_an_error(config, shards):
    write_shard(shards / "empty.tar", [])
    with pytest.raises(DataError, match="no samples"):
        config(train=f"{shards}/empty.tar", validation=None).check()


def test_a_picture_is_read_from_its_shard(config):
    example = config().split().train[3]
    picture = config().read(example)
    assert picture.pixels.shape == (1, 3, 64, 64)
    assert torch.allclose(picture.pixels[0, :, 0, 0], torch.tensor([120, 21, 200]) / 127.5 - 1)
    assert (picture.geometry.original, picture.geometry.crop, picture.geometry.target) == ((64, 80), (0, 8), (64, 64))
    assert open_picture(example).size == (80, 64)


def test_a_centred_square_is_the_same_frozen_work_as_a_folders(config, tmp_path):
    """Equal keys and equal names of the transform mean that the autoencoder's work is shared."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(0))
    folder = FolderConfig(path=tmp_path / "pictures", resolution=64, instance_prompt="a")
    example, other = config().split().train[0], folder.split().train[0]
    assert (example.key, config().transform) == (other.key, folder.transform)
    assert torch.equal(config().read(example).pixels, folder.read(other).pixels)


def test_variants_are_examples_of_their_own(config):
    crop = {"kind": "aspect", "variants": 3}
    split = config(crop=crop).split()
    assert len(split.train) == 15
    assert len({example.key for example in split.train}) == 15
    assert [example.key for example in split.held_out] == [example.key for example in config().split().held_out]
    for example in split.train:
        place = AspectCrop().place(example.sample.id, example.variant, 64, 16)
        assert config(crop=crop).read(example).geometry.crop == (0, place)
    assert {config(crop=crop).read(example).geometry.crop for example in split.held_out} == {(0, 8)}


def test_another_crop_is_another_transform(config):
    assert config().transform != config(crop={"kind": "aspect"}).transform


def test_a_score_is_told_in_points_of_ten_and_part_of_the_key(config):
    scored = config(aesthetic={"field": "ae_aesthetic", "maximum": 100}).split()
    assert [example.sample.aesthetic for example in scored.train] == [0, 1, 2, 3, 4]
    assert config().read(scored.train[3]).geometry.aesthetic == 3
    assert config().split().train[3].sample.aesthetic is None
    assert scored.train[3].key != config().split().train[3].key


def test_a_score_beyond_its_maximum_is_an_error(config):
    with pytest.raises(DataError, match=r"ae_aesthetic is 40.0; expected 0 to 35"):
        config(aesthetic={"maximum": 35}).check()


def test_a_held_out_picture_is_not_trained_on(config, shards, caplog):
    rewrite(shards, sample(3), sample(9, png=png(5)))
    assert [example.sample.id for example in config().split().train] == ["id0", "id1", "id2", "id3"]
    assert "1 examples are held out" in caplog.text


def test_shards_that_are_held_out_leave_nothing_to_train_on(config, shards):
    with pytest.raises(DataError, match="no sample to train on"):
        config(train=f"{shards}/val-00000.tar").split()


@pytest.mark.parametrize("changes", [{"txt": None}, {"png": b""}, {"txt": b"\xff"}, {"json": None}])
def test_a_corrupt_sample_is_an_error_that_names_shard_and_sample(config, shards, changes):
    rewrite(shards, sample(3), sample(4, **changes))
    with pytest.raises(DataError, match=r"train-00001\.tar: sample 004: .*; 1 of 7 samples cannot be used"):
        config().check()


@pytest.mark.parametrize("limit", [1, 2, 0.2])
def test_corrupt_samples_up_to_a_limit_are_left_out_and_counted(config, shards, limit, caplog):
    rewrite(shards, sample(3), sample(4, txt=None))
    config(max_corrupt=limit).check()
    split = config(max_corrupt=limit).split()
    assert [example.sample.id for example in split.train] == ["id0", "id1", "id2", "id3"]
    assert split.unreadable == (shards / "train-00001.tar" / "004.png",)
    assert "1 samples cannot be used and are left out" in caplog.text
    assert "train-00001.tar: sample 004: no member 004.txt" in caplog.text


@pytest.mark.parametrize("limit", [0, 0.1, 1])
def test_beyond_the_limit_they_are_an_error(config, shards, limit):
    rewrite(shards, sample(3, txt=None), sample(4, txt=None))
    with pytest.raises(DataError, match="2 of 7 samples cannot be used"):
        config(max_corrupt=limit).check()


def test_a_held_out_picture_that_cannot_be_decoded_is_found_before_training(config, shards):
    write_shard(shards / "val-00000.tar", [sample(5), sample(6, png=png(6)[:40])])
    config().check()
    with pytest.raises(DataError, match=r"006\.png: cannot be decoded"):
        config().split()
    split = config(max_corrupt=1).split()
    assert ([example.sample.id for example in split.held_out], len(split.unreadable)) == (["id5"], 1)


def test_strict_shards_are_decoded_before_a_study_starts(config, shards):
    rewrite(shards, sample(3, png=png(3)[:40]))
    config().check()
    with pytest.raises(DataError, match=r"003\.png: cannot be decoded"):
        config(strict=True).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strict": True, "max_corrupt": 1}, "strict data has no corrupt samples"),
        ({"max_corrupt": 1.5}, "a share below 1, or a whole number"),
        ({"meta_key": None, "aesthetic": {}}, "decided by metadata"),
        ({"meta_key": None, "mix": {"schedule": {"kind": "linear", "steps": 3}}}, "decided by metadata"),
        ({"validation": None, "manifests": {"validation_ids": "/v.txt"}}, "validation is not"),
        ({"train": "train.tar"}, "expected a path that begins with"),
        ({"crop": {"kind": "random"}}, "unknown kind 'random'"),
    ],
)
def test_options_that_do_not_fit_are_refused(config, changes, message):
    with pytest.raises(ValidationError, match=message):
        config(**changes)


def test_without_a_mix_every_epoch_shows_every_example_once(config):
    examples = config().split().train
    shown = [config().pick(examples, 0, position // 2, position, 2) for position in range(10)]
    assert sorted(shown[:5]) == sorted(shown[5:]) == list(range(5))


def test_a_mix_shows_rare_classes_more_often_and_less_so_as_lambda_grows(config):
    """Of five pictures three are stars, one a moon, one a heart."""
    mixed = config(mix={"schedule": {"kind": "linear", "start": 0, "end": 1, "steps": 100}})
    examples = mixed.split().train

    def stars(step):
        shown = Counter(examples[mixed.pick(examples, 0, step, position, 2)].sample.classes for position in range(3000))
        return shown["star",] / 3000

    assert stars(0) == pytest.approx(1 / 3, abs=0.03)
    assert stars(50) == pytest.approx(0.5 / 3 + 0.5 * 0.6, abs=0.03)
    assert stars(100) == pytest.approx(0.6, abs=0.03)


def test_a_mix_without_a_class_in_its_table_is_found_before_a_study_starts(config, tmp_path):
    (tmp_path / "t.csv").write_text("name,fraction\nzog,1\n")
    mix = {"table": str(tmp_path / "t.csv"), "schedule": {"kind": "constant", "value": 0}}
    with pytest.raises(DataError, match="no example's class"):
        config(mix=mix).check()


def test_uneven_shards_end_and_every_example_is_seen_by_some_rank(config, shards):
    """Three samples in one shard and two in the other, on two ranks with a batch of two."""
    from trainers.loop import split_batch
    from trainers.methods.sdxl_lora import SdxlLoraConfig

    data = config()
    examples = data.split().train
    training = SdxlLoraConfig.model_construct(batch_size=2, micro_batch_size=None)
    seen = Counter(
        data.pick(examples, 0, step, step * 2 + place, 2)
        for step in range(5)
        for rank in range(2)
        for places in split_batch(training, rank, 2)
        for place in places
    )
    assert seen == dict.fromkeys(range(5), 2)


def test_equal_samples_make_equal_shards(tmp_path):
    for name in "ab":
        write_shard(tmp_path / name, [sample(0), sample(1)])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_transparency_in_a_shard_is_laid_over_white(config, shards, tmp_path):
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "t.png")
    rewrite(shards, sample(3, png=(tmp_path / "t.png").read_bytes()))
    assert torch.equal(config().read(config().split().train[3]).pixels, torch.ones(1, 3, 64, 64))


def test_the_key_of_a_centred_square_is_the_hash_of_the_bytes(config):
    assert config().split().train[2].key == hashlib.sha256(png(2)).hexdigest()


def test_checking_shards_does_not_import_torch(config):
    code = f"""
import sys
import trainers.data
from trainers.batch import DataConfig
DataConfig.model_validate({config(mix={"schedule": {"kind": "linear", "steps": 3}}).model_dump(mode="json")!r}).check()
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
