"""What a folder must hold to be a CLIP model, found out without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from trainers.errors import ModelError
from trainers.pretrained import read_json

_OPEN_CLIP_CONFIG = "open_clip_config.json"
# In the order in which open_clip itself prefers them. `model.safetensors` is left out on purpose: beside an
# open_clip config it is the transformers form of the same model.
_OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_TRANSFORMERS_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class ClipFolder:
    """A CLIP model on disk."""

    path: Path
    form: Literal["open_clip", "transformers"]
    """Decided by the files alone: a folder with `open_clip_config.json` is open_clip's."""
    files: tuple[Path, ...]
    """Everything that decides what the model computes: weights, configs, tokenizer."""
    width: int
    """Length of its embeddings."""
    checkpoint: Path | None = None
    """Weights that take the place of the folder's own."""

    @property
    def name(self) -> str:
        """What people call it."""
        return self.path.name if self.checkpoint is None else self.checkpoint.stem

    @property
    def weights(self) -> Path:
        """The weights file."""
        return self.files[0]


def read_clip_folder(path: Path, checkpoint: Path | None = None) -> ClipFolder:
    """Describe the CLIP model in `path`.

    Args:
        path: The folder.
        checkpoint: A file of weights in open_clip's names, which is read instead of the folder's own.

    Raises:
        ModelError: The folder is missing, incomplete, or holds something else.
    """
    if not path.is_dir():
        raise ModelError(
            f"{path}: no such folder; expected a CLIP model in the form of open_clip ({_OPEN_CLIP_CONFIG}) "
            "or of transformers (config.json)"
        )
    if (path / _OPEN_CLIP_CONFIG).is_file():
        return _read_open_clip(path, checkpoint)
    if checkpoint is not None:
        raise ModelError(
            f"{path}: {_OPEN_CLIP_CONFIG} is not here; expected one beside or for the weights in {checkpoint}, "
            "which have open_clip's names"
        )
    if (path / "config.json").is_file():
        return _read_transformers(path)
    raise ModelError(
        f"{path}: neither {_OPEN_CLIP_CONFIG} nor config.json is here; expected a CLIP model in the form of "
        "open_clip or of transformers"
    )


def _read_open_clip(path: Path, checkpoint: Path | None) -> ClipFolder:
    config_path = path / _OPEN_CLIP_CONFIG
    config = read_json(config_path).get("model_cfg")
    if not isinstance(config, dict):
        raise ModelError(f"{config_path}: `model_cfg` is missing; copy the config that came with the weights")
    model = cast("dict[str, Any]", config)
    width, text = model.get("embed_dim"), model.get("text_cfg")
    if not isinstance(width, int) or not isinstance(text, dict):
        raise ModelError(f"{config_path}: `model_cfg` needs `embed_dim` and `text_cfg`; got keys {sorted(model)}")
    if checkpoint is not None and not checkpoint.is_file():
        raise ModelError(f"{checkpoint}: no such file; expected weights in open_clip's names")
    files = [checkpoint or _first(path, _OPEN_CLIP_WEIGHTS, "weights"), config_path]
    if cast("dict[str, Any]", text).get("hf_tokenizer_name"):
        files += _tokenizer_files(path)
    return ClipFolder(path, "open_clip", tuple(files), width, checkpoint)


def _read_transformers(path: Path) -> ClipFolder:
    config_path = path / "config.json"
    config = read_json(config_path)
    if config.get("model_type") != "clip":
        raise ModelError(
            f"{config_path}: model_type is {config.get('model_type')!r}, expected 'clip' (both towers); "
            "a text or vision tower alone cannot score"
        )
    files = [_first(path, _TRANSFORMERS_WEIGHTS, "weights"), config_path]
    files.append(_first(path, ("preprocessor_config.json",), "image preprocessing"))
    files += _tokenizer_files(path)
    width = config.get("projection_dim", 512)  # CLIPConfig's default, which its files may leave out
    return ClipFolder(path, "transformers", tuple(files), width)


def _tokenizer_files(path: Path) -> list[Path]:
    if (path / "tokenizer_config.json").is_file():
        read_json(path / "tokenizer_config.json")
    if (path / "tokenizer.json").is_file():
        read_json(path / "tokenizer.json")
        return [path / "tokenizer.json"]
    return [_first(path, (name,), "tokenizer (tokenizer.json, or vocab.json and merges.txt)") for name in _BPE_FILES]


_BPE_FILES = ("vocab.json", "merges.txt")


def _first(path: Path, names: tuple[str, ...], what: str) -> Path:
    for name in names:
        if (path / name).is_file():
            return path / name
    raise ModelError(f"{path}: {what} missing; expected {' or '.join(names)}")
