"""PDMBooth: masks, what is refused, and precision."""

# pyright: basic

import pytest
import torch
from PIL import Image, ImageDraw

from tests.contracts.method import weights
from tests.trainers.subjects import INVERTED, PRIOR, SECTIONS, SIZE, batch_of, combination, masks_in
from trainers.batch import Batch
from trainers.data.transforms import open_picture
from trainers.errors import ConfigError, DataError, ModelError
from trainers.loop import fit
from trainers.rundir import RunDir


def test_errors_outside_the_mask_do_not_count(build, folder, monkeypatch):
    masked = build(instance={"masked": True}, pdm=None, masks=masks_in(folder))
    batch = Batch(0, (0, 1), (0, 1))
    hidden = masked._masks[[0, 1]] == 0
    assert 0 < hidden.float().mean() < 1
    before = masked.losses(batch)
    denoise = masked.backbone.denoise
    monkeypatch.setattr(masked.backbone, "denoise", lambda *told: denoise(*told) + 100 * hidden)
    torch.testing.assert_close(masked.losses(batch), before)
    monkeypatch.setattr(masked.backbone, "denoise", lambda *told: denoise(*told) + 100 * ~hidden)
    assert (masked.losses(batch) > 10 * before).all()


def test_masks_that_are_white_all_over_change_nothing(build, folder):
    for file in (folder / "masks").iterdir():
        Image.new("L", SIZE, "white").save(file)
    sections = {"instance": {"masked": True}, "pdm": {"masked": True, "prompt": "a star"}}
    masked = build(**sections, masks=masks_in(folder))
    plain = build(pdm={"prompt": "a star"})
    batch = batch_of(plain, 6)
    with torch.no_grad():
        torch.testing.assert_close(masked.losses(batch), plain.losses(batch))


def test_class_pictures_can_be_masked_by_a_source_that_finds_masks(build, folder, tmp_path, monkeypatch):
    asked = []

    def find(self, examples, frozen):
        asked.append([example.path.parent.name for example in examples])
        masks = [open_picture(example.path).convert("L").point(lambda _: 0) for example in examples]
        for mask in masks:
            ImageDraw.Draw(mask).rectangle((10, 10, 30, 30), fill="white")
        return masks

    monkeypatch.setattr("trainers.matching.masks.SamMasks.find", find)
    sam = {"kind": "sam", "path": str(folder)}
    method = build(tmp_path / "cache", prior={**PRIOR, "masked": True}, pdm={"masked": True}, masks=sam)
    assert sorted(map(len, asked)) == [2, 3]
    assert (method._masks[list(method._rows["instance"])] == 1).all()
    assert (method._masks[[*method._rows["prior"], *method._rows["pdm"]]] == 0).any()
    with pytest.raises(ConfigError, match="without a cache"):
        build(prior={**PRIOR, "masked": True}, masks=sam)


def test_the_subjects_folders_are_only_read(build, folder, tmp_path):
    def contents():
        return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and "cache" not in file.parts}

    before = contents()
    options = {"prior": PRIOR, "pdm": {"target": INVERTED, "masked": True}, "masks": masks_in(folder)}
    build(tmp_path / "cache", **options)
    assert contents() == before


def test_what_is_held_out_is_judged_by_the_denoising_loss(make_pdmbooth, accelerator, folder, tmp_path):
    data = {"kind": "folder", "path": str(folder / "subject"), "resolution": 64, "holdout": 1}
    options = {"data": data, "validation": {"every": 3, "draws": 2}, "schedule": {"kind": "constant"}}
    losses = []
    for sections in ({"pdm": None}, combination(*SECTIONS), {**combination("prior", "pdm")}):
        config = make_pdmbooth(**options, **sections, optimizer={"kind": "adamw", "lr": 1e-9})
        run = RunDir(tmp_path / str(len(losses)))
        fit(config.build(0, None, accelerator), config, run, accelerator)
        losses.append([event["loss"] for _, event in run.read_events() if event["event"] == "validation"])
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_frozen_weights_may_be_bfloat16(make_pdmbooth, tmp_path):
    from accelerate.state import AcceleratorState

    from trainers.train import build_accelerator

    config = make_pdmbooth(**combination(*SECTIONS), precision="bf16")
    try:
        accelerator = build_accelerator(config)
        method = config.build(0, None, accelerator)
        before = weights(method)
        fit(method, config, RunDir(tmp_path / "run"), accelerator)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert all(not torch.equal(value, before[name]) for name, value in weights(method).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (combination(), "all null"),
        ({**combination("pdm"), "pdm": {}}, "compares the model with itself"),
        ({"instance": {"masked": True}}, "instance.masked is true and masks is null"),
        ({"masks": {"kind": "folder", "path": "/m"}}, "no loss is masked"),
        ({"prior": {**PRIOR, "masked": True}, "masks": {"kind": "folder", "path": "/m"}}, "source that finds them"),
        ({"compile_blocks": True}, "hides the queries"),
        ({"pdm": {"weight": 0}}, "greater than 0"),
        ({"pdm": {"target": {"kind": "inverted", "steps": 0}}}, "greater than 0"),
    ],
)
def test_what_makes_no_sense_is_refused(make_pdmbooth, changes, message):
    with pytest.raises(ValueError, match=message):
        make_pdmbooth(**changes)


def test_a_layer_that_does_not_exist_is_found_before_training(make_pdmbooth):
    with pytest.raises(ModelError, match=r"'mid_block\.attn9' is not an attention layer"):
        make_pdmbooth(pdm={"layer": "mid_block.attn9"}).check()


def test_an_empty_mask_is_found_before_training(make_pdmbooth, folder):
    Image.new("L", SIZE).save(folder / "masks" / "1.png")
    with pytest.raises(DataError, match=r"masks/1\.png: the mask is empty"):
        make_pdmbooth(instance={"masked": True}, masks=masks_in(folder)).check()


def test_a_sound_study_passes_its_check(make_pdmbooth, folder):
    make_pdmbooth(prior=PRIOR, pdm={"masked": True, "target": INVERTED}, masks=masks_in(folder)).check()
