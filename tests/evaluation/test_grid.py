import numpy as np
from PIL import Image

from evaluation.grid import draw_grid


def save(folder, row, column, colour, size=64):
    file = folder / f"{row[:4]}{column}.png"
    Image.new("RGB", (size, size), colour).save(file)
    return {(row, column): file}


def colours(sheet):
    return {colour for _, colour in sheet.getcolors(1 << 24)}


def box_of(sheet, colour):
    """Left, top, right, bottom of the pixels of one colour; the colour must fill the box."""
    y, x = np.nonzero((np.asarray(sheet) == colour).all(axis=-1))
    assert len(x) == (x.max() - x.min() + 1) * (y.max() - y.min() + 1)
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


def test_pictures_stand_in_the_row_and_column_of_their_labels(tmp_path):
    sheet = draw_grid({
        **save(tmp_path, "star", "a", (255, 0, 0)), **save(tmp_path, "star", "b", (0, 255, 0)),
        **save(tmp_path, "ring", "a", (0, 0, 255)), **save(tmp_path, "ring", "b", (255, 255, 0)),
    })  # fmt: skip
    red, green = box_of(sheet, (255, 0, 0)), box_of(sheet, (0, 255, 0))
    blue, yellow = box_of(sheet, (0, 0, 255)), box_of(sheet, (255, 255, 0))
    assert red[1] == green[1] < blue[1] == yellow[1]
    assert red[0] == blue[0] < green[0] == yellow[0]
    assert red[2] <= green[0]
    assert red[3] <= blue[1]


def test_small_pictures_are_enlarged_and_large_ones_reduced(tmp_path):
    small = box_of(draw_grid(save(tmp_path, "star", "a", (255, 0, 0), 64)), (255, 0, 0))
    large = box_of(draw_grid(save(tmp_path, "ring", "a", (255, 0, 0), 1024)), (255, 0, 0))
    assert (small[2] - small[0], small[3] - small[1]) == (128, 128)
    assert (large[2] - large[0], large[3] - large[1]) == (256, 256)


def test_labels_stay_beside_their_pictures_however_long_the_prompt(tmp_path):
    first = save(tmp_path, "word " * 200, "a", (255, 0, 0))
    second = save(tmp_path, "x" * 300, "a", (0, 255, 0))
    sheet = draw_grid(first | second)
    picture = box_of(sheet, (255, 0, 0))
    ink = (np.asarray(sheet) < 128).all(axis=-1)
    assert ink[picture[1] : picture[3], : picture[0]].any()
    assert not ink[picture[3] : box_of(sheet, (0, 255, 0))[1], : picture[0]].any()


def test_a_missing_combination_stays_blank(tmp_path):
    sheet = draw_grid(save(tmp_path, "star", "a", (255, 0, 0)) | save(tmp_path, "ring", "b", (0, 255, 0)))
    red, green = box_of(sheet, (255, 0, 0)), box_of(sheet, (0, 255, 0))
    assert sheet.getpixel(((green[0] + green[2]) // 2, (red[1] + red[3]) // 2)) == (255, 255, 255)
