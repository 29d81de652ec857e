# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from trainers.data.folder import FolderConfig
from trainers.data.transforms import cut, cut_picture, open_picture
from trainers.errors import DataError


def folder(path, **changes):
    return FolderConfig.model_validate({"path": str(path), "resolution": 64, **changes})


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_captions_lie_beside_the_pictures(pictures):
    split = folder(pictures).split()
    assert [example.prompt for example in split.train] == [f"a zog number {i}" for i in range(6)]


def test_one_instance_prompt_serves_all(pictures):
    for caption in pictures.glob("*.txt"):
        caption.unlink()
    config = folder(pictures, instance_prompt="a sks dog")
    config.check()
    assert {example.prompt for example in config.split().train} == {"a sks dog"}


@pytest.mark.parametrize("text", [None, "  \n"])
def test_a_missing_or_empty_caption_is_named(pictures, text):
    (pictures / "3.txt").unlink()
    if text:
        (pictures / "3.txt").write_text(text)
    with pytest.raises(DataError, match=r"1 of 6 pictures .* 3\.txt"):
        folder(pictures).check()


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no pictures"):
        folder(tmp_path).check()


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        folder(tmp_path / "absent").check()


def test_a_caption_that_is_not_utf8_is_an_error(pictures):
    (pictures / "2.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match=r"2\.txt: not UTF-8"):
        folder(pictures).check()


def test_holding_out_everything_is_an_error(pictures):
    with pytest.raises(DataError, match="holdout is 6"):
        folder(pictures, holdout=6).check()


def test_two_ways_of_holding_out_exclude_each_other(pictures):
    with pytest.raises(ValueError, match="exclude each other"):
        folder(pictures, holdout=1, holdout_path=str(pictures))


def test_held_out_pictures_depend_on_contents_not_on_names(pictures):
    before = {example.key for example in folder(pictures, holdout=2).split().held_out}
    for file in list(pictures.iterdir()):
        file.rename(pictures / f"x{9 - int(file.stem)}{file.suffix}")
    assert {example.key for example in folder(pictures, holdout=2).split().held_out} == before


def test_train_and_held_out_never_share_a_picture_even_if_copied(pictures):
    for file in list(pictures.iterdir()):
        (pictures / f"copy{file.name}").write_bytes(file.read_bytes())
    split = folder(pictures, holdout=2).split()
    assert not {example.key for example in split.train} & {example.key for example in split.held_out}
    assert (len(split.held_out), len(split.train)) == (2, 8)


def test_a_folder_of_its_own_can_be_held_out_without_captions(pictures, tmp_path):
    other = tmp_path / "held"
    other.mkdir()
    Image.new("RGB", (8, 8), "red").save(other / "r.png")
    split = folder(pictures, holdout_path=str(other)).split()
    assert ([example.path.name for example in split.held_out], len(split.train)) == (["r.png"], 6)


def test_a_picture_that_cannot_be_decoded_is_never_held_out(pictures):
    first = folder(pictures, holdout=1).split().held_out[0]
    truncate(first.path)
    split = folder(pictures, holdout=4).split()
    assert len(split.held_out) == 4
    assert first.path not in {example.path for example in split.held_out}


def test_too_few_readable_pictures_to_hold_out_is_an_error(pictures):
    for number in range(5):
        truncate(pictures / f"{number}.png")
    with pytest.raises(DataError, match=r"to hold out \(expected 4\)"):
        folder(pictures, holdout=4).split()


def test_a_strict_folder_refuses_a_picture_that_cannot_be_decoded(pictures):
    for number in range(6):
        truncate(pictures / f"{number}.png")
    with pytest.raises(DataError, match="cannot be decoded"):
        folder(pictures, holdout=1, strict=True).split()
    with pytest.raises(DataError, match="cannot be decoded"):
        folder(pictures, strict=True).check()
    folder(pictures).check()


def test_a_truncated_jpeg_is_a_data_error(tmp_path):
    Image.effect_noise((200, 200), 60).save(tmp_path / "a.jpg")
    truncate(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg: cannot be decoded"):
        open_picture(tmp_path / "a.jpg")


def test_a_file_that_cannot_be_read_is_a_data_error(pictures):
    (pictures / "7.png").symlink_to(pictures / "gone.png")
    (pictures / "7.txt").write_text("a zog")
    with pytest.raises(DataError, match=r"7\.png: cannot be read"):
        folder(pictures).split()


def test_text_named_as_a_picture_is_a_data_error(tmp_path):
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(DataError, match="cannot be decoded"):
        open_picture(tmp_path / "a.png")


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (20, 10), "blue")
    image.paste((255, 0, 0), (0, 0, 10, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # stored on its side: turn clockwise
    image.save(tmp_path / "a.png", exif=exif)
    upright = open_picture(tmp_path / "a.png")
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2)) == (255, 0, 0)
    assert upright.getpixel((5, 17)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.info["transparency"] = 0
    elif mode == "LA":
        image = image.convert("LA")
    image.save(tmp_path / "a.png", **({"transparency": 0} if mode == "P" else {}))
    assert open_picture(tmp_path / "a.png").getpixel((1, 1)) == (255, 255, 255)


def test_half_transparent_red_over_white_is_pink(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "a.webp", lossless=True)
    assert open_picture(tmp_path / "a.webp").getpixel((1, 1)) == pytest.approx((255, 127, 127), abs=1)


def test_cmyk_keeps_its_colour(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = open_picture(tmp_path / "a.jpg").getpixel((8, 8))
    assert red > 240
    assert max(green, blue) < 15


def test_grey_becomes_three_equal_channels(tmp_path):
    Image.new("L", (4, 4), 77).save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").getpixel((0, 0)) == (77, 77, 77)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 128 * 256, dtype=np.uint16)).save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").getpixel((0, 0)) == (128, 128, 128)


def test_a_photo_of_a_hundred_megapixels_is_welcome(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)  # as if 8x8 were beyond Pillow's limit but not twice that
    Image.new("RGB", (8, 7), "red").save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").size == (8, 7)


def test_a_decompression_bomb_is_a_data_error(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match="cannot be decoded"):
        open_picture(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("size", "crop"), [((200, 100), (0, 32)), ((100, 200), (32, 0)), ((64, 64), (0, 0)), ((30, 30), (0, 0))]
)
def test_crop_coordinates_are_those_of_the_resized_picture(size, crop):
    image, geometry = cut(Image.new("RGB", size), (64, 64))
    assert image.size == (64, 64)
    assert (geometry.original, geometry.crop, geometry.target) == ((size[1], size[0]), crop, (64, 64))


def test_the_centre_is_what_remains(tmp_path):
    image = Image.new("RGB", (300, 100), "black")
    image.paste((255, 255, 255), (100, 0, 200, 100))
    image.save(tmp_path / "a.png")
    picture = cut_picture(tmp_path / "a.png", (100, 100))
    assert picture.pixels.shape == (1, 3, 100, 100)
    assert torch.equal(picture.pixels, torch.ones(1, 3, 100, 100))


def test_pixels_span_minus_one_to_one(tmp_path):
    image = Image.new("RGB", (8, 8), "black")
    image.paste((255, 255, 255), (0, 0, 4, 8))
    image.save(tmp_path / "a.png")
    pixels = cut_picture(tmp_path / "a.png", (8, 8)).pixels
    assert (pixels.min(), pixels.max()) == (-1, 1)


def test_checking_data_and_model_does_not_import_torch(pictures, sdxl_folder):
    code = f"""
import sys
import trainers.methods
from trainers.method import MethodConfig
MethodConfig.model_validate({{
    "kind": "sdxl_lora", "steps": 3, "batch_size": 1,
    "backbone": {{"kind": "sdxl", "path": {str(sdxl_folder)!r}}},
    "data": {{"kind": "folder", "path": {str(pictures)!r}, "resolution": 64}},
}}).check()
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
