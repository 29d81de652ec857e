"""What was trained of branches and of an identity encoder, in a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainers.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


def save(parameters: Mapping[str, Tensor], path: Path) -> None:
    """Write weights by name."""
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: value.detach().contiguous() for name, value in parameters.items()}, temporary)
    temporary.replace(path)


def restore(network: Any, path: Path) -> None:
    """Load what `save` wrote of a network.

    Raises:
        ModelError: It is not there, or of a network with other trained weights.
    """
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected what a finished trial of photomaker exports")
    state: dict[str, Any] = load_file(path)
    wanted = _trained_names(network)
    missing, unknown = wanted - state.keys(), state.keys() - wanted
    if missing or unknown:
        name = min(missing or unknown)
        raise ModelError(f"{path}: {'lacks' if missing else 'has'} {name}; was it trained with other branches?")
    network.load_state_dict(state, strict=False)


def _trained_names(network: Any) -> set[str]:
    """Names of a network's weights that a trial with it trains and saves."""
    names = (name for name, _ in network.named_parameters())
    return {name for name in names if not name.startswith(("vision_model.", "visual_projection"))}
