"""What a folder must hold to be a vision transformer with a class token, such as DINO; read without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from typing_extensions import override

from evaluation.metric import Metric
from trainers.config import LocalPath
from trainers.errors import ModelError
from trainers.pretrained import read_json

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_MODEL_TYPES = {"vit": "ViT", "dinov2": "DINOv2", "dinov2_with_registers": "DINOv2 with registers"}
"""transformers' names: facebook/dino-vits16 is a `vit`, facebook/dinov2-small a `dinov2`."""


@dataclass(frozen=True)
class DinoFolder:
    """A vision transformer on disk."""

    path: Path
    form: Literal["transformers", "timm"]
    """Decided by the config alone: timm's has an `architecture`, transformers' a `model_type`."""
    architecture: str
    """Part of every score's model name, since values of different transformers are not comparable."""
    files: tuple[Path, ...]
    """Everything that decides what the model computes: weights, config, preprocessing."""
    width: int
    """Length of its embeddings."""


def read_dino_folder(path: Path) -> DinoFolder:
    """Describe the vision transformer in `path`.

    Raises:
        ModelError: The folder is missing, incomplete, or holds something else.
    """
    config_path = path / "config.json"
    if not config_path.is_file():
        raise ModelError(
            f"{config_path}: no such file; expected a vision transformer as transformers or timm save it, "
            "such as a copy of facebook/dino-vits16 or timm/vit_small_patch16_224.dino"
        )
    config = read_json(config_path)
    return _read_timm(path, config) if "architecture" in config else _read_transformers(path, config)


def _read_transformers(path: Path, config: dict[str, Any]) -> DinoFolder:
    kind = config.get("model_type")
    if kind not in _MODEL_TYPES:
        raise ModelError(
            f"{path / 'config.json'}: model_type is {kind!r}, expected {' or '.join(map(repr, _MODEL_TYPES))}, "
            "or timm's `architecture`; a CLIP folder belongs to the metric clip_image"
        )
    files = (_first(path, _WEIGHTS), path / "config.json", _first(path, ("preprocessor_config.json",)))
    read_json(files[-1])
    # 768 and 16 (14 for DINOv2) are transformers' defaults, which its files may leave out.
    width = int(config.get("hidden_size", 768))
    patch = config.get("patch_size", 16 if kind == "vit" else 14)
    return DinoFolder(path, "transformers", f"{_MODEL_TYPES[kind]} {width}/{patch}", files, width)


def _read_timm(path: Path, config: dict[str, Any]) -> DinoFolder:
    settings = cast("dict[str, Any]", config.get("pretrained_cfg") or {})
    if config.get("global_pool", "token") != "token":
        raise ModelError(
            f"{path / 'config.json'}: global_pool is {config['global_pool']!r}; expected 'token', a transformer that "
            "answers with its class token, such as vit_small_patch16_224.dino"
        )
    if not isinstance(config.get("num_features"), int):
        raise ModelError(
            f"{path / 'config.json'}: `num_features` is missing; copy the config that came with the weights"
        )
    name = ".".join(str(part) for part in (config["architecture"], settings.get("tag")) if part)
    files = (_first(path, _WEIGHTS), path / "config.json")
    return DinoFolder(path, "timm", f"timm {name}", files, config["num_features"])


def _first(path: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (path / name).is_file():
            return path / name
    raise ModelError(f"{path}: {' or '.join(names)} is missing; copy the whole folder")


class DinoMetric(Metric):
    """What scores of a vision transformer have in common."""

    model: LocalPath
    """Folder of a vision transformer (DINO, DINOv2), in the form of transformers or of timm."""

    @override
    def check(self) -> None:
        read_dino_folder(self.model)
