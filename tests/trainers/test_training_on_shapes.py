"""Training on pictures of several shapes."""

# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false

import pytest
import torch

from tests.contracts.method import InterruptionError, interrupt, losses, weights
from tests.trainers.conftest import draw
from tests.trainers.ip_adapters import build_config, write_pairs
from trainers.batch import Batch
from trainers.errors import DataError
from trainers.loop import fit
from trainers.rundir import RunDir
from trainers.validation import validation_batches

SHAPES = [(96, 64)] * 4 + [(64, 64)] * 3 + [(60, 96)] * 3


@pytest.fixture
def album(tmp_path):
    folder = tmp_path / "album"
    folder.mkdir()
    for number, size in enumerate(SHAPES):
        draw(number, size).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    return folder


@pytest.fixture
def make(make_config, album):
    def make(data=(), **changes):
        tree = {"kind": "folder", "path": str(album), "resolution": 64, "buckets": {"step": 16}, **dict(data)}
        return make_config(data=tree, **changes)

    return make


@pytest.fixture
def shapes(monkeypatch):
    """Shapes of the latents that the denoiser sees, call after call."""
    from trainers.unet import UnetBackbone

    seen, stock = [], UnetBackbone.denoise

    def noting(self, x_t, t, condition):
        seen.append((tuple(x_t.shape[2:]), condition.sizes[:, 4:].tolist()))
        return stock(self, x_t, t, condition)

    monkeypatch.setattr(UnetBackbone, "denoise", noting)
    return seen


@pytest.mark.parametrize("kind", ["sdxl_lora", "dreambooth"])
def test_every_batch_has_one_shape_and_the_model_is_told_it(make, accelerator, tmp_path, shapes, kind):
    config = make(kind=kind, steps=10)
    fit(config.build(0, None, accelerator), config, RunDir(tmp_path / "run"), accelerator)
    assert {shape for shape, _ in shapes} == {(6, 10), (8, 8), (10, 6)}
    for shape, told in shapes:
        assert told == [[8.0 * shape[0], 8.0 * shape[1]]] * 4


def test_pairs_have_shapes_too(sdxl_folder, accelerator, tmp_path, shapes):
    table = write_pairs(tmp_path / "pairs")
    for number, size in enumerate(SHAPES[2:6]):
        draw(number, size).save(table.parent / f"{number}.png")
    data = {"kind": "pairs", "path": str(table), "resolution": 64, "buckets": {"step": 16}}
    config = build_config(sdxl_folder, table, data=data, batch_size=2, steps=8)
    fit(config.build(0, None, accelerator), config, RunDir(tmp_path / "run"), accelerator)
    assert {shape for shape, _ in shapes} == {(6, 10), (8, 8)}
    for shape, told in shapes:
        assert told == [[8.0 * shape[0], 8.0 * shape[1]]] * 2


def test_latents_are_those_of_the_picture_alone(make, accelerator, tmp_path):
    config = make()
    method = config.build(0, tmp_path / "cache", accelerator)
    for index, example in enumerate(method.examples):
        ours = method._images.select([index], method.backbone.device)
        alone = method.backbone.encode_image(config.data.read(example).pixels)
        assert torch.equal(ours.mean, alone.mean)
        assert torch.equal(ours.logvar, alone.logvar)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_interrupted_and_resumed_equals_uninterrupted(make, accelerator, tmp_path, step):
    config, cache = make(), tmp_path / "cache"
    whole, run = config.build(0, cache, accelerator), RunDir(tmp_path / "whole")
    fit(whole, config, run, accelerator)
    halves, broken = RunDir(tmp_path / "halves"), config.build(0, cache, accelerator)
    interrupt(broken, step)
    with pytest.raises(InterruptionError):
        fit(broken, config, halves, accelerator)
    resumed = config.build(0, cache, accelerator)
    fit(resumed, config, halves, accelerator)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
    assert losses(halves) == losses(run)


def test_micro_batches_do_not_change_the_mathematics(make, accelerator, tmp_path):
    results = []
    for size in (None, 1):
        config = make(micro_batch_size=size)
        method = config.build(0, tmp_path / "cache", accelerator)
        fit(method, config, RunDir(tmp_path / str(size)), accelerator)
        results.append(weights(method))
    for name, value in results[1].items():
        torch.testing.assert_close(value, results[0][name], atol=1e-4, rtol=1e-3)


def test_held_out_pictures_are_judged_in_batches_of_one_shape_on_the_noise_they_have_alone(make, accelerator, shapes):
    method = make({"holdout": 5}, validation={"every": 3, "draws": 3}).build(0, None, accelerator)
    together, alone = validation_batches(method, 3, 4), validation_batches(method, 3, 1)
    rows = {index: level for batch in alone for index, level in zip(batch.places, batch.levels, strict=True)}
    assert len(rows) == 15
    found = {}
    with torch.no_grad():
        for batch in together:
            found.update(zip(batch.places, method.losses(batch).tolist(), strict=True))
        for batch in alone:
            assert found[batch.places[0]] == pytest.approx(float(method.losses(batch)), rel=1e-4)
    assert len({shape for shape, _ in shapes}) > 1


def test_another_longest_shape_encodes_only_what_changes_shape(make, accelerator, tmp_path, monkeypatch):
    make().build(0, tmp_path, accelerator)
    from trainers.backbones.sdxl import Sdxl

    encoded, stock = [], Sdxl.encode_image

    def noting(self, pixels):
        encoded.append(tuple(pixels.shape[2:]))
        return stock(self, pixels)

    monkeypatch.setattr(Sdxl, "encode_image", noting)
    make().build(1, tmp_path, accelerator)
    assert encoded == []
    make({"buckets": {"step": 16, "max_aspect": 1.5}}).build(0, tmp_path, accelerator)
    assert set(encoded) == {(64, 64)}
    assert len(encoded) >= 7


def test_a_batch_of_two_shapes_cannot_be_made(make, accelerator):
    method = make().build(0, None, accelerator)
    sizes = [example.size for example in method.examples]
    other = next(index for index, size in enumerate(sizes) if size != sizes[0])
    with pytest.raises(ValueError, match="too many values to unpack"):
        method.losses(Batch(0, (0, 1), (0, other)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "dreambooth", "prior": {"prompt": "a"}}, "class pictures are drawn square"),
        ({"kind": "pdmbooth"}, "pictures of one shape"),
    ],
)
def test_methods_that_need_one_shape_say_so(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_shapes_must_suit_the_model(make):
    with pytest.raises(DataError, match="expected multiples of 8"):
        make({"buckets": {"step": 12}}).check()
