"""InsightFace's packs (`buffalo_l`, `antelopev2`), which PhotoMaker v2 was trained with: 512 numbers of ArcFace.

The package is the extra `[faces]`; packs are downloaded by the user, under licences of their own.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import override

from trainers.config import LocalPath
from trainers.errors import ModelError
from trainers.face import Face, FaceConfig, FaceEmbedder, area, overlap

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from trainers.prompt import Box

_SIDES = (640, 576, 512, 448, 384, 320, 256)
"""Detector sizes to try, as PhotoMaker does: a face that fills a picture is only found in a small one."""


class InsightFaceConfig(FaceConfig):
    """A pack's folder, `…/models/buffalo_l`, with a detector and a recogniser as ONNX files."""

    kind: Literal["insightface"] = "insightface"
    path: LocalPath

    @override
    def check(self) -> None:
        if importlib.util.find_spec("insightface") is None:
            raise ModelError("faces: the package insightface is not installed; pip install 'diffusion-tuning[faces]'")
        if self.path.parent.name != "models" or not self.files():
            raise ModelError(f"{self.path}: no ONNX files; expected a pack of InsightFace in a folder called models")

    @override
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted(self.path.glob("*.onnx")))

    @override
    def open(self, device: torch.device) -> FaceEmbedder:
        self.check()
        return InsightFace(self.path, device)


class InsightFace(FaceEmbedder):
    """Detection and recognition of one pack."""

    size = 512

    def __init__(self, path: Path, device: torch.device) -> None:
        analysis: Any = importlib.import_module("insightface.app").FaceAnalysis
        cuda = device.type == "cuda"
        providers = ["CUDAExecutionProvider", "CPUExecutionProvider"] if cuda else ["CPUExecutionProvider"]
        modules = ["detection", "recognition"]
        self._app = analysis(name=path.name, root=str(path.parent.parent), allowed_modules=modules, providers=providers)
        # Negative is InsightFace's word for the CPU.
        self._app.prepare(ctx_id=(device.index or 0) if cuda else -1, det_size=(_SIDES[0], _SIDES[0]))

    @override
    def find(self, image: Image.Image, box: Box | None = None) -> Face | None:
        import numpy as np
        import torch

        blue_green_red = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
        for side in _SIDES:
            self._app.det_model.input_size = (side, side)
            boxes = [(_box(face.bbox), face.embedding) for face in self._app.get(blue_green_red)]
            ranked = [(overlap(place, box) if box else area(place), place, vector) for place, vector in boxes]
            _, place, vector = max(ranked, key=lambda one: one[0], default=(0, None, None))
            if place is not None and (box is None or overlap(place, box)):
                return Face(torch.from_numpy(np.asarray(vector, np.float32)), place)
        return None


def _box(corners: Any) -> Box:
    left, top, right, bottom = (round(float(corner)) for corner in corners)
    return left, top, right, bottom
