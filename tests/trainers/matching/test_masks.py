# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from trainers.batch import Example
from trainers.cache import Cache, hash_file
from trainers.data.transforms import cut, open_picture
from trainers.errors import DataError, ModelError
from trainers.frozen import Frozen
from trainers.matching.masks import FolderMasks, SamMasks, fit_masks, shrink

SIZE = (100, 64)
BOX = (30, 10, 69, 49)


@pytest.fixture
def frozen(accelerator):
    return Frozen(None, SimpleNamespace(device=torch.device("cpu")), None, accelerator)


def draw_mask(path, size=SIZE, box=BOX, mode="L"):
    mask = Image.new(mode, size, "black")
    if box:
        ImageDraw.Draw(mask).rectangle(box, fill="white")
    mask.save(path)


@pytest.fixture
def picture(tmp_path):
    """A picture whose subject is white on blue, and its mask."""
    image = Image.new("RGB", SIZE, "blue")
    ImageDraw.Draw(image).rectangle(BOX, fill="white")
    image.save(tmp_path / "a.jpg", quality=100)
    (tmp_path / "masks").mkdir()
    draw_mask(tmp_path / "masks" / "a.png")
    return tmp_path / "a.jpg"


def example(path):
    return Example(hash_file(path), path, "")


def source(picture):
    return FolderMasks(path=picture.parent / "masks")


def test_a_mask_has_the_name_of_its_picture(picture, frozen):
    (mask,) = source(picture).find([example(picture)], frozen)
    assert mask.size == SIZE
    assert mask.getbbox() == (30, 10, 70, 50)


def test_a_mask_of_the_very_same_name_goes_first(picture, frozen):
    draw_mask(picture.parent / "masks" / "a.jpg", box=(0, 0, 9, 9))
    (mask,) = source(picture).find([example(picture)], frozen)
    assert mask.getpixel((50, 30)) < 10


@pytest.mark.parametrize("mode", ["1", "RGB", "P"])
def test_black_and_white_may_be_stored_in_any_mode(picture, frozen, mode):
    draw_mask(picture.parent / "masks" / "a.png", mode=mode)
    (mask,) = source(picture).find([example(picture)], frozen)
    assert sorted(set(np.asarray(mask).ravel().tolist())) == [0, 255]


def test_an_empty_mask_is_named_before_training(picture):
    draw_mask(picture.parent / "masks" / "a.png", box=None)
    with pytest.raises(DataError, match=r"masks/a\.png: the mask is empty"):
        source(picture).check([picture])


def test_a_missing_mask_is_named_before_training(picture):
    shutil.copy(picture, picture.with_name("b.png"))
    with pytest.raises(DataError, match=r"masks: no mask of b\.png; expected .* b\.png"):
        source(picture).check([picture, picture.with_name("b.png")])


def test_a_mask_of_another_size_is_refused(picture):
    draw_mask(picture.parent / "masks" / "a.png", size=(64, 64))
    with pytest.raises(DataError, match=r"\(64, 64\) pixels; expected \(100, 64\)"):
        source(picture).check([picture])


def test_a_transparent_mask_is_refused_as_it_could_mean_either(picture):
    Image.new("RGBA", SIZE, (255, 255, 255, 0)).save(picture.parent / "masks" / "a.png")
    with pytest.raises(DataError, match="transparent"):
        source(picture).check([picture])


def test_a_mask_that_cannot_be_decoded_is_named(picture):
    (picture.parent / "masks" / "a.png").write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded"):
        source(picture).check([picture])


def test_the_mask_of_a_turned_photo_is_that_of_the_upright_picture(picture, frozen):
    image = open_picture(picture).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise to see it upright
    image.save(picture, exif=exif, quality=100)
    source(picture).check([picture])
    assert len(source(picture).find([example(picture)], frozen)) == 1


def test_the_mask_of_a_broken_picture_is_not_asked_to_fit(picture):
    picture.write_bytes(b"rubbish")
    source(picture).check([picture])


@pytest.mark.parametrize("size", [(100, 64), (64, 100), (64, 64), (301, 167), (40, 33)])
@pytest.mark.parametrize("resolution", [64, 48])
def test_a_mask_goes_through_the_pictures_own_resize_and_crop(size, resolution):
    """The white of a black picture is its own mask, wherever it ends up."""
    image = Image.new("RGB", size)
    ImageDraw.Draw(image).rectangle((size[0] // 3, size[1] // 4, size[0] // 2, size[1] // 2), fill="white")
    cropped, geometry = cut(image, (resolution, resolution))
    found = fit_masks([image.convert("L")], [geometry], (resolution, resolution), [None])[0, 0]
    shown = torch.from_numpy(np.asarray(cropped.convert("L"), dtype=np.float32)) / 255
    # Two filters smooth an edge differently; nothing may shift.
    assert (found - shown).abs().mean() < 0.02
    for axis in (0, 1):
        place = torch.arange(resolution, dtype=torch.float32)
        centres = [(m.sum(1 - axis) * place).sum() / m.sum() for m in (found, shown)]
        assert abs(centres[0] - centres[1]) < 0.1


def test_latents_count_by_the_share_of_their_pixels():
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).rectangle((0, 0, 11, 7), fill=255)
    _, geometry = cut(mask, (64, 64))
    found = fit_masks([mask], [geometry], (8, 8), [None])
    assert found.shape == (1, 1, 8, 8)
    assert found[0, 0, 0, :3].tolist() == [1.0, 0.5, 0.0]
    assert found.sum() == 1.5


def test_a_single_pixel_survives():
    mask = Image.new("L", (64, 64))
    mask.putpixel((40, 20), 255)
    _, geometry = cut(mask, (64, 64))
    assert (fit_masks([mask], [geometry], (8, 8), [None]) > 0).sum() == 1


def test_a_subject_outside_the_crop_is_an_error_that_names_the_picture(picture):
    mask = Image.new("L", SIZE)
    mask.putpixel((2, 30), 255)
    _, geometry = cut(mask, (64, 64))
    with pytest.raises(DataError, match=r"a\.jpg: the crop to \(64, 64\) leaves nothing"):
        fit_masks([mask], [geometry], (8, 8), [example(picture)])


def test_a_coarser_grid_keeps_the_share_of_the_subject():
    mask = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(shrink(mask, (4, 4)).mean(), mask.mean())


@pytest.fixture(scope="session")
def sam_folder(tmp_path_factory):
    """Segment Anything with random weights, in the layout of facebook/sam-vit-huge."""
    import transformers

    torch.manual_seed(14)
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "patch_size": 16,
            "output_channels": 8, "window_size": 2, "num_pos_feats": 4, "global_attn_indexes": [0],
            "initializer_range": 0.5,
        },
        prompt_encoder_config={"hidden_size": 8, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 8, "num_attention_heads": 2, "mlp_dim": 16, "iou_head_hidden_dim": 8},
    )  # fmt: skip
    model = transformers.SamModel(config)
    for name, parameter in model.named_parameters():
        # Without biases the proposals follow the picture, and with them they are all or nothing.
        parameter.data.normal_(0, 0.0 if name.endswith("bias") else 0.5)
    folder = tmp_path_factory.mktemp("models") / "sam"
    model.save_pretrained(folder)
    processor = transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    transformers.SamProcessor(processor).save_pretrained(folder)
    return folder


