"""Packs cannot be downloaded here: a package of the same interface stands in for InsightFace."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from tests.contracts.face import FaceContract
from trainers.errors import ModelError
from trainers.faces.insightface import InsightFaceConfig


class FakeAnalysis:
    """Finds the rectangles of white pixels in rows of a blue-green-red picture, if the detector is small enough."""

    opened: ClassVar[dict] = {}
    largest = 640

    def __init__(self, **options):
        FakeAnalysis.opened = options
        self.det_model = SimpleNamespace(input_size=None)
        self.seen = []

    def prepare(self, **options):
        FakeAnalysis.opened |= options

    def get(self, pixels):
        assert pixels.flags["C_CONTIGUOUS"]
        self.seen.append(pixels)
        if self.det_model.input_size[0] > FakeAnalysis.largest:
            return []
        found = []
        for blue in (255, 254):
            ys, xs = np.nonzero(pixels[:, :, 0] == blue)
            if len(ys):
                box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], np.float32)
                found.append(SimpleNamespace(bbox=box, embedding=np.full(512, float(blue), np.float64)))
        return found


@pytest.fixture(autouse=True)
def package(monkeypatch):
    package, app = ModuleType("insightface"), ModuleType("insightface.app")
    package.__spec__ = ModuleSpec("insightface", None)
    app.FaceAnalysis = FakeAnalysis
    monkeypatch.setitem(sys.modules, "insightface", package)
    monkeypatch.setitem(sys.modules, "insightface.app", app)
    monkeypatch.setattr(FakeAnalysis, "largest", 640)


class TestInsightFace(FaceContract):
    @pytest.fixture
    def config(self, tmp_path):
        pack = tmp_path / "models" / "buffalo_l"
        pack.mkdir(parents=True)
        (pack / "det_10g.onnx").touch()
        return InsightFaceConfig(path=pack)

    @pytest.fixture
    def embedder(self, config):
        return config.open(torch.device("cpu"))

    @pytest.fixture
    def person(self):
        """A large face in red and blue, a small one beside it."""
        image = Image.new("RGB", (100, 60))
        image.paste((200, 0, 255), (10, 10, 50, 50))
        image.paste((200, 0, 254), (70, 20, 90, 40))
        return image

    @pytest.fixture
    def box(self):
        return (10, 10, 50, 50)

    @pytest.fixture
    def nobody(self):
        return Image.new("RGB", (100, 60))

    def test_the_largest_face_counts_unless_another_is_pointed_out(self, embedder, person):
        assert embedder.find(person).box == (10, 10, 50, 50)
        assert embedder.find(person, (65, 15, 95, 45)).box == (70, 20, 90, 40)
        assert embedder.find(person, (0, 0, 5, 5)) is None

    def test_pixels_are_blue_green_red(self, embedder, person):
        embedder.find(person)
        assert embedder._app.seen[0][20, 20].tolist() == [255, 0, 200]

    def test_smaller_detectors_are_tried(self, embedder, person, monkeypatch):
        monkeypatch.setattr(FakeAnalysis, "largest", 300)
        assert embedder.find(person).box == (10, 10, 50, 50)
        assert embedder._app.det_model.input_size == (256, 256)

    def test_the_local_pack_is_opened_for_detection_and_recognition(self, embedder, tmp_path):
        opened = FakeAnalysis.opened
        assert (opened["root"], opened["name"]) == (str(tmp_path), "buffalo_l")
        assert opened["allowed_modules"] == ["detection", "recognition"]
        assert opened["providers"] == ["CPUExecutionProvider"]
        assert opened["ctx_id"] == -1

    def test_without_the_package_the_error_says_what_to_install(self, config, monkeypatch):
        monkeypatch.delitem(sys.modules, "insightface")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ModelError, match=r"diffusion-tuning\[faces\]"):
            config.check()
