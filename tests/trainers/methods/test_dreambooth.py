# pyright: basic, reportPrivateImportUsage=false
from contextlib import nullcontext
from types import SimpleNamespace

import diffusers
import pytest
import torch
from PIL import Image

from tests.contracts.method import MethodContract
from tests.trainers.models import build_sana
from trainers.batch import Batch
from trainers.loop import fit
from trainers.prior import PriorConfig
from trainers.prompt import Sample
from trainers.rundir import RunDir

PRIOR = {"prompt": "a thing", "count": 3, "steps": 2, "batch_size": 2}
FOUR = Batch(0, (0, 1, 2, 3), (0, 1, 2, 3))


@pytest.fixture
def make(make_config, pictures):
    """A short DreamBooth trial of the tiny SDXL model."""

    def make(**changes):
        data = {"kind": "folder", "path": str(pictures), "resolution": 64, "instance_prompt": "a zog"}
        return make_config(**{"kind": "dreambooth", "data": data, **changes})

    return make


@pytest.fixture(scope="session")
def sana_folder(tmp_path_factory):
    return build_sana(tmp_path_factory.mktemp("models") / "sana")


class TestLora(MethodContract):
    @pytest.fixture
    def config(self, make):
        return make()


class TestPrior(MethodContract):
    @pytest.fixture
    def config(self, make):
        return make(prior=PRIOR)


class TestEveryWeight(MethodContract):
    @pytest.fixture
    def config(self, make):
        return make(lora=None, train_text_encoders=True, optimizer={"kind": "adamw", "lr": 1e-3})

    def test_micro_batches_do_not_change_the_mathematics(self):
        pytest.skip(
            "Adam turns rounding of tiny gradients into whole steps; the test of adapters is about the same loop"
        )

    def test_initial_weights_are_a_function_of_the_seed(self, method, sdxl_folder):
        unet = diffusers.UNet2DConditionModel.from_pretrained(sdxl_folder / "unet").state_dict()
        trained = method.trained()["unet"].parameters()
        assert trained.keys() == unet.keys()
        assert all(torch.equal(value, unet[name]) for name, value in trained.items())

    def test_export_writes_no_frozen_weight(self, method, tmp_path):
        method.export(tmp_path)
        assert sorted(file.parent.name for file in tmp_path.rglob("*.safetensors")) == [
            "text_encoder", "text_encoder_2", "unet",
        ]  # fmt: skip


class TestStableDiffusionOfVelocity(MethodContract):
    @pytest.fixture
    def config(self, make, sd_v_folder):
        backbone = {"kind": "sd", "path": str(sd_v_folder), "zero_terminal_snr": True}
        return make(backbone=backbone, text_encoder_lora={"rank": 2}, prior=PRIOR)


class TestSana(MethodContract):
    @pytest.fixture
    def config(self, make, sana_folder):
        backbone = {"kind": "sana", "path": str(sana_folder), "instruction": "", "max_sequence_length": 16}
        return make(backbone=backbone, prior=PRIOR | {"scheduler": "euler"})


def test_half_of_every_batch_is_the_class_and_every_picture_is_shown_as_often(make, accelerator):
    method = make(prior=PRIOR).build(0, None, accelerator)
    shown = [method.pick(0, position) for position in range(24)]
    assert all((i >= 6) == bool(position % 2) for position, i in enumerate(shown))
    assert sorted(shown[::2]) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert sorted(shown[1::2]) == [6, 6, 6, 6, 7, 7, 7, 7, 8, 8, 8, 8]


def test_the_loss_is_the_subjects_mean_and_the_weighted_classes_mean(make, accelerator):
    plain = make(prior=PRIOR | {"weight": 1.0}).build(0, None, accelerator)
    weighted = make(prior=PRIOR | {"weight": 0.3}).build(0, None, accelerator)
    batch = Batch(0, (0, 1, 2, 3), (0, 6, 3, 8))
    with torch.no_grad():
        rows = plain.losses(batch) / 2
        expected = rows[[0, 2]].mean() + 0.3 * rows[[1, 3]].mean()
        torch.testing.assert_close(weighted.losses(batch).mean(), expected)


def test_a_prior_of_no_weight_leaves_the_subjects_gradients_alone(make, accelerator):
    batch = Batch(0, (0, 1, 2, 3), (0, 6, 3, 8))
    method = make(prior=PRIOR | {"weight": 0.0}).build(0, None, accelerator)
    assert torch.equal(method.losses(batch)[[1, 3]], torch.zeros(2))


