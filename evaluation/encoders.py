"""CLIP towers for scoring, opened from local folders and used by every metric that needs them.

Each model has one preprocessing path, the one its authors measured with: open_clip's own transform for open_clip
folders, and transformers' Pillow processor (as OpenAI's code; the torchvision one differs by up to 0.03 in
normalised units) for transformers folders.
"""

from __future__ import annotations

import hashlib
import logging
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from typing_extensions import override

from evaluation.clip_folder import ClipFolder, read_clip_folder
from evaluation.metric import Encoder, Encoders
from trainers.cache import Cache, digest
from trainers.data import transforms
from trainers.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from jaxtyping import Float, Float32, Int
    from PIL import Image
    from torch import Tensor

    from trainers.batch import Source

log = logging.getLogger(__name__)


class ClipEncoders(Encoders):
    """CLIP models on one device, each loaded once."""

    def __init__(self, device: torch.device, cache: Cache) -> None:
        self._device = device
        self._cache = cache
        self._opened: dict[Path, ClipEncoder] = {}

    @override
    def clip(self, path: Path) -> Encoder:
        if path not in self._opened:
            folder = read_clip_folder(path)
            kind = OpenClipEncoder if folder.form == "open_clip" else TransformersClipEncoder
            self._opened[path] = kind(folder, self._device, self._cache)
        return self._opened[path]


