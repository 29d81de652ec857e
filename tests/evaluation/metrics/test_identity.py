# pyright: basic

import math

import pytest
import torch
from PIL import Image

from evaluation.encoders import ClipEncoders
from evaluation.metrics.identity import FaceFound, Identity
from tests.contracts.metric import PictureMetricContract
from trainers.cache import Cache
from trainers.errors import DataError
from trainers.face import Face
from trainers.faces.miniature import MiniatureFaceConfig, build_network, save_network
from trainers.prompt import Prompt, Sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("face")
    torch.manual_seed(0)
    save_network(folder, build_network((4, 8), side=16, size=6))
    return folder


class TestIdentity(PictureMetricContract):
    @pytest.fixture
    def metric(self, folder):
        return Identity(faces=MiniatureFaceConfig(path=folder))

    @pytest.fixture
    def broken(self, tmp_path):
        return Identity(faces=MiniatureFaceConfig(path=tmp_path / "nothing"))

    @pytest.fixture
    def encoders(self, tmp_path):
        return ClipEncoders(torch.device("cpu"), Cache(tmp_path))

    @pytest.fixture
    def references(self):
        return []


class TestFaceFound(TestIdentity):
    @pytest.fixture
    def metric(self, folder):
        return FaceFound(faces=MiniatureFaceConfig(path=folder))

    @pytest.fixture
    def broken(self, tmp_path):
        return FaceFound(faces=MiniatureFaceConfig(path=tmp_path / "nothing"))


def colour_is_who(self, image, box=None):
    """Somebody's vector is the colour of the first pixel; black is nobody."""
    vector = torch.tensor(image.convert("RGB").getpixel((0, 0)), dtype=torch.float32)
    return Face(vector, (0, 0, 1, 1)) if vector.any() else None


@pytest.fixture
def encoders(monkeypatch, tmp_path):
    monkeypatch.setattr("trainers.faces.miniature.MiniatureFace.find", colour_is_who)
    return ClipEncoders(torch.device("cpu"), Cache(tmp_path))


@pytest.fixture
def scorer(folder, encoders):
    return Identity(faces=MiniatureFaceConfig(path=folder)).open(encoders, [])


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (8, 8), (0, 120, 0)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def value(scorer, prompt, colour):
    return scorer.values([Sample(prompt, 0, Image.new("RGB", (8, 8), colour))])[0]


@pytest.mark.parametrize(("colour", "expected"), [((0, 30, 0), 1.0), ((90, 0, 0), 0.0), ((60, 60, 0), math.sqrt(0.5))])
def test_it_is_the_cosine_of_the_two_faces(scorer, photo, colour, expected):
    assert value(scorer, Prompt(text="a man img", image=photo), colour) == pytest.approx(expected)


def test_no_face_and_no_photo_have_no_value(scorer, photo):
    assert math.isnan(value(scorer, Prompt(text="a man img", image=photo), (0, 0, 0)))
    assert math.isnan(value(scorer, Prompt(text="a man"), (0, 30, 0)))


def test_a_photo_without_a_face_is_an_error_that_names_it(scorer, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "nobody.png")
    with pytest.raises(DataError, match=r"nobody\.png: no face"):
        value(scorer, Prompt(text="a man img", image=tmp_path / "nobody.png"), (0, 30, 0))


def test_a_face_is_found_or_not_whoever_it_is(folder, encoders):
    scorer = FaceFound(faces=MiniatureFaceConfig(path=folder)).open(encoders, [])
    assert [value(scorer, Prompt(text="a man"), colour) for colour in ((0, 0, 0), (90, 0, 0))] == [0.0, 1.0]


def test_a_picture_is_looked_at_once_by_all_metrics(folder, encoders, photo, monkeypatch):
    looked = []
    faces = MiniatureFaceConfig(path=folder)
    scorers = [metric(faces=faces).open(encoders, []) for metric in (Identity, FaceFound)]
    monkeypatch.setattr(
        "trainers.faces.miniature.MiniatureFace.find",
        lambda self, image, box=None: looked.append(image.getpixel((0, 0))) or colour_is_who(self, image, box),
    )
    for scorer in scorers:
        value(scorer, Prompt(text="a man img", image=photo), (0, 30, 0))
    assert sorted(looked) == [(0, 30, 0), (0, 120, 0)]
