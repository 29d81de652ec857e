"""Pictures of several shapes."""

# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.trainers.conftest import draw
from trainers.batch import Example
from trainers.data.buckets import BucketOrder, BucketsConfig
from trainers.data.folder import FolderConfig

SDXL = [
    (704, 1472), (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024), (1088, 960), (1152, 896),
    (1216, 832), (1344, 768), (1472, 704),
]  # fmt: skip


def test_the_shapes_of_sdxl():
    assert list(BucketsConfig(max_aspect=2.1).sizes(1024)) == SDXL


@given(st.integers(64, 600), st.sampled_from([8, 16, 64]), st.floats(1, 4))
def test_shapes_are_multiples_of_the_step_no_larger_or_longer_than_they_may_be(resolution, step, longest):
    sizes = BucketsConfig(step=step, max_aspect=longest).sizes(resolution)
    for height, width in sizes:
        assert height % step == width % step == 0
        assert height * width <= resolution**2
        assert max(height, width) <= longest * min(height, width)
        assert (width, height) in sizes
    if resolution % step == 0:
        assert (resolution, resolution) in sizes


@pytest.mark.parametrize(
    ("original", "shape"),
    [
        ((1000, 1000), (1024, 1024)),
        ((3000, 4000), (896, 1152)),
        ((4000, 3000), (1152, 896)),
        ((1080, 1920), (768, 1344)),
        ((100, 900), (768, 1344)),
        ((20, 10), (1344, 768)),
    ],
)
def test_a_picture_goes_to_the_shape_most_like_its_own(original, shape):
    assert BucketsConfig().choose(original, 1024) == shape


@pytest.fixture
def album(tmp_path):
    """Twelve pictures: five wide, four square, three high; one of the high ones lies on its side."""
    sizes = [(96, 64)] * 5 + [(64, 64)] * 4 + [(60, 96)] * 2
    for number, size in enumerate(sizes):
        draw(number, size).save(tmp_path / f"{number:02d}.png")
    exif = Image.Exif()
    exif[274] = 6
    draw(11, (96, 60)).save(tmp_path / "11.jpg", exif=exif)
    return tmp_path


def folder(path, **changes):
    return FolderConfig.model_validate(
        {"path": str(path), "resolution": 64, "instance_prompt": "a", "buckets": {"step": 16}, **changes}
    )


def test_pictures_are_cut_as_little_as_their_shape_allows(album):
    data = folder(album)
    found = Counter()
    for example in data.split().train:
        picture = data.read(example)
        found[example.size] += 1
        assert picture.pixels.shape[2:] == picture.geometry.target == example.size
        height, width = picture.geometry.original
        scale = max(example.size[0] / height, example.size[1] / width)
        margins = (round(height * scale) - example.size[0], round(width * scale) - example.size[1])
        assert min(margins) == 0
        assert picture.geometry.crop == tuple(margin // 2 for margin in margins)
    assert found == {(48, 80): 5, (64, 64): 4, (80, 48): 3}


def test_pixels_are_those_of_the_middle(tmp_path):
    """Brightness rises from left to right, in a picture that is cut at both sides."""
    ramp = np.tile(np.arange(200, dtype=np.uint8), (96, 1))
    Image.fromarray(np.stack([ramp] * 3, -1)).save(tmp_path / "a.png")
    data = folder(tmp_path)
    (example,) = data.split().train
    assert example.size == (48, 80)
    row = (data.read(example).pixels[0, 0, 24] + 1) * 127.5
    # 200 x 96 becomes 100 x 48, of which 10 pixels are cut on each side: 2 brightnesses a pixel.
    expected = 2 * (10 + np.arange(80)) + 0.5
    assert np.abs(row.numpy() - expected).max() < 1.5


def test_what_is_held_out_does_not_depend_on_shapes(album):
    shaped, square = (folder(album, holdout=4, buckets=buckets).split() for buckets in ({"step": 16}, None))
    assert [one.path for one in shaped.held_out] == [one.path for one in square.held_out]
    assert [one.path for one in shaped.train] == [one.path for one in square.train]


def test_a_shape_is_part_of_what_a_picture_is_cached_under(album):
    wide, narrow = (
        {
            one.path: (one.key, one.size)
            for one in folder(album, buckets={"step": 16, "max_aspect": longest}).split().train
        }
        for longest in (2.0, 1.0)
    )
    for path, (key, size) in wide.items():
        assert (key == narrow[path][0]) == (size == (64, 64))
    assert {size for _, size in narrow.values()} == {(64, 64)}


def test_a_picture_that_cannot_be_opened_is_left_to_whoever_reads_it(album):
    (album / "broken.png").write_bytes(b"no picture")
    assert len(folder(album).split().train) == 13


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_a_step_has_one_shape_and_every_picture_is_shown_as_often(album, batch_size):
    data = folder(album)
    examples = data.split().train
    steps = [
        [data.pick(examples, 0, step, step * batch_size + place, batch_size) for place in range(batch_size)]
        for step in range(2 * len(examples))
    ]
    assert all(len({examples[index].size for index in step}) == 1 for step in steps)
    assert Counter(index for step in steps for index in step) == dict.fromkeys(range(12), 2 * batch_size)
    assert len({tuple(sorted(step)) for step in steps}) > 6


def test_the_order_is_a_function_of_seed_step_and_place():
    examples = tuple(Example(str(n), None, "", size=(n % 3, 1)) for n in range(20))
    order, again = BucketOrder(examples), BucketOrder(examples)
    shown = {
        (seed, position): order.pick(seed, position // 4, position, 4) for seed in (0, 1) for position in range(200)
    }
    for (seed, position), index in reversed(shown.items()):
        assert again.pick(seed, position // 4, position, 4) == index
    assert [shown[0, position] for position in range(200)] != [shown[1, position] for position in range(200)]


def test_a_resolution_below_a_step_is_refused(album):
    with pytest.raises(ValueError, match="expected no larger a step"):
        folder(album, buckets={"step": 128})
