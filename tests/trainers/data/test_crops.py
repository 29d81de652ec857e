# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false
import pytest
from PIL import Image

from trainers.data.crops import CENTRED, AspectCrop, CentreCrop
from trainers.data.transforms import cut


@pytest.mark.parametrize(
    ("identity", "variant", "side", "margin", "offset"),
    [
        # Worked out with sha256sum and exact fractions.
        ("img-1", 0, 64, 16, 8),
        ("img-1", 1, 64, 16, 9),
        ("img-2", 0, 100, 70, 37),
        ("img-2", 3, 100, 70, 25),
        ("pika", 2, 1024, 365, 205),
        ("pika", 0, 1024, 365, 193),
        ("edge", 0, 64, 64, 36),  # the aspect ratio is 2
        ("wide", 0, 64, 80, 40),  # beyond 2 an even hash is the middle
        ("wide", 1, 64, 80, 0),  # and an odd one the edge
    ],
)
def test_the_place_of_a_variant_follows_the_formula(identity, variant, side, margin, offset):
    assert AspectCrop().place(identity, variant, side, margin) == offset


@pytest.mark.parametrize("crop", [AspectCrop(), CentreCrop()])
@pytest.mark.parametrize("margin", [0, 1, 15, 64, 500])
def test_the_centred_variant_is_the_middle(crop, margin):
    assert crop.place("any", CENTRED, 64, margin) == margin // 2


@pytest.mark.parametrize("margin", [1, 7, 30, 45, 64, 65, 640])
def test_no_variant_leaves_the_picture_or_strays_beyond_its_share(margin):
    places = [AspectCrop().place(f"id{i}", variant, 64, margin) for i in range(200) for variant in range(4)]
    if margin > 64:
        assert set(places) == {0, margin // 2}
    else:
        assert max(abs(place - margin // 2) for place in places) <= round(0.18 * margin)


def test_variants_differ_and_ids_differ():
    crop = AspectCrop()
    assert len({crop.place("a", variant, 1024, 700) for variant in range(8)}) == 8
    assert len({crop.place(f"{i}", 0, 1024, 700) for i in range(50)}) > 40


def test_variants_are_what_training_shows():
    assert list(AspectCrop(variants=3).shown) == [0, 1, 2]
    assert list(CentreCrop().shown) == [CENTRED]


@pytest.mark.parametrize(("size", "crop"), [((128, 64), (0, 5)), ((64, 128), (5, 0)), ((256, 128), (0, 5))])
def test_a_place_is_along_the_long_side_and_in_pixels_of_the_resized_picture(size, crop):
    image, geometry = cut(Image.new("RGB", size), (64, 64), lambda margin: 5)
    assert (image.size, geometry.crop) == ((64, 64), crop)
    assert geometry.original == (size[1], size[0])


def test_the_square_holds_what_lies_there():
    image = Image.new("RGB", (200, 100), "black")
    image.paste((255, 255, 255), (30, 0, 130, 100))
    square, _ = cut(image, (100, 100), lambda margin: 30)
    assert square.getextrema() == ((255, 255),) * 3
