"""The files of an IP-Adapter: tensors, and what they mean."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainers.errors import ModelError

IMAGE_FILE = "ip_adapter.safetensors"
"""The image stream, as diffusers' `load_ip_adapter` reads it."""
STREAMS_FILE = "token_streams.safetensors"
"""Everything else, under names of our own."""

_METADATA = "streams"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], description: str) -> None:
    """Replace a file whole; `description` says what its tensors are made for."""
    import safetensors.torch

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    saved = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(saved, temporary, {"format": "pt", _METADATA: description})
    temporary.replace(path)


def read_tensors(path: Path, description: str) -> dict[str, Tensor]:
    """What `write_tensors` wrote.

    Raises:
        ModelError: It is not there, or was made for something else.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected the adapter of a finished trial")
    opened: Any = safe_open(path, "pt")
    with opened as file:
        metadata: dict[str, str] = file.metadata() or {}
        found = metadata.get(_METADATA)
        if found != description:
            raise ModelError(f"{path}: made for other streams than this trial's; expected {description}, got {found}")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
