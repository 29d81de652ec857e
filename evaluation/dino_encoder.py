"""Vision transformers for scoring: the class token of the last layer, after its norm, as DINO's evaluation takes it."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from typing_extensions import override

from evaluation.embedding import PictureEncoder
from trainers.errors import ModelError

if TYPE_CHECKING:
    from jaxtyping import Float
    from PIL import Image
    from torch import Tensor

    from evaluation.dino_folder import DinoFolder
    from trainers.cache import Cache

_UNLOADABLE = (OSError, RuntimeError, TypeError, ValueError, KeyError, SafetensorError)


class DinoEncoder(PictureEncoder):
    """What both forms share."""

    def __init__(self, folder: DinoFolder, device: torch.device, cache: Cache) -> None:
        super().__init__(f"{folder.path.name} ({folder.architecture})", folder.files, device, cache)
        self.width = folder.width
        try:
            self._model: Any = self._load(folder).eval().to(device)
        except _UNLOADABLE as error:
            problem = " ".join(str(error).split())
            raise ModelError(f"{folder.files[0]}: {folder.form} cannot load this folder with it ({problem})") from error

    @abstractmethod
    def _load(self, folder: DinoFolder) -> Any:
        """The network, in fp32, and whatever preprocessing needs."""


class TransformersDinoEncoder(DinoEncoder):
    """A copy of facebook/dino-vits16, facebook/dinov2-small and their like."""

    @override
    def _load(self, folder: DinoFolder) -> Any:
        import transformers

        kinds: dict[str, Any] = {"ViT": transformers.ViTModel, "DINOv2": transformers.Dinov2Model}
        kind = kinds.get(folder.architecture.rpartition(" ")[0], transformers.Dinov2WithRegistersModel)
        local: Any = {"pretrained_model_name_or_path": folder.path, "local_files_only": True}
        # Only ViTModel has a pooling layer, which DINO's weights do not come with.
        options: dict[str, Any] = {"add_pooling_layer": False} if kind is transformers.ViTModel else {}
        model, report = cast("Any", kind).from_pretrained(
            **local, **options, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:
            # transformers would go on with random numbers in their place.
            missing = sorted(report["missing_keys"])
            raise ModelError(f"{folder.files[0]}: {len(missing)} tensors are missing, the first is {missing[0]}")
        # Pillow's resizing, as in the authors' code; torchvision's differs.
        self._processor: Any = cast("Any", transformers.AutoImageProcessor).from_pretrained(**local, backend="pil")
        return model

    @override
    def _preprocess(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        return self._processor(images=image, return_tensors="pt").pixel_values[0]

    @override
    def _image_features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b width"]:
        return self._model(pixel_values=pixels).last_hidden_state[:, 0]


class TimmDinoEncoder(DinoEncoder):
    """A copy of timm/vit_small_patch16_224.dino, timm/vit_small_patch14_dinov2.lvd142m and their like."""

    @override
    def _load(self, folder: DinoFolder) -> Any:
        import timm
        import timm.data

        model: Any = timm.create_model(f"local-dir:{folder.path}", pretrained=True, num_classes=0)
        data: Any = timm.data
        self._transform: Any = data.create_transform(**data.resolve_model_data_config(model), is_training=False)
        return model.float()

    @override
    def _preprocess(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        return self._transform(image)

    @override
    def _image_features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b width"]:
        return self._model.forward_features(pixels)[:, 0]
