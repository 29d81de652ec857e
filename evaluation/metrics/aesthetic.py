"""The LAION aesthetic predictor V2 (github.com/christophschuhmann/improved-aesthetic-predictor, 2022)."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError, safe_open
from typing_extensions import override

from evaluation.clip_folder import read_clip_folder
from evaluation.metric import Encoder, Encoders, Metric, PictureScorer, Scorer
from trainers.batch import Source
from trainers.config import LocalPath
from trainers.errors import ModelError
from trainers.prompt import Sample

# In the published files, dropout stands between the layers and the activations are commented out.
_LINEAR_LAYOUT = (0, 2, 4, 6, 7)
_RELU_LAYOUT = (0, 3, 6, 9, 11)
_SUFFIXES = (".pth", ".safetensors")
# What torch and safetensors raise for a file of something else, depending on where reading fails.
_UNREADABLE = (
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    ValueError,
    pickle.UnpicklingError,
)


class Aesthetic(Metric):
    """Predicted human rating, about 1 to 10, from a CLIP image embedding.

    The published heads (`sac+logos+ava1-l14-linearMSE.pth`) go with OpenAI's ViT-L/14.
    """

    kind: Literal["aesthetic"] = "aesthetic"
    model: LocalPath
    """Folder of the CLIP model that the head was fitted on."""
    head: LocalPath
    """The head's weights: `.pth` or `.safetensors`."""

    @override
    def check(self) -> None:
        folder = read_clip_folder(self.model)
        if self.head.suffix not in _SUFFIXES:
            raise ModelError(f"{self.head}: expected an aesthetic head in a file that ends in {' or '.join(_SUFFIXES)}")
        if not self.head.is_file():
            raise ModelError(f"{self.head}: no such file; expected the weights of an aesthetic head")
        if self.head.suffix == ".safetensors":
            shapes = _read_shapes(self.head)
            first = _require_linear_layout(self.head, shapes)[0]
            _require_width(self.head, shapes[first][1], self.model, folder.width)

    @override
    def open(self, encoders: Encoders, references: Sequence[Source]) -> Scorer:
        from trainers.cache import hash_file

        weight, bias = load_head(self.head)
        encoder = encoders.clip(self.model)
        _require_width(self.head, len(weight), self.model, encoder.width)
        return _AestheticScorer(encoder, weight, bias, f"{self.head.stem}@{hash_file(self.head)[:12]}")


class _AestheticScorer(PictureScorer):
    def __init__(self, encoder: Encoder, weight: Float32[np.ndarray, " width"], bias: float, head: str) -> None:
        self.model = f"{encoder.model}+{head}"
        self._encoder = encoder
        self._weight = weight
        self._bias = bias

    @override
    def values(self, samples: Sequence[Sample]) -> list[float]:
        images = self._encoder.embed_images([sample.image for sample in samples])
        return (images @ self._weight + self._bias).tolist()


def load_head(path: Path) -> tuple[Float32[np.ndarray, " width"], float]:
    """The weight and bias of the head in `path` as the one affine map that it is.

    Five linear layers with nothing between them (dropout rests at inference) compose to `x @ weight + bias`; the
    product is taken in double precision.

    Raises:
        ModelError: The file is unreadable, has activations between its layers, or its layers do not fit one another.
    """
    tensors = _read_tensors(path)
    names = _require_linear_layout(path, {name: tensor.shape for name, tensor in tensors.items()})
    slope = np.eye(tensors[names[0]].shape[1])
    offset = np.zeros(len(slope))
    for name in names:
        matrix = tensors[name].astype(np.float64)
        slope = matrix @ slope
        offset = matrix @ offset + tensors[_bias_of(name)].astype(np.float64)
    return slope[0].astype(np.float32), float(offset[0])


def _require_linear_layout(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of the weights, first layer first."""
    if {f"layers.{index}.weight" for index in _RELU_LAYOUT} <= set(shapes):
        raise ModelError(
            f"{path}: this head has ReLUs between its layers (layers {', '.join(map(str, _RELU_LAYOUT))}); "
            "expected a linear one, such as sac+logos+ava1-l14-linearMSE.pth"
        )
    names = [f"layers.{index}.weight" for index in _LINEAR_LAYOUT]
    expected = {name for weight in names for name in (weight, _bias_of(weight))}
    if set(shapes) != expected:
        raise ModelError(
            f"{path}: expected the tensors of a LAION aesthetic head ({', '.join(sorted(expected))}); "
            f"got {', '.join(sorted(shapes)) or 'none'}"
        )
    width = shapes[names[0]][-1]
    for name in names:
        num_outputs = 1 if name == names[-1] else shapes[name][0]
        if shapes[name] != (num_outputs, width) or shapes[_bias_of(name)] != (num_outputs,):
            raise ModelError(
                f"{path}: {name} has shape {list(shapes[name])} and its bias {list(shapes[_bias_of(name)])}; "
                f"expected {[num_outputs, width]} and {[num_outputs]}"
            )
        width = num_outputs
    return names


def _bias_of(weight: str) -> str:
    return weight.replace("weight", "bias")


def _require_width(head: Path, width: int, model: Path, found: int) -> None:
    if width != found:
        raise ModelError(
            f"{head}: made for embeddings of {width} numbers; {model} gives {found}. "
            "Use the CLIP model that the head was fitted on (OpenAI's ViT-L/14 for the LAION heads: 768)"
        )


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        if path.suffix == ".safetensors":
            with _open_safetensors(path) as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        import torch

        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.float().numpy() for name, tensor in state.items()}
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file; expected the weights of an aesthetic head") from error
    except _UNREADABLE as error:
        raise ModelError(f"{path}: cannot be read as weights ({error}); download the file again") from error


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, from its header alone."""
    try:
        with _open_safetensors(path) as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a mapping
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as weights ({error}); download the file again") from error


def _open_safetensors(path: Path) -> Any:
    return safe_open(path, framework="numpy")