def propose(folder, image, points):
    """What transformers' own classes propose, as its documentation runs them."""
    import transformers

    model = transformers.SamModel.from_pretrained(folder)
    processor = transformers.SamProcessor.from_pretrained(folder)
    inputs = processor(image, input_points=[[points]], return_tensors="pt")
    inputs["input_points"] = inputs["input_points"].float()
    with torch.no_grad():
        outputs = model(**inputs)
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    return processor.image_processor.post_process_masks(outputs.pred_masks, *sizes)[0][0], outputs.iou_scores[0, 0]


def pictures_of(folder, count):
    """Pictures that differ in every part."""
    folder.mkdir()
    for number in range(count):
        image = Image.new("RGB", (100, 64), (255 * (number % 2), 90 * number % 256, 40))
        ImageDraw.Draw(image).ellipse((20 * number, 10, 20 * number + 40, 60), fill=(250, 20 * number, 255))
        image.save(folder / f"{number}.png")
    return [example(folder / f"{number}.png") for number in range(count)]


def test_sam_gives_the_mask_that_it_expects_to_fit_best(sam_folder, frozen, tmp_path):
    examples = pictures_of(tmp_path / "p", 4)
    found = SamMasks(path=sam_folder, points=((0.5, 0.25), (0.6, 0.5))).find(examples, frozen)
    chosen = set()
    for one, mask in zip(examples, found, strict=True):
        masks, scores = propose(sam_folder, open_picture(one.path), [[50.0, 16.0], [60.0, 32.0]])
        assert mask.size == (100, 64)
        assert np.array_equal(np.asarray(mask) > 0, masks[scores.argmax()].numpy())
        chosen.add(int(scores.argmax()))
    # The random model is of different minds about these pictures, or the test would not see a fixed choice.
    assert len(chosen) > 1


def test_sam_runs_once_for_each_picture_and_setting(sam_folder, frozen, tmp_path, monkeypatch):
    import transformers

    cached = Frozen(frozen.config, frozen.backbone, Cache(tmp_path / "cache"), frozen.accelerator)
    examples, sam = pictures_of(tmp_path / "p", 2), SamMasks(path=sam_folder)
    first = sam.find(examples, cached)
    sam.model_copy(update={"points": ((0.1, 0.1),)}).find(examples, cached)
    monkeypatch.setattr(transformers.SamModel, "from_pretrained", None)
    again = sam.find(examples, cached)
    assert [mask.tobytes() for mask in again] == [mask.tobytes() for mask in first]
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 4


def test_sam_is_freed_when_its_masks_are_found(sam_folder, frozen, tmp_path, monkeypatch):
    import weakref

    import transformers

    loaded = []
    original = transformers.SamModel.from_pretrained

    def spy(*arguments, **options):
        model = original(*arguments, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(transformers.SamModel, "from_pretrained", spy)
    SamMasks(path=sam_folder).find(pictures_of(tmp_path / "p", 1), frozen)
    assert [reference() for reference in loaded] == [None]


def test_a_picture_in_which_sam_finds_nothing_is_named(sam_folder, frozen, tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.matching.masks._Sam.__call__", lambda *_: torch.zeros(64, 100, dtype=torch.bool))
    with pytest.raises(DataError, match=r"0\.png: Segment Anything finds nothing at \(\(0\.5, 0\.5\),\)"):
        SamMasks(path=sam_folder).find(pictures_of(tmp_path / "p", 1), frozen)


def test_an_incomplete_folder_is_an_error_before_training(sam_folder, tmp_path):
    folder = shutil.copytree(sam_folder, tmp_path / "sam")
    SamMasks(path=folder).check([])
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        SamMasks(path=folder).check([])


def test_a_folder_of_another_model_is_an_error_before_training(sam_folder, tmp_path):
    folder = shutil.copytree(sam_folder, tmp_path / "sam")
    (folder / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError, match="'clip'; expected 'sam'"):
        SamMasks(path=folder).check([])


@pytest.mark.parametrize("points", [(), ((1.5, 0.5),)])
def test_points_are_shares_of_the_picture(sam_folder, points):
    with pytest.raises(ValueError, match="points"):
        SamMasks(path=sam_folder, points=points)
