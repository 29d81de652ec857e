from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainers.miniature.masks import save_masks
from trainers.miniature.recipe import save_photos, subject_scenes
from trainers.miniature.world import draw_background

DATA = Path(__file__).parents[3] / "studies" / "data"


def test_the_studys_masks_are_those_of_its_pictures():
    """Whatever differs from the bare background is inside, and hardly anything else is."""
    for scene, file in zip(subject_scenes("zog"), sorted((DATA / "zog").glob("*.png")), strict=True):
        with Image.open(file) as picture, Image.open(DATA / "zog_masks" / file.name) as mask:
            pixels, inside = np.asarray(picture, dtype=int), np.asarray(mask) > 0
        painted = (np.abs(pixels - np.asarray(draw_background(scene), dtype=int)) > 2).any(-1)
        assert not (painted & ~inside).any()
        # Stripes of the background's own colour cannot be seen.
        assert painted[inside].mean() > 0.5


@pytest.mark.parametrize("name", ["wug"])
def test_masks_follow_the_photos_of_the_same_seed(tmp_path, name):
    save_photos(tmp_path / "photos", subject_scenes(name), 3)
    save_masks(tmp_path / "masks", name, 3)
    for scene, file in zip(subject_scenes(name), sorted((tmp_path / "photos").glob("*.png")), strict=True):
        with Image.open(file) as picture, Image.open(tmp_path / "masks" / file.name) as mask:
            painted = (np.asarray(picture) != np.asarray(draw_background(scene))).any(-1)
            assert not (painted & (np.asarray(mask) == 0)).any()
