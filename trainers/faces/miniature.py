"""The miniature world's face embedder: one small network that says whether there is a face, where, and whose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import override

from trainers.config import LocalPath
from trainers.errors import ModelError
from trainers.face import Face, FaceConfig, FaceEmbedder
from trainers.framing import grow_to_square

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import nn

    from trainers.prompt import Box

_FILES = ("config.json", "model.safetensors")
MARGIN = 0.2
"""How much is added around a face that is pointed out, as a share of its side."""


class MiniatureFaceConfig(FaceConfig):
    """A folder with `config.json` (the arguments of `build_network`) and `model.safetensors`."""

    kind: Literal["miniature"] = "miniature"
    path: LocalPath

    @override
    def check(self) -> None:
        for name in _FILES:
            if not (self.path / name).is_file():
                raise ModelError(f"{self.path}: no {name}; expected the miniature family's face embedder")

    @override
    def files(self) -> tuple[Path, ...]:
        return tuple(self.path / name for name in _FILES)

    @override
    def open(self, device: torch.device) -> FaceEmbedder:
        self.check()
        return MiniatureFace(load_network(self.path).to(device))


class MiniatureFace(FaceEmbedder):
    """The network, on whatever device it lies."""

    def __init__(self, network: nn.Module) -> None:
        self._network: Any = network
        self.size = self._network.config["size"]

    @override
    def find(self, image: Image.Image, box: Box | None = None) -> Face | None:
        import torch

        left, top, right, bottom = region = grow_to_square(box, image.size, MARGIN) if box else (0, 0, *image.size)
        pixels = to_pixels(image.crop(region), self._network.config["side"])
        with torch.no_grad():
            embedding, presence, place = self._network(pixels.to(next(self._network.parameters()).device))
        if float(presence[0]) <= 0:
            return None
        width, height = right - left, bottom - top
        x0, y0, x1, y1 = (float(value) for value in place[0])
        found = (left + x0 * width, top + y0 * height, left + x1 * width, top + y1 * height)
        rounded = (round(found[0]), round(found[1]), round(found[2]), round(found[3]))
        return Face(embedding[0].float().cpu(), rounded)


def build_network(widths: tuple[int, ...] = (32, 64, 96, 128), side: int = 64, size: int = 64) -> Any:
    """A convolutional network: pictures [n, 3, side, side] in [-1, 1] to three answers.

    They are the embedding [n, size], a logit [n] that there is a face, and its box [n, 4] in shares of the picture.

    Args:
        widths: Channels after each halving.
        side: Pixels on each side.
        size: Numbers in an embedding.
    """
    from itertools import pairwise

    from torch import Tensor, nn

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"widths": list(widths), "side": side, "size": size}
            blocks = [
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(4, b), nn.SiLU())
                for a, b in pairwise((3, *widths))
            ]
            self.seen = nn.Sequential(*blocks, nn.Flatten())
            self.answer = nn.Linear(widths[-1] * (side // 2 ** len(widths)) ** 2, size + 5)

        def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            answer = self.answer(self.seen(pixels))
            return answer[:, :size], answer[:, size], answer[:, size + 1 :]

    return Network()


def save_network(folder: Path, network: Any) -> None:
    """Write the folder that `MiniatureFaceConfig` reads, in half precision."""
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FILES[0]).write_text(json.dumps(network.config, indent=2) + "\n", encoding="utf-8")
    save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, folder / _FILES[1])


def load_network(folder: Path) -> Any:
    """Read it, in float32, frozen and in evaluation mode.

    Raises:
        ModelError: The files do not fit one another.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    try:
        network = build_network(**json.loads((folder / _FILES[0]).read_text(encoding="utf-8")))
        network.load_state_dict(load_file(folder / _FILES[1]))
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: not the miniature family's face embedder ({error})") from error
    return network.float().requires_grad_(requires_grad=False).eval()


def to_pixels(image: Image.Image, side: int) -> torch.Tensor:
    """A picture as the network takes it: [1, 3, side, side] in [-1, 1]."""
    import numpy as np
    import torch
    from PIL import Image

    resized = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(resized, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
