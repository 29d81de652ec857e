"""Where the subject is in a training picture: masks from a folder, or found by Segment Anything."""

from __future__ import annotations

import json
from abc import abstractmethod
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import numpy as np
from PIL import ExifTags, Image
from pydantic import Field
from typing_extensions import override

from trainers.config import Choice, LocalPath
from trainers.data.transforms import open_picture
from trainers.errors import DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import torch
    from jaxtyping import Bool, Float
    from torch import Tensor

    from trainers.batch import Example, Geometry
    from trainers.cache import Tensors
    from trainers.frozen import Frozen

Mask = Image.Image
"""As large as the upright picture, in mode "L": 255 on the subject, 0 off it."""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_Share = Annotated[float, Field(ge=0, le=1)]


class MaskSource(Choice):
    """Family of `masks:` sections."""

    finds: ClassVar[bool] = False
    """Whether masks are found in pictures, not given with them."""

    @abstractmethod
    def check(self, pictures: Iterable[Path]) -> None:
        """Find what is wrong with the masks of `pictures` without torch.

        Raises:
            DataError: A picture has no mask, or an empty one, or one of another size.
            ModelError: A model's folder is incomplete.
        """

    @abstractmethod
    def find(self, examples: Sequence[Example], frozen: Frozen) -> list[Mask]:
        """Each example's mask.

        Raises:
            DataError: As `check`, or nothing was found in a picture.
        """


class FolderMasks(MaskSource):
    """Black-and-white pictures named as the training pictures (`a.png` for `a.jpg`), of the same size, white inside."""

    kind: Literal["folder"] = "folder"
    path: LocalPath

    @override
    def check(self, pictures: Iterable[Path]) -> None:
        for picture in pictures:
            self._read(picture)

    @override
    def find(self, examples: Sequence[Example], frozen: Frozen) -> list[Mask]:
        return [self._read(example.path) for example in examples]

    def _read(self, picture: Path) -> Mask:
        names = (picture.name, *(f"{picture.stem}{suffix}" for suffix in _SUFFIXES))
        file = next((self.path / name for name in names if (self.path / name).is_file()), None)
        if file is None:
            raise DataError(
                f"{self.path}: no mask of {picture.name}; expected a black-and-white {picture.stem}.png, white on the "
                "subject"
            )
        mask = _open_mask(file)
        if mask.getbbox() is None:
            raise DataError(f"{file}: the mask is empty (all black); paint the subject white, or remove the picture")
        wanted = _upright_size(picture)
        if wanted and mask.size != wanted:
            raise DataError(f"{file}: the mask is {mask.size} pixels; expected {wanted} as {picture.name}, width first")
        return mask


class SamMasks(MaskSource):
    """Segment Anything (Kirillov et al., 2023, arXiv:2304.02643), pointed at the subject.

    Of the nested masks that it proposes for the points together, the one that it expects to fit best is taken (highest
    predicted IoU). It runs once for each picture; its masks lie in the cache.
    """

    finds: ClassVar[bool] = True

    kind: Literal["sam"] = "sam"
    path: LocalPath
    """A local folder as transformers saves it, such as facebook/sam-vit-huge."""
    points: Annotated[tuple[tuple[_Share, _Share], ...], Field(min_length=1)] = ((0.5, 0.5),)
    """Where the subject is in every picture: shares of its width and height, from the top left corner."""

    @override
    def check(self, pictures: Iterable[Path]) -> None:
        self._files()

    @override
    def find(self, examples: Sequence[Example], frozen: Frozen) -> list[Mask]:
        import torch

        from trainers.cache import digest

        network = frozen.describe(self._files(), torch.float32)
        load = cache(lambda: _Sam(self, frozen.backbone.device))

        def make(i: int) -> Tensors:
            return {"mask": load()(open_picture(examples[i].path))}

        def key(i: int) -> str:
            return digest("mask", examples[i].key, json.dumps(self.points), network)

        rows = frozen.share("masks", key, make, len(examples))
        masks = [cast("Tensors", row)["mask"] for row in rows]
        for example, mask in zip(examples, masks, strict=True):
            if not bool(mask.any()):
                raise DataError(
                    f"{example.path}: Segment Anything finds nothing at {self.points}; move the points to the "
                    "subject, or give masks in a folder"
                )
        return [Image.fromarray(mask.numpy().astype(np.uint8) * 255) for mask in masks]

    def _files(self) -> tuple[Path, ...]:
        names = {file.name for file in self.path.iterdir()} if self.path.is_dir() else set[str]()
        # transformers 5 writes the second name.
        settings = sorted(names & {"preprocessor_config.json", "processor_config.json"})
        weights = sorted(name for name in names if name.startswith("model") and name.endswith(".safetensors"))
        found = {"config.json": "config.json" in names, "preprocessor_config.json": settings, "*.safetensors": weights}
        if missing := [name for name, present in found.items() if not present]:
            raise ModelError(
                f"{self.path}: no {', '.join(missing)}; expected a folder of Segment Anything as transformers saves it"
            )
        config = self.path / "config.json"
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        if kind != "sam":
            raise ModelError(f"{config}: model_type is {kind!r}; expected 'sam'")
        return (config, *(self.path / name for name in (*settings, *weights)))