def test_class_pictures_are_drawn_once_and_exactly_as_many_as_are_missing(make, accelerator, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    make(prior=PRIOR | {"count": 2}).build(0, cache, accelerator)
    drawn = {file: file.stat().st_mtime_ns for file in cache.rglob("*.png")}
    assert len(drawn) == 2
    method = make(prior=PRIOR).build(1, cache, accelerator)
    assert len(list(cache.rglob("*.png"))) == 3
    assert all(file.stat().st_mtime_ns == time for file, time in drawn.items())
    assert [example.prompt for example in method.examples[6:]] == ["a thing"] * 3
    monkeypatch.setattr("trainers.backbones.sdxl.Sdxl.decode", None)
    make(prior=PRIOR).build(2, cache, accelerator)


def test_every_class_picture_is_somebodys_whatever_is_drawn_between_two_processes_looks(tmp_path, monkeypatch):
    def blank(model, requests, config):
        return (Sample(one.prompt, one.seed, Image.new("RGB", (8, 8))) for one in requests)

    monkeypatch.setattr("trainers.sampling.generate", blank)
    files = [tmp_path / f"{seed}.png" for seed in range(4)]
    for rank in range(2):
        accelerator = SimpleNamespace(
            process_index=rank, num_processes=2, autocast=nullcontext, wait_for_everyone=lambda: None
        )
        PriorConfig(prompt="a thing")._draw(
            SimpleNamespace(accelerator=accelerator, cache=True, backbone=None), 64, files
        )
    assert all(file.is_file() for file in files)


def test_the_log_says_how_far_long_drawing_and_encoding_are(make, accelerator, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("trainers.frozen._SILENCE", 0.0)
    caplog.set_level("INFO", "trainers")
    make(prior=PRIOR).build(0, tmp_path, accelerator)
    assert "class pictures: 2 of 3" in caplog.messages
    assert "pictures: 5 of 6" in caplog.messages


def test_a_picture_of_the_class_does_not_depend_on_how_many_are_drawn_at_once(make, accelerator, tmp_path):
    for size in (1, 3):
        make(prior=PRIOR | {"batch_size": size}).build(0, tmp_path / str(size), accelerator)
    one, three = ({file.name: file for file in (tmp_path / str(size)).rglob("*.png")} for size in (1, 3))
    assert one.keys() == three.keys()
    for name, file in one.items():
        pair = [torch.tensor(list(Image.open(path).tobytes()), dtype=torch.int) for path in (file, three[name])]
        assert (pair[0] - pair[1]).abs().max() <= 1


def test_another_process_finds_the_class_pictures_that_one_has_drawn(make, accelerator, tmp_path, monkeypatch):
    """diffusers keeps a list made from a set of strings, which stands in another order in every process."""
    from trainers.unet import UnetBackbone

    stock = UnetBackbone.sampling_scheduler

    def shuffled(self, name):
        scheduler = stock(self, name)
        defaults = scheduler.config["_use_default_values"]
        assert len(defaults) > 1
        scheduler.register_to_config(_use_default_values=defaults[::-1])
        return scheduler

    make(prior=PRIOR).build(0, tmp_path, accelerator)
    monkeypatch.setattr(UnetBackbone, "sampling_scheduler", shuffled)
    monkeypatch.setattr("trainers.backbones.sdxl.Sdxl.decode", None)
    make(prior=PRIOR).build(1, tmp_path, accelerator)


def test_a_users_class_pictures_come_first_and_their_folder_is_left_alone(make, accelerator, pictures, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (70, 90), "red").save(folder / "red.png")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    method = make(prior=PRIOR | {"path": str(folder)}).build(0, tmp_path / "cache", accelerator)
    names = [example.path.name for example in method.examples[6:]]
    assert names == ["red.png", "0000.png", "0001.png"]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_an_odd_batch_cannot_be_half_class(make):
    with pytest.raises(ValueError, match="expected an even number"):
        make(prior=PRIOR, batch_size=3)


def test_an_empty_folder_of_class_pictures_is_refused(make, tmp_path):
    from trainers.errors import DataError

    with pytest.raises(DataError, match="no pictures"):
        make(prior=PRIOR | {"path": str(tmp_path)}).check()


def test_gemma_cannot_be_trained(make, sana_folder):
    with pytest.raises(ValueError, match="diffusers has no file"):
        make(backbone={"kind": "sana", "path": str(sana_folder)}, train_text_encoders=True)


def test_a_model_that_was_trained_whole_loads_in_the_stock_pipeline(make, accelerator, tmp_path, sdxl_folder):
    config = make(lora=None, train_text_encoders=True, steps=2, optimizer={"kind": "adamw", "lr": 1e-3})
    method = config.build(0, None, accelerator)
    fit(method, config, RunDir(tmp_path / "run"), accelerator)
    method.export(tmp_path / "model")
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(
        sdxl_folder,
        unet=diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet"),
        text_encoder=type(method.backbone.text_encoders[0]).from_pretrained(tmp_path / "model" / "text_encoder"),
        text_encoder_2=type(method.backbone.text_encoders[1]).from_pretrained(tmp_path / "model" / "text_encoder_2"),
    )
    ours = config.load_trained(tmp_path / "model", accelerator)
    hidden, _, pooled, _ = pipeline.encode_prompt("a zog", do_classifier_free_guidance=False)
    text = ours.encode_prompts(["a zog"])
    torch.testing.assert_close(text.hidden, hidden)
    torch.testing.assert_close(text.pooled, pooled)
    x_t, sizes = torch.randn(1, *ours.latent_shape(64, 64)), torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    with torch.no_grad():
        added = {"text_embeds": pooled, "time_ids": sizes}
        theirs = pipeline.unet(x_t, 500, hidden, added_cond_kwargs=added).sample
        mine = ours.denoise(x_t, torch.tensor([500]), ours.condition(text, [method._images.geometries[0]]))
    assert not torch.allclose(mine, theirs)  # the photo is 80 x 64; what follows says the same size
    from trainers.batch import Geometry

    with torch.no_grad():
        mine = ours.denoise(x_t, torch.tensor([500]), ours.condition(text, [Geometry.whole(64, 64)]))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
