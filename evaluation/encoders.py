"""CLIP towers and vision transformers for scoring, opened from local folders and used by every metric that needs them.

Each model has one preprocessing path, the one its authors measured with: open_clip's own transform for open_clip
folders, and transformers' Pillow processor (as OpenAI's code; the torchvision one differs by up to 0.03 in
normalised units) for transformers folders.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from abc import abstractmethod
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from typing_extensions import override

from evaluation.clip_folder import ClipFolder, read_clip_folder
from evaluation.dino_encoder import TimmDinoEncoder, TransformersDinoEncoder
from evaluation.dino_folder import read_dino_folder
from evaluation.embedding import PictureEncoder
from evaluation.metric import Encoder, Encoders, ImageEncoder
from trainers.cache import Cache, digest
from trainers.errors import ModelError
from trainers.face import FaceEmbedder

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from jaxtyping import Float, Float32, Int
    from PIL import Image
    from torch import Tensor

    from trainers.face import Face, FaceConfig
    from trainers.prompt import Box

log = logging.getLogger(__name__)
_UNLOADABLE = (
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
    pickle.UnpicklingError,
)


class ClipEncoders(Encoders):
    """Encoders on one device, each loaded once."""

    def __init__(self, device: torch.device, cache: Cache) -> None:
        self._device = device
        self._cache = cache
        self._opened: dict[tuple[Path, Path | None], ClipEncoder] = {}
        self._dinos: dict[Path, ImageEncoder] = {}
        self._faces: dict[str, FaceEmbedder] = {}

    @override
    def clip(self, path: Path, checkpoint: Path | None = None) -> Encoder:
        if (path, checkpoint) not in self._opened:
            folder = read_clip_folder(path, checkpoint)
            kind = OpenClipEncoder if folder.form == "open_clip" else TransformersClipEncoder
            self._opened[path, checkpoint] = kind(folder, self._device, self._cache)
        return self._opened[path, checkpoint]

    @override
    def dino(self, path: Path) -> ImageEncoder:
        if path not in self._dinos:
            folder = read_dino_folder(path)
            kind = TimmDinoEncoder if folder.form == "timm" else TransformersDinoEncoder
            self._dinos[path] = kind(folder, self._device, self._cache)
        return self._dinos[path]

    @override
    def faces(self, config: FaceConfig) -> FaceEmbedder:
        key = config.model_dump_json()
        if key not in self._faces:
            self._faces[key] = _Remembering(config.open(torch.device("cpu")))
        return self._faces[key]


class _Remembering(FaceEmbedder):
    """A face embedder that looks at a picture once."""

    def __init__(self, embedder: FaceEmbedder) -> None:
        self.size = embedder.size
        self._embedder = embedder
        self._seen: dict[tuple[str, Box | None], Face | None] = {}

    @override
    def find(self, image: Image.Image, box: Box | None = None) -> Face | None:
        key = digest(image.mode, str(image.size), hashlib.sha256(image.tobytes()).hexdigest()), box
        if key not in self._seen:
            self._seen[key] = self._embedder.find(image, box)
        return self._seen[key]


class ClipEncoder(PictureEncoder, Encoder):
    """What both forms share: an image is embedded once, prompts and references once per cache."""

    def __init__(self, folder: ClipFolder, device: torch.device, cache: Cache) -> None:
        super().__init__(folder.name, folder.files, device, cache)
        self.width = folder.width

    @override
    def embed_prompts(self, prompts: Sequence[str]) -> Float32[np.ndarray, "n width"]:
        def row(prompt: str) -> Float32[np.ndarray, " width"]:
            return self._recall(digest("clip prompt", prompt, self._state), lambda: self._compute_prompt(prompt))

        rows = {prompt: row(prompt) for prompt in dict.fromkeys(prompts)}
        return np.stack([rows[prompt] for prompt in prompts])

    def _compute_prompt(self, prompt: str) -> Float32[np.ndarray, " width"]:
        tokens, num_tokens = self._tokenize(prompt)
        if num_tokens > tokens.shape[1]:
            log.warning(
                "%s reads the first %d of %d tokens of the prompt %r; the rest does not count in its score",
                self.model, tokens.shape[1], num_tokens, prompt,
            )  # fmt: skip
        return self._unit(lambda: self._text_features(tokens.to(self._device)))[0]

    @abstractmethod
    def _tokenize(self, prompt: str) -> tuple[Int[Tensor, "1 tokens"], int]:
        """Token ids, cut and padded as the model was trained, and how many there were before cutting."""

    @abstractmethod
    def _text_features(self, tokens: Int[Tensor, "b tokens"]) -> Float[Tensor, "b width"]:
        """Projected text embeddings."""


class OpenClipEncoder(ClipEncoder):
    """A folder with `open_clip_config.json`, as open_clip's `local-dir:` schema reads it."""

    def __init__(self, folder: ClipFolder, device: torch.device, cache: Cache) -> None:
        import open_clip
        from open_clip.factory import load_checkpoint
        from open_clip.tokenizer import HFTokenizer

        super().__init__(folder, device, cache)
        name = f"local-dir:{folder.path}"
        try:
            own = folder.checkpoint is None
            with nullcontext() if own else _random_for_now():
                model, _, preprocess = open_clip.create_model_and_transforms(
                    name, device=device, load_weights=own, require_pretrained=own
                )
            if folder.checkpoint is not None:
                load_checkpoint(cast("Any", model), str(folder.checkpoint))
            tokenizer = open_clip.get_tokenizer(name)
        except _UNLOADABLE as error:
            problem = " ".join(str(error).split())
            raise ModelError(f"{folder.weights}: open_clip cannot load this folder with it ({problem})") from error
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


@contextmanager
def _random_for_now() -> Generator[None]:
    """Within it, open_clip does not warn of random weights: a checkpoint takes their place at once."""

    def keep(record: logging.LogRecord) -> bool:
        return "initialized randomly" not in record.getMessage()

    root = logging.getLogger()  # open_clip has no logger of its own
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)


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
            problem = " ".join(str(error).split())
            raise ModelError(f"{folder.weights}: transformers cannot load this folder with it ({problem})") from error
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