class _Sam:
    """A loaded Segment Anything; it is freed with the last reference to it."""

    def __init__(self, config: SamMasks, device: torch.device) -> None:
        import transformers

        options = {"local_files_only": True, "use_safetensors": True}
        model: Any = transformers.SamModel.from_pretrained(config.path, **cast("Any", options))
        self._model = model.requires_grad_(False).eval().to(device)
        self._processor: Any = cast("Any", transformers.SamProcessor).from_pretrained(config.path)
        self._points, self._device = config.points, device

    def __call__(self, picture: Image.Image) -> Bool[Tensor, "h w"]:
        import torch

        points = [[x * picture.width, y * picture.height] for x, y in self._points]
        inputs = self._processor(picture, input_points=[[points]], return_tensors="pt")
        tensors = {name: inputs[name].to(self._device, torch.float32) for name in ("pixel_values", "input_points")}
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            answer = self._model(**tensors, multimask_output=True)
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        masks = self._processor.image_processor.post_process_masks(answer.pred_masks.cpu(), *sizes)[0]
        return masks[0, int(answer.iou_scores[0, 0].argmax())]


def fit_masks(
    masks: Sequence[Mask], geometries: Sequence[Geometry], size: tuple[int, int], examples: Sequence[Example]
) -> Float[Tensor, "n 1 h w"]:
    """What share of each latent's pixels belongs to the subject, after the picture's own resize and crop.

    Args:
        masks: Of upright pictures.
        geometries: How each picture was resized and cropped.
        size: Height and width of the latents.
        examples: To name in errors.

    Raises:
        DataError: Nothing of a subject is left in its picture's crop.
    """
    import torch

    rows: list[Tensor] = []
    for mask, geometry, example in zip(masks, geometries, examples, strict=True):
        pixels = torch.from_numpy(np.asarray(_follow(mask, geometry), dtype=np.float32)) / 255
        rows.append(shrink(pixels[None, None], size))
        if not bool(rows[-1].any()):
            raise DataError(
                f"{example.path}: the crop to {geometry.target} leaves nothing of the masked subject; crop the picture "
                "around the subject, or remove it"
            )
    return torch.cat(rows)


def shrink(mask: Float[Tensor, "n 1 h w"], size: tuple[int, int]) -> Float[Tensor, "n 1 h2 w2"]:
    """Mean of the mask in every cell of a coarser grid: no cell that holds any of the subject becomes zero."""
    import torch

    return torch.nn.functional.adaptive_avg_pool2d(mask, size)


def _follow(mask: Mask, geometry: Geometry) -> Mask:
    """Resize and crop as was done with the picture: it was scaled until it covered the crop."""
    (height, width), (top, left), (rows, columns) = geometry.original, geometry.crop, geometry.target
    scale = max(rows / height, columns / width)
    resized = (max(columns, round(width * scale)), max(rows, round(height * scale)))
    if resized != mask.size:
        # Pillow widens its triangle with the factor, so thin parts fade instead of disappearing.
        mask = mask.resize(resized, Image.Resampling.BILINEAR)
    return mask.crop((left, top, left + columns, top + rows))


def _open_mask(file: Path) -> Mask:
    picture = open_picture(file)
    with Image.open(file) as image:
        # Flattened over white, what is transparent would count as the subject.
        if image.has_transparency_data and cast("Any", image.convert("RGBA").getextrema())[3][0] < 255:
            raise DataError(f"{file}: the mask is transparent in part; expected black and white alone")
    return picture.convert("L")


def _upright_size(picture: Path) -> tuple[int, int] | None:
    """Width and height from the file's header; None if it has none: then the picture is left out of training."""
    try:
        with Image.open(picture) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # the four that swap the axes
            return (image.height, image.width) if turned else image.size
    except (OSError, ValueError, SyntaxError):
        return None
