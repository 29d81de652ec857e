"""A frozen CLIP vision tower from a local folder: what shows pictures to image-conditioned methods."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from trainers.config import Config, LocalPath
from trainers.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from jaxtyping import Float
    from PIL import Image
    from torch import Tensor

    from trainers.batch import Example
    from trainers.frozen import Frozen

_MODEL_TYPES = ("clip_vision_model", "clip")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


class ImageEncoderConfig(Config):
    """CLIP's vision tower with its projection, in transformers' layout, as IP-Adapters ship it in `image_encoder`.

    Pictures are resized and cropped as the folder's `preprocessor_config.json` says; without one as diffusers'
    pipelines do: short side to the tower's size, bicubic, centred square.
    """

    path: LocalPath

    def num_features(self) -> int:
        """Length of its embeddings, without torch.

        Raises:
            ModelError: The folder is missing, incomplete or of another kind.
        """
        file = self.path / "config.json"
        try:
            config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{file}: {error}; expected a CLIP vision tower in transformers' layout") from error
        if config.get("model_type") not in _MODEL_TYPES:
            raise ModelError(
                f"{file}: model_type is {config.get('model_type')!r}; expected {' or '.join(_MODEL_TYPES)}"
            )
        self._weights()
        # transformers leaves out what has its default value.
        return int(config.get("projection_dim", 512))

    def files(self) -> tuple[Path, ...]:
        """Files that determine its embeddings."""
        settings = (self.path / name for name in ("config.json", "preprocessor_config.json"))
        return (*(file for file in settings if file.is_file()), *self._weights())

    def load(self, device: torch.device) -> ImageEncoder:
        """Read the weights, in float32, frozen.

        Raises:
            ModelError: As `num_features`.
        """
        import transformers

        self.num_features()
        network: Any = transformers.CLIPVisionModelWithProjection.from_pretrained(self.path, local_files_only=True)
        if (self.path / "preprocessor_config.json").is_file():
            processor = transformers.CLIPImageProcessor.from_pretrained(self.path, local_files_only=True)
        else:
            side = network.config.image_size
            processor = transformers.CLIPImageProcessor(size=side, crop_size=side)
        network.requires_grad_(False)
        return ImageEncoder(network.float().eval().to(device), processor)

    def _weights(self) -> tuple[Path, ...]:
        found = [self.path / name for name in _WEIGHTS if (self.path / name).is_file()]
        if not found:
            raise ModelError(f"{self.path}: no {_WEIGHTS[0]}; expected a CLIP vision tower in transformers' layout")
        if found[0].suffix != ".json":
            return (found[0],)
        index: dict[str, Any] = json.loads(found[0].read_text(encoding="utf-8"))
        return (found[0], *(self.path / name for name in sorted(set(index["weight_map"].values()))))


def encode_pictures(frozen: Frozen, encoder: ImageEncoderConfig, examples: Sequence[Example]) -> Float[Tensor, "n f"]:
    """Show every picture to a vision tower that never changes, one at a time, through the cache.

    Raises:
        DataError: A picture cannot be decoded.
        ModelError: As the tower's `load`.
    """
    import torch
    import transformers

    from trainers.cache import digest
    from trainers.data.transforms import VERSION, open_picture

    # Nothing is loaded if all is in the cache.
    tower = cache(lambda: encoder.load(frozen.accelerator.device))
    network = frozen.describe(encoder.files(), torch.float32)
    version = f"{VERSION}, transformers {transformers.__version__}"

    def make(i: int) -> dict[str, Tensor]:
        return {"embedding": tower().embed(open_picture(examples[i].path))}

    rows = frozen.share(
        "pictures for the image encoder",
        lambda i: digest("clip vision", examples[i].key, version, network),
        make,
        len(examples),
    )
    return torch.stack([row["embedding"] for row in rows if row is not None])


@dataclass(frozen=True)
class ImageEncoder:
    """A loaded vision tower."""

    network: Any
    processor: Any

    def embed(self, image: Image.Image) -> Float[Tensor, " f"]:
        """The projected embedding of one upright picture, not normalised; float32 whatever the caller's autocast."""
        import torch

        device = next(self.network.parameters()).device
        pixels = self.processor(image, return_tensors="pt").pixel_values.to(device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return self.network(pixels).image_embeds[0].cpu()
