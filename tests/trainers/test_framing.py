import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainers.framing import Framing, grow_to_square

WHITE = (255, 255, 255)


def picture(size, box):
    image = Image.new("RGB", size)
    image.paste(WHITE, box)
    return image


def found(image):
    """Bounding box of what is bright."""
    ys, xs = np.nonzero(np.asarray(image.convert("L")) > 127)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


@given(
    width=st.integers(40, 200), height=st.integers(40, 200), mirrored=st.booleans(),
    corner=st.tuples(st.floats(0, 0.7), st.floats(0, 0.7)), side=st.floats(0.15, 0.3),
)  # fmt: skip
def test_a_box_goes_where_its_pixels_go(width, height, mirrored, corner, side):
    left, top = int(corner[0] * width), int(corner[1] * height)
    box = (left, top, left + max(4, int(side * width)), top + max(4, int(side * height)))
    framing = Framing.around((height, width), (64, 64), box, mirrored=mirrored)
    pixels, moved = found(framing.apply(picture((width, height), box))), framing.box(box)
    # The box is rounded outward, and resampling shades a pixel at the edge.
    assert all(abs(a - b) <= 2 for a, b in zip(pixels, moved, strict=True)), (pixels, moved)
    assert 0 <= moved[0] < moved[2] <= 64
    assert 0 <= moved[1] < moved[3] <= 64


def test_without_a_box_the_crop_is_the_centre():
    framing = Framing.around((100, 300), (50, 50))
    assert (framing.resized, framing.crop) == ((50, 150), (0, 50))
    assert framing.geometry.original == (100, 300)
    assert framing.geometry.crop == (0, 50)
    assert framing.geometry.target == (50, 50)


@pytest.mark.parametrize(
    ("box", "left"), [((0, 0, 20, 20), 0), ((280, 0, 300, 20), 100), ((140, 0, 160, 20), 50), ((200, 0, 260, 20), 80)]
)
def test_the_crop_moves_no_further_than_the_face_asks(box, left):
    assert Framing.around((100, 300), (50, 50), box).crop == (0, left)


def test_a_face_larger_than_the_crop_fills_it():
    framing = Framing.around((100, 300), (50, 50), (100, 0, 260, 100))
    assert framing.box((100, 0, 260, 100)) == (0, 0, 50, 50)


def test_twice_mirrored_is_as_it_was():
    box = (3, 5, 20, 30)
    there = Framing((64, 96), (64, 96), (0, 0), (64, 96), mirrored=True)
    assert there.box(box) == (76, 5, 93, 30)
    assert there.box(there.box(box)) == box
    image = picture((96, 64), box)
    assert np.array_equal(there.apply(there.apply(image)), image)


def test_a_picture_of_the_right_size_is_not_touched():
    image = picture((64, 64), (3, 5, 20, 30))
    framing = Framing.around((64, 64), (64, 64), (3, 5, 20, 30))
    assert np.array_equal(framing.apply(image), image)
    assert framing.box((3, 5, 20, 30)) == (3, 5, 20, 30)


def test_boxes_are_rounded_outward():
    framing = Framing.around((96, 96), (64, 64))
    assert framing.box((10, 10, 20, 20)) == (6, 6, 14, 14)
    assert framing.box((3, 3, 6, 6)) == (2, 2, 4, 4)


@pytest.mark.parametrize(
    ("box", "grown"),
    [((40, 40, 60, 60), (36, 36, 64, 64)), ((40, 45, 60, 55), (36, 36, 64, 64)), ((0, 0, 10, 20), (0, 0, 19, 24))],
)
def test_a_face_grows_to_a_square_and_by_a_fifth(box, grown):
    assert grow_to_square(box, (100, 100)) == grown
