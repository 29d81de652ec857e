"""What the methods' contract asks for, and trials of PDMBooth on a subject with masks."""

# pyright: basic

import pytest
from PIL import Image, ImageDraw

from tests.trainers.conftest import build_pictures
from tests.trainers.subjects import SIZE
from trainers.prompt import Prompt


@pytest.fixture
def prompts():
    """What pictures are asked for."""
    return [Prompt(text="a zog"), None]


@pytest.fixture
def folder(tmp_path):
    """Pictures of a subject, their captions, and masks in a folder of its own."""
    build_pictures(tmp_path / "subject", 3)
    (tmp_path / "masks").mkdir()
    for file in (tmp_path / "subject").glob("*.png"):
        mask = Image.new("L", SIZE)
        ImageDraw.Draw(mask).ellipse((5 + int(file.stem), 5, 40, 40), fill=255)
        mask.save(tmp_path / "masks" / file.name)
    return tmp_path


@pytest.fixture
def make_pdmbooth(make_config, folder):
    def build(**changes):
        data = {"kind": "folder", "path": str(folder / "subject"), "resolution": 64}
        return make_config(**{"kind": "pdmbooth", "data": data, **changes})

    return build


@pytest.fixture
def build(make_pdmbooth, accelerator, folder):
    def method(cache=None, seed=0, **changes):
        return make_pdmbooth(**changes).build(seed, cache, accelerator)

    return method