class ClipEncoder(Encoder):
    """What both forms share: an image is embedded once, prompts and references once per cache."""

    def __init__(self, folder: ClipFolder, device: torch.device, cache: Cache) -> None:
        content = cache.hash_files(folder.files)
        self.model = f"{folder.path.name}@{content[:12]}"
        self.width = folder.width
        self._state = digest(content, device.type, torch.__version__)
        self._device = device
        self._cache = cache
        self._images: dict[str, Float32[np.ndarray, " width"]] = {}
        self._rows: dict[str, Float32[np.ndarray, " width"]] = {}

    @override
    def embed_images(self, images: Sequence[Image.Image]) -> Float32[np.ndarray, "n width"]:
        keys = [_content_hash(image) for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._images}
        if new:
            self._images.update(zip(new, self._compute_images(list(new.values())), strict=True))
        return np.stack([self._images[key] for key in keys])

    @override
    def embed_prompts(self, prompts: Sequence[str]) -> Float32[np.ndarray, "n width"]:
        def row(prompt: str) -> Float32[np.ndarray, " width"]:
            return self._recall(digest("clip prompt", prompt, self._state), lambda: self._compute_prompt(prompt))

        rows = {prompt: row(prompt) for prompt in dict.fromkeys(prompts)}
        return np.stack([rows[prompt] for prompt in prompts])

    @override
    def embed_references(self, sources: Sequence[Source]) -> Float32[np.ndarray, "n width"]:
        def row(source: Source) -> Float32[np.ndarray, " width"]:
            content = hashlib.sha256(source.read_bytes()).hexdigest()
            key = digest("clip reference", content, transforms.VERSION, self._state)
            return self._recall(key, lambda: self._compute_images([transforms.open_picture(source)])[0])

        return np.stack([row(source) for source in sources])

    def _recall(self, key: str, compute: Callable[[], Float32[np.ndarray, " width"]]) -> Float32[np.ndarray, " width"]:
        """From memory, from disk, or computed: one at a time, so that a row never depends on its neighbours."""
        if key not in self._rows:
            stored = self._cache.get(key)
            if stored is None:
                stored = {"embedding": torch.from_numpy(compute())}
                self._cache.put(key, stored)
            self._rows[key] = stored["embedding"].numpy()
        return self._rows[key]

    def _compute_images(self, images: Sequence[Image.Image]) -> Float32[np.ndarray, "n width"]:
        pixels = torch.stack([self._preprocess(image) for image in images]).to(self._device)
        return self._unit(lambda: self._image_features(pixels))

    def _compute_prompt(self, prompt: str) -> Float32[np.ndarray, " width"]:
        tokens, num_tokens = self._tokenize(prompt)
        if num_tokens > tokens.shape[1]:
            log.warning(
                "%s reads the first %d of %d tokens of the prompt %r; the rest does not count in its score",
                self.model, tokens.shape[1], num_tokens, prompt,
            )  # fmt: skip
        return self._unit(lambda: self._text_features(tokens.to(self._device)))[0]

    def _unit(self, features: Callable[[], Tensor]) -> Float32[np.ndarray, "n width"]:
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            return torch.nn.functional.normalize(features(), dim=-1).cpu().numpy()

    @abstractmethod
    def _preprocess(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        """The model's own resizing, cropping and normalisation."""

    @abstractmethod
    def _tokenize(self, prompt: str) -> tuple[Int[Tensor, "1 tokens"], int]:
        """Token ids, cut and padded as the model was trained, and how many there were before cutting."""

    @abstractmethod
    def _image_features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b width"]:
        """Projected image embeddings."""

    @abstractmethod
    def _text_features(self, tokens: Int[Tensor, "b tokens"]) -> Float[Tensor, "b width"]:
        """Projected text embeddings."""


class OpenClipEncoder(ClipEncoder):
    """A folder with `open_clip_config.json`, as open_clip's `local-dir:` schema reads it."""

    def __init__(self, folder: ClipFolder, device: torch.device, cache: Cache) -> None:
        import open_clip
        from open_clip.tokenizer import HFTokenizer

        super().__init__(folder, device, cache)
        name = f"local-dir:{folder.path}"
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(name, device=device, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(name)
        except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
            raise ModelError(f"{folder.path}: open_clip cannot load this folder ({error})") from error
        self._model: Any = model.eval()
        self._transform: Any = preprocess
        self._tokenizer: Any = tokenizer
        self._is_wrapped = isinstance(tokenizer, HFTokenizer)

    @override
    def _preprocess(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        return self._transform(image)

    @override
    def _tokenize(self, prompt: str) -> tuple[Int[Tensor, "1 tokens"], int]:
        tokens = self._tokenizer([prompt])
        if self._is_wrapped:
            return tokens, len(self._tokenizer.tokenizer(prompt).input_ids)
        return tokens, len(self._tokenizer.encode(prompt)) + 2  # start and end

    @override
    def _image_features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b width"]:
        return self._model.encode_image(pixels)

    @override
    def _text_features(self, tokens: Int[Tensor, "b tokens"]) -> Float[Tensor, "b width"]:
        return self._model.encode_text(tokens)


class TransformersClipEncoder(ClipEncoder):
    """A `CLIPModel` folder, such as a copy of openai/clip-vit-large-patch14."""

    def __init__(self, folder: ClipFolder, device: torch.device, cache: Cache) -> None:
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        super().__init__(folder, device, cache)
        local: Any = {"pretrained_model_name_or_path": folder.path, "local_files_only": True}
        try:
            model, report = cast("Any", CLIPModel).from_pretrained(
                **local, dtype=torch.float32, output_loading_info=True
            )
            self._tokenizer: Any = CLIPTokenizer.from_pretrained(**local)
            self._processor: Any = CLIPImageProcessorPil.from_pretrained(**local)
        except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
            raise ModelError(f"{folder.path}: transformers cannot load this folder ({error})") from error
        if report["missing_keys"]:
            # transformers would go on with random numbers in their place.
            missing = sorted(report["missing_keys"])
            raise ModelError(f"{folder.weights}: {len(missing)} tensors are missing, the first is {missing[0]}")
        self._model: Any = model.eval().to(device)

    @override
    def _preprocess(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        return self._processor(images=image, return_tensors="pt").pixel_values[0]

    @override
    def _tokenize(self, prompt: str) -> tuple[Int[Tensor, "1 tokens"], int]:
        length = self._model.config.text_config.max_position_embeddings
        encoded = self._tokenizer(
            [prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return encoded.input_ids, len(self._tokenizer(prompt).input_ids)

    @override
    def _image_features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b width"]:
        return self._model.get_image_features(pixel_values=pixels).pooler_output

    @override
    def _text_features(self, tokens: Int[Tensor, "b tokens"]) -> Float[Tensor, "b width"]:
        return self._model.get_text_features(input_ids=tokens).pooler_output


def _content_hash(image: Image.Image) -> str:
    return hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()
